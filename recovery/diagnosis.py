"""What became of a model's weights: every tensor of the degraded checkpoint against the reference's.

Reads one pair of tensors at a time, from safetensors, and needs no forward pass. Structural damage (a permutation, a
transposition, a stale or swapped tensor, a wrong scale) is recognised by undoing it and finding the reference; damage
that lost information (rounding, pruning, noise, flipped bits) by what it leaves behind in the values.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from recovery.weights import Checkpoint

Structural = Literal[
    "missing",
    "zero",
    "not_finite",
    "misshapen",
    "other_tensor",
    "transposed",
    "rotary_permuted",
    "permuted",
    "shifted",
    "scaled",
]
"""Damage that exporting the model again undoes: what is wrong is where values lie, or that they were not written."""
Kind = Structural | Literal["rounded", "pruned", "quantized", "bit_flips", "noise", "low_rank", "changed", "extra"]
EXACT = 1e-5
"""Relative L2 of what is the same but for the order of a sum."""
ROUNDED = 0.06
"""Relative L2 up to which 8-bit floats round (e5m2: 0.053)."""
SAME = 0.02
"""Relative L2 below which a tensor counts as another one, but for rounding to a narrower dtype."""
WHOLE = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes in which a checkpoint is deployed as it is; a cast to a narrower one is damage."""
LAYER = re.compile(r"\.layers\.(\d+)\.")
"""In a tensor's name."""
GROUPS = (16, 32, 64, 128, 256)
SPECTRUM_ROWS = 1024
"""Of a large matrix, the corner whose spectrum is taken: a change of low rank is so everywhere."""
SAMPLED_ROWS = 64
"""Rows looked at where all of them would tell no more."""


@dataclass(frozen=True)
class Finding:
    tensor: str
    shape: tuple[int, ...]
    relative_l2: float
    """||degraded - reference|| / ||reference||; 1 where it is missing."""
    kind: Kind
    detail: str
    """What was found, in words and numbers."""
    spectrum: tuple[int, int, int, int] | None = None
    """Singular values of the change that hold 50, 90 and 99 % of its square, and how many there are (of a corner of a
    large matrix); None for what is no matrix, for structural damage, and where that corner is unchanged."""


def examine(theirs: Checkpoint, own: Checkpoint) -> Iterator[tuple[str, Finding | None]]:
    """(tensor, what is wrong with it or None) for each of the reference's tensors, in their order by name.

    theirs: the reference's; own: the degraded model's.
    """
    names = theirs.names
    known = Known(theirs)
    for name in names:
        right = theirs[name]
        if name not in own and known.twin_of(name, own) is not None:
            yield name, None  # tied to another tensor, and left out
        elif name not in own:
            yield name, Finding(name, tuple(right.shape), 1.0, "missing", "not in the degraded checkpoint")
        else:
            yield name, compare_tensors(name, right, own[name], known)
    embeddings = [name for name in names if "embed" in name]
    for name in sorted(set(own.names) - set(names)):
        tensor = own[name]
        if known.holder_of(tensor) is not None:
            continue  # a head that was tied and is now written out
        if name.endswith(".bias") and not tensor.any():
            continue  # which changes nothing
        tied = next((theirs[other] for other in embeddings if theirs.shape_of(other) == tuple(tensor.shape)), None)
        if tied is not None:
            finding = compare_tensors(name, tied, tensor)
            yield name, finding and replace(finding, detail=f"untied from the embedding: {finding.detail}")
        else:
            yield name, Finding(name, tuple(tensor.shape), 1.0, "extra", "not in the reference")


