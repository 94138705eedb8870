"""What to do about the damage that a diagnosis found: export again, replace tensors, or adapters, and where."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from recovery.diagnosis import LAYER, Finding, Structural


@dataclass(frozen=True)
class Advice:
    action: Literal["nothing", "export", "replace", "adapters"]
    reasons: tuple[str, ...]
    modules: tuple[str, ...] = ()
    """Last parts of the names of the damaged matrices, for adapter.placement."""
    replaced: tuple[str, ...] = ()
    """Tensors that no closed form adapts, to be written as the reference has them."""


def advise(findings: Sequence[Finding]) -> Advice:
    """Export again where the damage is structural; where information was lost, adapters on the damaged matrices of the
    layers, and the reference's own tensors for all others."""
    if not findings:
        return Advice("nothing", ("all tensors are the reference's",))
    structural = [finding for finding in findings if finding.kind in get_args(Structural)]
    if structural:
        reasons = [f"{title}: {detail}" for title, detail in summarize(structural)]
        return Advice("export", (*reasons, "no adapter is as good as the right weights: export the model again"))
    extra = tuple(f"{title}: {detail}" for title, detail in summarize([one for one in findings if one.kind == "extra"]))
    lost = [finding for finding in findings if finding.kind not in ("rounded", "extra")]
    if extra and not lost:
        return Advice("export", (*extra, "export without it, unless the architecture ignores it"))
    if not lost:
        return Advice("nothing", ("the weights were rounded to another dtype on the way, which models bear",))
    modules = tuple(dict.fromkeys(adapted_as(finding.tensor) for finding in lost if _takes_adapter(finding)))
    others = [finding for finding in lost if not _takes_adapter(finding)]
    reasons = (*((_replacement(others),) if others else ()), *extra)
    return Advice("adapters" if modules else "replace", reasons, modules, tuple(one.tensor for one in others))


def _takes_adapter(finding: Finding) -> bool:
    """Whether it is a matrix of the layers, which the closed forms repair; embeddings and the head lie outside, and
    routers are no such matrices, nor gates of one output."""
    other = "embed" in finding.tensor or module_of(finding.tensor) in ("lm_head", "gate", "router")
    return len(finding.shape) in (2, 3) and finding.shape[0] > 1 and not other


def _replacement(findings: Sequence[Finding]) -> str:
    megabytes = sum(2 * math.prod(finding.shape) for finding in findings) / 1e6
    named = ", ".join(dict.fromkeys(module_of(finding.tensor) for finding in findings))
    return f"{named} get no adapter: write the reference's in their place ({megabytes:.3g} MB in 16 bits)"


def summarize(findings: Sequence[Finding]) -> list[tuple[str, str]]:
    """(kind and where, the first one's detail): one line for each kind and module."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.kind, module_of(finding.tensor)), []).append(finding)
    lines = []
    for (kind, module), members in groups.items():
        layers = sorted({number for member in members if (number := layer_of(member.tensor)) is not None})
        where = f" in layers {_ranges(layers)}" if layers else ""
        size = sum(member.relative_l2 for member in members) / len(members)
        found = f"{members[0].detail} (relative L2 {size:.3g}"
        spectra = [member.spectrum for member in members if member.spectrum is not None]
        if spectra:
            half, most, _, count = (round(sum(values) / len(spectra)) for values in zip(*spectra, strict=True))
            found += f"; of {count} singular values {half} hold half of the change, {most} nine tenths"
        lines.append((f"{kind.replace('_', ' ')}, {module}{where}", f"{found})"))
    return lines


def module_of(tensor: str) -> str:
    """The last part of the module's name, and `.bias` behind it for one."""
    parts = tensor.removesuffix(".weight").rsplit(".", 2)
    return f"{parts[-2]}.{parts[-1]}" if parts[-1] == "bias" else parts[-1]


def adapted_as(tensor: str) -> str:
    """How adapter.placement names the tensor's module: single experts of a checkpoint are one parameter when loaded."""
    expert = re.search(r"\.experts\.(?:\d+\.)?(\w+)(?:\.weight)?$", tensor)
    if expert is None:
        return module_of(tensor)
    return f"experts.{'down_proj' if expert.group(1) in ('w2', 'down_proj') else 'gate_up_proj'}"


def layer_of(tensor: str) -> int | None:
    found = LAYER.search(tensor)
    return int(found.group(1)) if found else None


def _ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 as 0-2, 5."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts)
