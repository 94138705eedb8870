"""`recover-lora diagnose REFERENCE DEGRADED`: what is damaged, where, how badly, and what to do about it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from eval.heatmap import plot_damage
from recovery.diagnosis import Advice, Checkpoint, Finding, advise, examine, summarize
from recovery.errors import UserError
from recovery.files import write_atomic, write_json
from recovery.progress import progress

CLOSINGS = {
    "nothing": "The weights are the same: a difference must come from the code, the tokenizer or the configuration.",
    "export": "Export the model again.",
    "adapters": "Information was lost: recover it with adapters.",
}


def diagnose(reference: Path, degraded: Path, folder: Path | None) -> str:
    """Compare two checkpoints tensor by tensor; returns what to print. folder: write findings and heat map there."""
    for path in (reference, degraded):
        if not path.is_dir():
            raise UserError(str(path), "no such folder", "give folders with safetensors; download a hub model first")
    count = len(Checkpoint(reference).files)
    bar = progress(count, "tensor", "diagnose")
    findings: list[Finding] = []
    for _, finding in examine(reference, degraded):
        bar.update()
        if finding is not None:
            findings.append(finding)
    bar.close()
    advice = advise(findings)
    text = render(findings, count, advice)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        content = {"findings": [asdict(finding) for finding in findings], "advice": asdict(advice), "tensors": count}
        write_json(folder / "diagnosis.json", content)
        write_atomic(folder / "diagnosis.txt", text + "\n")
        if findings:
            plot_damage(findings, folder / "damage.png")
    return text


def render(findings: list[Finding], tensors: int, advice: Advice) -> str:
    lines = [f"{len(findings)} of {tensors} tensors differ" if findings else f"all {tensors} tensors are equal", ""]
    lines += [f"  {title}\n      {detail}" for title, detail in summarize(findings)]
    lines += ["", CLOSINGS[advice.action]]
    lines += [f"  - {reason}" for reason in advice.reasons]
    if advice.modules:
        lines.append(f"  adapter.placement: {json.dumps(list(advice.modules))}")
        # The head lies outside the layers, which a closed form repairs.
        lines.append(f"  adapter.init: {'zero' if 'lm_head' in advice.modules else 'closed_form_sequential'}")
    return "\n".join(lines)
