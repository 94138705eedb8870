"""`recover-lora diagnose REFERENCE DEGRADED`: what is damaged, where, how badly, and what to do about it."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from eval.heatmap import plot_tensors
from recovery.advice import Advice, advise, summarize
from recovery.config import ModelInput
from recovery.diagnosis import Finding, examine
from recovery.errors import UserError
from recovery.files import write_atomic, write_json
from recovery.progress import progress
from recovery.sources import is_gguf
from recovery.weights import checkpoints

if TYPE_CHECKING:
    from recovery.costs import Costs, Places, Weighed

CLOSINGS = {
    "nothing": "The weights are the same: a difference must come from the code, the tokenizer or the configuration.",
    "export": "Export the model again.",
    "replace": "Information was lost, in tensors that get no adapter: replace them.",
    "adapters": "Information was lost: recover it with adapters.",
}
SAMPLE_LENGTH = 128
ENOUGH = 0.9
"""Predicted recovery from which a higher rank is not advised."""


def diagnose(reference: Path, degraded: Path, folder: Path | None, text_tokens: int) -> str:
    """Compare two checkpoints tensor by tensor, and on a text what their difference costs; returns what to print.

    folder: write findings and pictures there. text_tokens: of the text, made by the reference; 0: weights alone.
    """
    for path in (reference, degraded):
        if not path.is_dir() and not (is_gguf(str(path)) and path.is_file()):
            remedy = "give folders with safetensors, or GGUF files; download a hub model first"
            raise UserError(str(path), "no such folder", remedy)
    theirs, own = checkpoints(reference, degraded)
    count = len(theirs.names)
    bar = progress(count, "tensor", "diagnose")
    findings: list[Finding] = []
    for _, finding in examine(theirs, own):
        bar.update()
        if finding is not None:
            findings.append(finding)
    bar.close()
    advice = advise(findings)
    text = render(findings, count, advice, None)
    if folder is not None:  # before the models are run: what was found is not lost if they cannot be
        write_down(folder, findings, count, advice, None, text)
    # Structural damage is to be undone, not weighed; and what it left may not even load.
    if not text_tokens or advice.action in ("nothing", "export"):
        return text
    try:
        right, wrong = (ModelInput(path=str(path), digest="") for path in (reference, degraded))
        costs = weigh_on_text(right, wrong, text_tokens).costs
    except (UserError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: out of memory, for one
        return f"{text}\n\nnot weighed on text: {error}"
    text = render(findings, count, advice, costs)
    if folder is not None:
        write_down(folder, findings, count, advice, costs, text)
    return text


def weigh_on_text(
    reference: ModelInput, degraded: ModelInput, text_tokens: int, checked: int = 3, places: Collection[Places] = ()
) -> Weighed:
    """recovery.costs.weigh on text that the reference writes itself."""
    import torch

    from datagen.config import Generate
    from datagen.generate import load_sampling_vocabulary, sample_tokens
    from recovery.costs import weigh
    from recovery.models import load_model
    from recovery.vocabulary import load_vocabulary, used_width

    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    vocabulary = load_sampling_vocabulary(reference, "auto")
    right = load_model(reference, dtype)
    settings = Generate(samples=max(1, text_tokens // SAMPLE_LENGTH), max_length=SAMPLE_LENGTH)
    tokens = sample_tokens(right, vocabulary, settings, seed=0)
    wrong = load_model(degraded, dtype, placed=False)
    theirs, own = (load_vocabulary(model.path, model.revision) for model in (reference, degraded))
    width = used_width(theirs, own)
    return weigh(right.to("cpu"), wrong, tokens, width, seed=0, checked=checked, places=places)


def write_down(
    folder: Path, findings: list[Finding], count: int, advice: Advice, costs: Costs | None, text: str
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "findings": [asdict(finding) for finding in findings],
        "advice": asdict(advice),
        "tensors": count,
        "costs": None if costs is None else asdict(costs),
    }
    write_json(folder / "diagnosis.json", content)
    write_atomic(folder / "diagnosis.txt", text + "\n")
    if findings:
        changes = {finding.tensor: finding.relative_l2 for finding in findings}
        plot_tensors(changes, "Change of each tensor, relative L2 (white: none)", folder / "damage.png")
    if costs is not None and costs.nats:
        plot_tensors(costs.nats, "KL that each damaged matrix causes by itself, nats (estimated)", folder / "costs.png")


def render(findings: list[Finding], tensors: int, advice: Advice, costs: Costs | None) -> str:
    lines = [f"{len(findings)} of {tensors} tensors differ" if findings else f"all {tensors} tensors are equal", ""]
    lines += [f"  {title}\n      {detail}" for title, detail in summarize(findings)]
    if costs is not None:
        lines += ["", *render_costs(costs)]
    lines += ["", CLOSINGS[advice.action]]
    lines += [f"  - {reason}" for reason in advice.reasons]
    if advice.modules:
        lines.append(f"  adapter.placement: {json.dumps(list(advice.modules))}")
        lines.append("  adapter.init: closed_form_sequential")
    if costs is not None and costs.forecasts:
        chosen = next((one for one in costs.forecasts if one.recovery >= ENOUGH), costs.forecasts[-1])
        lines.append(f"  adapter.rank: {chosen.rank}")
        lines.append(f"  or adapter.placement: auto with adapter.budget: {chosen.parameters}, spread where they count")
    return "\n".join(lines)


def render_costs(costs: Costs) -> list[str]:
    found = costs.degraded
    lines = [
        f"On {costs.tokens} tokens of the reference's own text: KL {found.kl:.4g}, top-1 agreement {found.top1:.1%}",
        f"  states differ by {costs.drift[0]:.1%} behind the first layer, {costs.drift[-1]:.1%} behind the last",
    ]
    if costs.floor > 0.01 * found.kl:
        where = "norms, embeddings, biases, routers, the head, or experts of a kind that no adapter is made for"
        lines.append(f"  {costs.floor:.4g} of it is damage in {where}, which is not weighed further")
    dearest = sorted(costs.nats, key=costs.nats.__getitem__, reverse=True)[:5]
    if dearest:
        lines.append("  dearest matrices: KL each would cause by itself, estimated")
        lines += [f"    {costs.nats[name]:9.3g}  {name}" for name in dearest]
    if costs.restored:
        lines.append("  put right for real, one at a time: KL saved, predicted and measured")
        lines += [f"    {one.predicted:9.3g} {one.measured:9.3g}  {one.module}" for one in costs.restored]
    if costs.forecasts:
        lines.append("  adapters in closed form on all damaged matrices, predicted: rank, parameters, KL, recovery")
        lines += [
            f"    {one.rank:5d} {one.parameters:12,d} {one.kl:9.3g} {one.recovery:7.1%}" for one in costs.forecasts
        ]
    return lines
