"""Deliver: an adapter as those who deploy it take it, with a model card; every form is loaded again and compared.

    python -m eval.deliver JOB

Writes the PEFT adapter, `README.md` (the model card), `summary.json`, `checks.json`; `uniform/`, the same adapter with
one rank, where it has several and adapts modules alone, as vLLM takes it; and, where asked for, `merged/`, the whole
recovered model, and `gguf/model.gguf`. Where asked for, a vLLM server of the adapter is compared too. A form whose KL
is not the scored one, or whose greedy tokens differ by more than rounding, fails the stage, and nothing is delivered.
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
from eval.gguf import write_gguf
from eval.served import Server, compare_served
from recovery.adapters import CONFIG, WEIGHTS, load_adapter, ranks_in, write_uniform
from recovery.artifacts import Workspace, read_manifest
from recovery.config import ModelInput
from recovery.corpus import Tokens, read_split
from recovery.errors import Unavailable
from recovery.files import read_json, write_atomic, write_json
from recovery.measure import measure_on, remember
from recovery.models import device, load_model
from recovery.sources import load_tokenizer
from recovery.stage import run_stage
from recovery.vocabulary import load_vocabulary, used_width

log = logging.getLogger("recover-lora")
UNIFORM = "uniform"
GGUF_FILE = "gguf/model.gguf"
"""In a folder of its own: beside adapter_config.json transformers would take the adapter's base for the model."""
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
    # One model at a time is on the device.
    reference = load_model(job.reference, job.dtype)
    remembered = remember(reference, text, width, MEASURE_TOKENS, "reference")
    expected = next_logits(reference, text, width) if job.served else []
    del reference

    def with_adapter(at: Path) -> Any:
        return load_adapter(load_model(job.degraded, job.dtype), at)

    def check(form: str, model: Any, logits: list[Tensor], adapted: list[Tensor]) -> Check:
        kl = measure_on(remembered, model, width, f"KL of {form}").kl
        found = Check(form, kl, scored, *compare_greedy(adapted, logits, ROUNDING[job.dtype]))
        differ = f"{found.tokens_different} of {found.tokens_compared} greedy tokens differ"
        log.info("%s: KL %.4f, scored %.4f; %s", form, kl, scored, differ)
        return found

    recovered = with_adapter(folder)
    adapted = next_logits(recovered, text, width)
    checks = [check("adapter", recovered, adapted, adapted)]
    del recovered
    if ranks_in(folder) is not None and not config.get("target_parameters"):  # of which vLLM has no adapters
        write_uniform(folder, folder / UNIFORM)
        uniform = with_adapter(folder / UNIFORM)
        checks.append(check("uniform", uniform, next_logits(uniform, text, width), adapted))
        del uniform
    if job.served:
        checks.append(check_served(job, text, adapted, expected, checks[0].kl, scored))
    if job.merged or job.gguf:
        merged = folder / "merged"
        write_merged(job, with_adapter(folder), merged)
        if job.merged:
            whole = load_model(ModelInput(path=str(merged), digest=""), job.dtype)
            checks.append(check("merged", whole, next_logits(whole, text, width), adapted))
            del whole
        if job.gguf:
            assert job.runtime.llama_cpp is not None
            write_gguf(merged, folder / GGUF_FILE, job.runtime.llama_cpp, job.dtype)
            unpacked = load_model(ModelInput(path=str(folder / GGUF_FILE), digest=""), job.dtype)
            checks.append(check("gguf", unpacked, next_logits(unpacked, text, width), adapted))
        if not job.merged:
            shutil.rmtree(merged)
    write_json(folder / "checks.json", [asdict(one) for one in checks])
    for one in checks:
        if not one.holds:
            raise Unavailable(
                f"{one.form}, loaded again: KL {one.kl:.4f}, scored was {one.scored_kl:.4f}; {one.beyond_rounding} "
                f"greedy tokens differ by more than rounding: nothing is delivered"
            )
    generator = ModelInput(**read_manifest(job.corpus.path)["job"]["model"])
    write_atomic(folder / "README.md", model_card(job, summary, read_manifest(job.adapter.path), generator, checks))
    return {"forms": [one.form for one in checks]}


def check_served(
    job: DeliverJob, text: Tokens, adapted: list[Tensor], reference: list[Tensor], kl: float, scored: float
) -> Check:
    """The adapter on the job's server. adapted, reference: logits of the first samples. kl: of the adapter under PEFT.

    The server names a few log-probabilities of a place, so its KL is PEFT's and what these differ by.
    """
    assert job.runtime.server is not None
    server = Server(job.runtime.server, job.runtime.served_name, job.runtime.api_key_env)
    server.check_name()
    extra, places, different, beyond = 0.0, 0, 0, 0
    for row, (ours, theirs) in enumerate(zip(adapted, reference, strict=True)):
        answer = server.largest([int(token) for token in text.row(row)])
        found = compare_served(answer, ours[: len(answer)], theirs[: len(answer)], ROUNDING[job.dtype])
        extra += found[0] * found[1]
        places, different, beyond = places + found[1], different + found[2], beyond + found[3]
    served = Check("vllm", kl + extra / places, scored, places, different, beyond)
    log.info("vllm: KL %.4f, scored %.4f; %d of %d greedy tokens differ", served.kl, scored, different, places)
    return served


def write_merged(job: DeliverJob, recovered: Any, folder: Path) -> None:
    """The recovered model as one checkpoint in the job's dtype, with the degraded model's tokenizer.

    recovered: a PEFT model, whose adapters are merged and gone afterwards.
    """
    whole = recovered.merge_and_unload()
    whole.save_pretrained(folder)
    load_tokenizer(job.degraded.path, job.degraded.revision).save_pretrained(folder)


if __name__ == "__main__":
    run_stage(DeliverJob, produce, resumable=False, description=__doc__ or "")
