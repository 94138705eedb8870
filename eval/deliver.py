"""Deliver: an adapter as those who deploy it take it, with a model card; every form is loaded again and compared.

    python -m eval.deliver JOB

Writes the PEFT adapter, `README.md` (the model card), `summary.json`, `checks.json` and, where asked for, `merged/`:
the whole recovered model. A form whose KL is not the scored one, or whose greedy tokens differ by more than rounding,
fails the stage, and nothing is delivered.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.card import base_name, model_card
from eval.config import DeliverJob
from eval.evaluate import MEASURE_TOKENS
from recovery.adapters import CONFIG, WEIGHTS, load_adapter
from recovery.artifacts import Workspace, read_manifest
from recovery.config import ModelInput
from recovery.corpus import Tokens, read_split
from recovery.errors import Unavailable
from recovery.files import read_json, write_atomic, write_json
from recovery.measure import measure
from recovery.models import device, load_model
from recovery.sources import load_tokenizer
from recovery.stage import run_stage
from recovery.vocabulary import load_vocabulary, used_width

log = logging.getLogger("recover-lora")
KL_SHARE = 0.02
"""By how much a form's KL may differ from the scored one, as a share of it..."""
KL_NATS = 2e-3
"""...and beside that: what another order of roundings leaves of bfloat16 weights."""
GREEDY_SAMPLES = 8
ROUNDING = {"bfloat16": 0.5, "float32": 5e-3}
"""Logits that are closer to each other may change places in another form."""


@dataclass(frozen=True)
class Check:
    """A form of the delivery, loaded again."""

    form: str
    kl: float
    scored_kl: float
    tokens_compared: int
    """Places of held-out text at which the greedy token was compared with the adapter's."""
    tokens_different: int
    beyond_rounding: int
    """Of those, where the adapter's two candidates are further apart than rounding."""

    @property
    def holds(self) -> bool:
        return abs(self.kl - self.scored_kl) <= KL_NATS + KL_SHARE * self.scored_kl and not self.beyond_rounding


def next_logits(model: Any, text: Tokens, width: int) -> list[Tensor]:
    """Of the first samples: float32 [positions, width] at every place, by the model's own forward."""
    found = []
    for row in range(min(GREEDY_SAMPLES, len(text))):
        ids = torch.tensor(text.row(row), dtype=torch.int64, device=device())
        with torch.no_grad():
            found.append(model(ids[None]).logits[0, :, :width].float().cpu())
    return found


def compare_greedy(adapted: list[Tensor], other: list[Tensor], rounding: float) -> tuple[int, int, int]:
    """(places, greedy tokens that differ, those of them whose two candidates are more than `rounding` apart)"""
    places = different = beyond = 0
    for first, second in zip(adapted, other, strict=True):
        chosen, instead = first.argmax(-1), second.argmax(-1)
        margin = first.gather(1, chosen[:, None]) - first.gather(1, instead[:, None])
        places, different = places + len(chosen), different + int((chosen != instead).sum())
        beyond += int((margin > rounding).sum())
    return places, different, beyond


def produce(job: DeliverJob, workspace: Workspace) -> dict[str, Any]:
    folder = workspace.path
    shutil.copy(job.adapter.path / WEIGHTS, folder / WEIGHTS)
    # Where the base lies here says nothing elsewhere.
    config = {**read_json(job.adapter.path / CONFIG), "base_model_name_or_path": base_name(job.degraded)}
    write_json(folder / CONFIG, config)
    summary = read_json(job.report.path / "summary.json")
    write_json(folder / "summary.json", summary)
    scored = read_json(job.scores.path / "divergence.json")["held_out"]["kl"]
    theirs, own = (load_vocabulary(model.path, model.revision) for model in (job.reference, job.degraded))
    width = used_width(theirs, own)
    text = read_split(job.corpus.path, "held_out")
    reference = load_model(job.reference, job.dtype)

    def check(form: str, model: Any, logits: list[Tensor], adapted: list[Tensor]) -> Check:
        kl = measure(model, reference, text, width, MEASURE_TOKENS, f"KL of {form}").kl
        found = Check(form, kl, scored, *compare_greedy(adapted, logits, ROUNDING[job.dtype]))
        differ = f"{found.tokens_different} of {found.tokens_compared} greedy tokens differ"
        log.info("%s: KL %.4f, scored %.4f; %s", form, kl, scored, differ)
        return found

    recovered = load_adapter(load_model(job.degraded, job.dtype), folder)
    adapted = next_logits(recovered, text, width)
    checks = [check("adapter", recovered, adapted, adapted)]
    if job.merged:
        write_merged(job, recovered, folder / "merged")
        del recovered
        whole = load_model(ModelInput(path=str(folder / "merged"), digest=""), job.dtype)
        checks.append(check("merged", whole, next_logits(whole, text, width), adapted))
    write_json(folder / "checks.json", [asdict(one) for one in checks])
    for one in checks:
        if not one.holds:
            raise Unavailable(
                f"{one.form}, loaded again: KL {one.kl:.4f}, scored was {one.scored_kl:.4f}; {one.beyond_rounding} "
                f"greedy tokens differ by more than rounding: nothing is delivered"
            )
    write_atomic(folder / "README.md", model_card(job, summary, read_manifest(job.adapter.path), checks))
    return {"forms": [one.form for one in checks]}


def write_merged(job: DeliverJob, recovered: Any, folder: Path) -> None:
    """The recovered model as one checkpoint in the job's dtype, with the degraded model's tokenizer.

    recovered: a PEFT model, whose adapters are merged and gone afterwards.
    """
    whole = recovered.merge_and_unload()
    whole.save_pretrained(folder)
    load_tokenizer(job.degraded.path, job.degraded.revision).save_pretrained(folder)


if __name__ == "__main__":
    run_stage(DeliverJob, produce, resumable=False, description=__doc__ or "")