class Known:
    """Which of the reference's tensors has the same content; those of one shape are hashed when first asked for."""

    def __init__(self, reference: Checkpoint) -> None:
        self._reference = reference
        self._names: dict[tuple[int, ...], dict[str, str]] = {}

    def holder_of(self, tensor: Tensor) -> str | None:
        shape = tuple(tensor.shape)
        if shape not in self._names:
            self._names[shape] = {
                _digest(self._reference[name]): name
                for name in reversed(self._reference.names)
                if self._reference.shape_of(name) == shape
            }
        return self._names[shape].get(_digest(tensor))

    def twin_of(self, name: str, own: Checkpoint) -> str | None:
        """Another tensor of the reference with the same content, which `own` has."""
        digest, shape = _digest(self._reference[name]), self._reference.shape_of(name)
        others = (other for other in own.names if other in self._reference and other != name)
        same = (other for other in others if self._reference.shape_of(other) == shape)
        return next((other for other in same if _digest(self._reference[other]) == digest), None)


def compare_tensors(name: str, right: Tensor, wrong: Tensor, known: Known | None = None) -> Finding | None:
    """What happened to one tensor; None where it is the reference's, but for rounding to its own dtype."""
    whole = wrong.dtype in WHOLE and bool(torch.isfinite(wrong).all())
    if whole and right.shape == wrong.shape and torch.equal(right.to(wrong.dtype), wrong):
        return None
    kind, detail = _classify(name, right, wrong, known)
    different_shape = right.shape != wrong.shape
    relative = 1.0 if different_shape else _relative(right.float(), wrong.float())
    spectrum = None
    if kind not in get_args(Structural) and right.ndim == 2 and min(right.shape) >= 8:
        spectrum = _spectrum(wrong.float() - right.float())
        if spectrum is not None and kind in ("noise", "changed") and spectrum[2] <= spectrum[3] // 8:
            kind, detail = "low_rank", f"99% of the change has rank {spectrum[2]} of {spectrum[3]}"
    return Finding(name, tuple(right.shape), relative, kind, detail, spectrum)


def _classify(name: str, right: Tensor, wrong: Tensor, known: Known | None) -> tuple[Kind, str]:
    bits = wrong
    # Rounded alike, so that what was only moved is found to the bit.
    right, wrong = (right.to(wrong.dtype) if wrong.dtype in WHOLE else right).float(), wrong.float()
    if not torch.isfinite(wrong).all():
        return "not_finite", f"{int((~torch.isfinite(wrong)).sum())} values are inf or nan"
    if not wrong.any():
        return "zero", "all zero: it was dropped"
    alike = right.shape == wrong.shape and _relative(right, wrong) <= SAME
    if alike:
        for dtype in (torch.bfloat16, torch.float16):
            if torch.equal(right.to(dtype).float(), wrong):
                return "rounded", f"the reference's, rounded through {str(dtype).removeprefix('torch.')}"
    if not alike and known is not None and (other := known.holder_of(bits)) is not None:
        return "other_tensor", f"holds the reference's {other}{_mixed_up(name, other)}"
    for find in (_transposed, _permuted, _shifted, _scaled):
        if (found := find(right, wrong)) is not None:
            return found
    assert right.shape == wrong.shape
    for find in (_flipped, _pruned, _quantized):
        if (found := find(right, wrong, bits)) is not None:
            return found
    return _spread(right, wrong)


def _relative(right: Tensor, wrong: Tensor) -> float:
    norm = float(right.norm())
    return float((wrong - right).norm()) / norm if norm else float("inf")


def _digest(tensor: Tensor) -> str:
    """Of the content in bfloat16, the narrowest dtype that checkpoints are moved through."""
    return hashlib.sha256(tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()).hexdigest()


# ---- structural damage: undo it, and find the reference --------------------------------------------------


def _mixed_up(name: str, other: str) -> str:
    """The known bug that leaves one tensor's content under another's name, in words."""
    if name.replace("gate_proj", "up_proj") == other or other.replace("gate_proj", "up_proj") == name:
        return " (gate and up are swapped)"
    if (layer := LAYER.search(other)) is not None and LAYER.sub("", name) == LAYER.sub("", other):
        return f" (a stale copy: layer {layer.group(1)}'s was written again)"
    return ""


