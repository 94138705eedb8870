"""Evaluate: benchmark scores of one model with lm-eval's tasks, and its divergence from the reference.

    python -m eval.evaluate JOB

Writes `items/<task>.json` (every item's outcome, as soon as the task is done), `scores.json` and, for a model that is
not the reference, `divergence.json`. A restart goes on with the tasks that are missing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.benchmarks import averaged, weights_of
from eval.config import Divergence, EvaluateJob
from eval.tasks import Items, load_items
from recovery.artifacts import Workspace
from recovery.corpus import check_ids, read_split
from recovery.files import read_json, write_json
from recovery.sources import is_gguf, load_tokenizer
from recovery.stage import run_stage

if TYPE_CHECKING:
    from recovery.measure import HeldOut

log = logging.getLogger("recover-lora")

CPU_BATCH_TOKENS = 1024
DEVICE_BATCH_TOKENS = 8192
DIVERGENCE = "divergence.json"
MEASURE_TOKENS = 2048
"""Tokens of one forward pass when the divergence is measured."""

Item = dict[str, Any]
"""One line of evidence: doc_id (row in the split), doc_hash, acc and acc_norm (0 or 1; null where undefined)."""


def score_items(items: Items, model: Any, tokenizer: Any, batch_tokens: int) -> list[Item]:
    """Every item's outcome: lm-eval's requests and metrics, our batching."""
    from lm_eval.utils import handle_non_serializable, hash_string

    from eval.scoring import ChoiceScorer

    task: Any = items.task
    name = str(task.config.task)
    requests = [
        task.construct_requests(doc=document, ctx=items.prompt(position), metadata=(name, position, 1))
        for position, document in enumerate(items.documents)
    ]
    scorer = ChoiceScorer(model, tokenizer, batch_tokens, name)
    answers = iter(scorer.loglikelihood([request for group in requests for request in group], disable_tqdm=True))
    records: list[Item] = []
    for doc_id, document, group in zip(items.doc_ids, items.documents, requests, strict=True):
        metrics = task.process_results(document, [next(answers) for _ in group])
        text = json.dumps(document, indent=2, default=handle_non_serializable, ensure_ascii=False)
        norm = metrics.get("acc_norm")
        records.append(
            {
                "doc_id": doc_id,
                "doc_hash": hash_string(text),
                "acc": int(metrics["acc"]),
                "acc_norm": None if norm is None else int(norm),
            }
        )
    return records


def summarize(items: dict[str, list[Item]]) -> dict[str, Any]:
    """{task: {acc, acc_stderr, acc_norm, n}} as fractions, and `average`: the mean over the paper's benchmarks, MMLU
    counted once as the mean of its subsets (section 5.2); null without any."""
    scores: dict[str, Any] = {}
    for name, records in items.items():
        acc = np.array([record["acc"] for record in records], dtype=float)
        norm = [record["acc_norm"] for record in records]
        scores[name] = {
            "acc": float(acc.mean()),
            "acc_stderr": float(acc.std(ddof=1) / np.sqrt(len(acc))) if len(acc) > 1 else None,
            "acc_norm": None if None in norm else float(np.mean(norm)),
            "n": len(acc),
        }
    weights = weights_of(items, averaged(items))
    average = sum(weight * scores[name]["acc"] for name, weight in weights.items())
    return {**scores, "average": average if weights else None}


def remember_reference(job: EvaluateJob, divergence: Divergence) -> tuple[dict[str, HeldOut], int]:
    """The reference's part of the divergence, and the width of the vocabularies. It runs before the model is loaded:
    the device holds one of them at a time.

    Raises UserError when the vocabularies differ.
    """
    from recovery.measure import remember
    from recovery.models import load_model
    from recovery.vocabulary import load_vocabulary, used_width

    given = divergence.reference
    width = used_width(load_vocabulary(given.path, given.revision), load_vocabulary(job.model.path, job.model.revision))
    reference = load_model(given, job.dtype)
    texts = {}
    for name, text in (("held_out", divergence.corpus), ("contexts", divergence.contexts)):
        if text is not None:
            tokens = read_split(text.path, "held_out")
            check_ids(tokens, width, str(text.path))
            texts[name] = remember(reference, tokens, width, MEASURE_TOKENS, f"reference on {name}")
    return texts, width


def measure_divergence(texts: Mapping[str, HeldOut], width: int, model: Any) -> dict[str, Any]:
    """KL to the reference, top-1 agreement and perplexity on held-out synthetic text and on benchmark contexts."""
    from recovery.measure import measure_on

    results: dict[str, Any] = {"held_out": None, "contexts": None}
    for name, text in texts.items():
        results[name] = asdict(measure_on(text, model, width, f"KL on {name}"))
        log.info("%s: KL %.4f, top-1 agreement %.1f%%", name, results[name]["kl"], 100 * results[name]["top1"])
    return results


def produce(job: EvaluateJob, workspace: Workspace) -> dict[str, Any]:
    from recovery.adapters import load_adapter
    from recovery.models import device, load_model

    # Whatever the data lack is told before a model is loaded.
    data_dir = job.data.path if job.data is not None else None
    chosen = {name: load_items(name, job.seed, job.limit, data_dir) for name in job.tasks}
    if not chosen and job.divergence is None:  # the reference, where nothing is scored
        write_json(workspace.path / "scores.json", summarize({}))
        return {"splits": {}}
    missing = job.divergence is not None and not (workspace.path / DIVERGENCE).exists()
    compared = remember_reference(job, job.divergence) if job.divergence is not None and missing else None
    model = load_model(job.model, job.dtype)
    if job.adapter is not None:
        model = load_adapter(model, job.adapter.path)
    if compared is not None:
        write_json(workspace.path / DIVERGENCE, measure_divergence(*compared, model))
        workspace.tick()
        del compared
    # A GGUF file has the reference's tokens, which was checked, but transformers may read its tokenizer otherwise.
    given = job.divergence.reference if job.divergence is not None and is_gguf(job.model.path) else job.model
    tokenizer = load_tokenizer(given.path, given.revision)
    batch_tokens = job.batch_tokens or (CPU_BATCH_TOKENS if device().type == "cpu" else DEVICE_BATCH_TOKENS)
    folder = workspace.path / "items"
    folder.mkdir(exist_ok=True)
    for name, items in chosen.items():
        if not (folder / f"{name}.json").exists():
            write_json(folder / f"{name}.json", score_items(items, model, tokenizer, batch_tokens))
            workspace.tick()
    scores = summarize({name: read_json(folder / f"{name}.json") for name in job.tasks})
    write_json(workspace.path / "scores.json", scores)
    if job.tasks:
        log.info("average accuracy %.1f%% over %d tasks", 100 * scores["average"], len(job.tasks))
    return {"splits": {name: items.split for name, items in chosen.items()}, "batch_tokens": batch_tokens}


if __name__ == "__main__":
    run_stage(EvaluateJob, produce, resumable=True, description=__doc__ or "")
