"""Why a recovery is not whole, as far as its artifacts tell: no model is run for it (`diagnose --run` does that)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eval.config import ReportJob
from eval.evidence import Evidence, damage_of
from recovery.adapters import CONFIG, adapted_modules
from recovery.files import held_out_lines
from recovery.watch import advice, advice_on_warmup

SMALL = 0.1
"""Share of the remaining KL below which a cause is not worth a remedy."""


def causes(job: ReportJob, evidence: Evidence, summary: Mapping[str, Any]) -> list[str]:
    """One sentence for each, what was found and what to do; without what the text's amount explains."""
    trend = advice([line["kl"] for line in held_out_lines(job.adapter.path)])
    steps = advice_on_warmup(evidence.adapter["details"]) if "train" in evidence.manifests else None
    return [
        *(said for said in (trend, steps) if said is not None),
        *_choice(evidence),
        *_uncovered(job, evidence),
        *accuracy_notes(summary),
    ]


def _choice(evidence: Evidence) -> list[str]:
    """Whether training was delivered as it stood before its end, by its own measurements."""
    details = evidence.adapter["details"]
    best, last = details.get("best_step"), details.get("steps_taken")
    if best == last:
        return []
    if best == 0:
        return ["training left more KL than its start, so the start was delivered: lower train.learning_rate"]
    return [f"held-out KL was lowest after step {best} of {last}, and that state was delivered: more text would help"]


def want_of_text(summary: Mapping[str, Any]) -> list[str]:
    """What more text could still remove: the KL on text learned from against that on held-out text."""
    learned, left = summary["kl"]["learned"], summary["kl"]["recovered"]
    if learned is None or left <= 0:
        return []
    share = (left - learned) / left
    found = f"in the last epoch the KL was {learned:.3f} on the text learned from, and is {left:.3f} on held-out text"
    if share > SMALL:
        return [f"{found}: {share:.0%} of what is left is for want of other text (generate.samples)"]
    return [f"{found}: nothing was learned by heart, so more steps (text or epochs), rank or places would help"]


def _uncovered(job: ReportJob, evidence: Evidence) -> list[str]:
    """Damaged tensors without an adapter, where this run made the damage."""
    damage = damage_of(evidence)
    # Experts are stored one by one and adapted together: their names would not say it.
    if damage is None or not (job.adapter.path / CONFIG).is_file() or any(".experts." in name for name in damage):
        return []
    adapted = adapted_modules(job.adapter.path)
    bare = [name for name in damage if name.removesuffix(".weight") not in adapted]
    if not bare:
        return []
    kinds = ", ".join(sorted({name.removesuffix(".weight").rpartition(".")[2] for name in bare}))
    mean = sum(damage[name] for name in bare) / len(bare)
    found = f"{len(bare)} of {len(damage)} damaged tensors have no adapter"
    remedy = "placement auto weighs the layers' matrices among them, others want the reference's own values"
    return [f"{found} ({kinds}; changed by {mean:.2g} of their norm on average): {remedy}"]


def accuracy_notes(summary: Mapping[str, Any]) -> list[str]:
    """Why AR% is negative or cannot be told."""
    notes = []
    silent = [name for name, task in summary["tasks"].items() if not task["ar_percent"]["measurable"]]
    if silent:
        notes.append(
            f"AR% says nothing on {', '.join(silent)}: the reference is not above the degraded model by three standard "
            "errors there (more items, or tasks on which the reference is better)"
        )
    negative = {
        name: task["ar_percent"]["value"]
        for name, task in summary["tasks"].items()
        if task["ar_percent"]["measurable"] and task["ar_percent"]["value"] < 0
    }
    if negative:
        kl = summary["kl"]["recovered"]
        worst = ", ".join(f"{name} {value:.0f}%" for name, value in negative.items())
        cause = (
            "accuracy comes back late, below a KL of about 1"
            if kl > 1
            else "the adapter moved answers that noise had left near chance; see the intervals"
        )
        notes.append(f"negative AR% ({worst}) at KL {kl:.2f}: {cause}")
    return notes