def _transposed(right: Tensor, wrong: Tensor) -> tuple[Kind, str] | None:
    if right.ndim != 2:
        return None if right.shape == wrong.shape else ("misshapen", f"another shape: {tuple(wrong.shape)}")
    if wrong.shape == right.T.shape and _relative(right.T, wrong) < SAME:
        return "transposed", "the transpose of the reference's"
    return None if right.shape == wrong.shape else ("misshapen", f"another shape: {tuple(wrong.shape)}")


def _permuted(right: Tensor, wrong: Tensor) -> tuple[Kind, str] | None:
    """Rows (or entries of a bias) in another order."""
    if right.ndim == 0 or _relative(right, wrong) <= SAME:
        return None
    if right.ndim == 1 and (len(right.unique()) < len(right) or _relative(right.sort()[0], wrong.sort()[0]) > EXACT):
        return None  # sorting any two lists of numbers brings them near each other
    rows, others = (x.flatten(1) if x.ndim > 1 else x[:, None] for x in (right, wrong))
    # A projection of the rows on one random direction tells them apart, and costs one pass.
    probe = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(0))
    (values, order), (theirs, place) = torch.sort(rows @ probe), torch.sort(others @ probe)
    if not torch.allclose(values, theirs, rtol=1e-2, atol=1e-2 * float(values.abs().mean())):
        return None
    if _relative(rows[order], others[place]) > SAME:
        return None
    source = torch.empty_like(order)
    source[place] = order  # row i of the wrong one is row source[i] of the right one
    if torch.equal(source, torch.arange(len(source))):
        return None
    if (heads := _rotary_heads(source)) is not None:
        return "rotary_permuted", f"rows of {heads} heads in the order of an interleaved rotary embedding"
    shift = int((source[0]) % len(source))
    if torch.equal(source, (torch.arange(len(source)) + shift) % len(source)):
        return "permuted", f"rows moved by {min(shift, len(source) - shift)}"
    return (
        "permuted",
        f"the reference's rows in another order ({int((source != torch.arange(len(source))).sum())} moved)",
    )


def _rotary_heads(source: Tensor) -> int | None:
    """Number of heads whose rows went from halves to pairs, or back."""
    rows = len(source)
    for width in range(4, rows + 1, 2):
        if rows % width == 0:
            pairs = torch.arange(rows).view(rows // width, 2, width // 2).transpose(1, 2).reshape(-1)
            if torch.equal(source, pairs) or torch.equal(source, pairs.argsort()):
                return rows // width
    return None


def _shifted(right: Tensor, wrong: Tensor) -> tuple[Kind, str] | None:
    if right.ndim != 1:
        return None
    shift = float((wrong - right).mean())
    if abs(shift) > 1e-3 and float((wrong - right - shift).norm()) < SAME * float((wrong - right).norm()):
        known = " (stored for a norm that multiplies by 1 + weight)" if abs(shift + 1) < SAME else ""
        return "shifted", f"every value off by {shift:+.4g}{known}"
    return None


def _scaled(right: Tensor, wrong: Tensor) -> tuple[Kind, str] | None:
    factor = _factor(right, wrong)
    if factor and abs(factor - 1) > 0.01 and _relative(right * factor, wrong) < SAME:
        return "scaled", f"{factor:.4g} times the reference's"
    return None


def _factor(right: Tensor, wrong: Tensor) -> float:
    """The multiple of the reference's that comes nearest."""
    return float((right * wrong).sum() / right.square().sum().clamp(min=1e-30))


# ---- lost information: what it leaves behind -------------------------------------------------------------


def _flipped(right: Tensor, wrong: Tensor, bits: Tensor) -> tuple[Kind, str] | None:
    different = right != wrong
    share = float(different.float().mean())
    integer = {2: torch.int16, 4: torch.int32}.get(bits.element_size())
    if share > 0.02 or integer is None:
        return None
    before = right.to(bits.dtype)[different].view(integer).to(torch.int64)
    after = bits[different].view(integer).to(torch.int64)
    changed = (before ^ after) & (2 ** (8 * bits.element_size()) - 1)
    single = float(((changed & (changed - 1)) == 0).float().mean())
    if single < 0.9:
        return None
    return "bit_flips", f"{int(different.sum())} values differ by a single bit"


def _pruned(right: Tensor, wrong: Tensor, _: Tensor) -> tuple[Kind, str] | None:
    gone = (wrong == 0) & (right != 0)
    share = float(gone.float().mean())
    if share < 0.05 or _relative(right[~gone], wrong[~gone]) > SAME:
        return None
    pattern = ""
    for count, block in ((2, 4), (1, 4), (4, 8)):
        if wrong.ndim == 2 and wrong.shape[1] % block == 0:
            zeros = (wrong.view(wrong.shape[0], -1, block) == 0).sum(-1)
            if bool((zeros >= count).all()) and abs(share - count / block) < 0.02:
                pattern = f", {block - count}:{block} pattern"
                break
    small = float(right[gone].abs().max()) <= float(right[~gone].abs().min()) * 1.01
    return "pruned", f"{share:.1%} of the values are zero{', the smallest ones' if small else ''}{pattern}"


def _quantized(right: Tensor, wrong: Tensor, _: Tensor) -> tuple[Kind, str] | None:
    """Few distinct values in each group along the input, at a tenth or less of what the reference has."""
    if wrong.ndim != 2:
        return None
    rows = torch.linspace(0, len(wrong) - 1, min(SAMPLED_ROWS, len(wrong))).long()
    mine, theirs = wrong[rows], right[rows]
    best: tuple[int, int] | None = None
    for group in (*GROUPS, wrong.shape[1]):
        if group > wrong.shape[1]:
            continue
        levels = _distinct(mine, group)
        # Levels that a group of this size could not show by chance: at least a third of its values repeat others.
        if levels <= 256 and levels < 0.67 * _distinct(theirs, group) and (best is None or levels <= best[1] * 1.05):
            best = group, levels
    if best is None:
        return None
    group, levels = best
    found = f"at most {levels} values in a group of {group} ({max(levels - 1, 1).bit_length()} bits)"
    factor = _factor(right, wrong)
    if abs(factor - 1) > SAME and _relative(right * factor, wrong) < ROUNDED:
        return "scaled", f"{factor:.4g} times the reference's, and rounded: {found}"
    return "quantized", found


def _distinct(rows: Tensor, group: int) -> int:
    """The largest number of distinct values in a group."""
    whole = rows[:, : rows.shape[1] // group * group].reshape(-1, group).sort(dim=1).values
    step = whole.abs().amax(1, keepdim=True).clamp(min=1e-30) * 1e-5
    return int(((whole.diff(dim=1) > step).sum(1) + 1).max())


def _spectrum(change: Tensor) -> tuple[int, int, int, int] | None:
    """As Finding.spectrum has it."""
    values = torch.linalg.svdvals(change[:SPECTRUM_ROWS, :SPECTRUM_ROWS])
    if not values.any():
        return None
    energy = values.square().cumsum(0) / values.square().sum()
    half, most, nearly = (int((energy < share).sum()) + 1 for share in (0.5, 0.9, 0.99))
    return half, most, nearly, len(values)


def _spread(right: Tensor, wrong: Tensor) -> tuple[Kind, str]:
    """A change of every value: noise, or something else."""
    change = wrong - right
    relative = float(change.std() / right.std().clamp(min=1e-30))
    z = (change - change.mean()) / change.std().clamp(min=1e-30)
    kurtosis = float(z.pow(4).mean())
    tied = float((change.flatten() @ right.flatten()) / (change.norm() * right.norm()).clamp(min=1e-30))
    if abs(kurtosis - 3) < 0.5 and abs(tied) < 0.05:
        return "noise", f"Gaussian, {relative:.3g} times the standard deviation of the weights"
    return "changed", f"by {relative:.3g} times the standard deviation of the weights, kurtosis {kurtosis:.1f}"
