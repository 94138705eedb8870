"""What a report is made from: the finished artifacts of a run, read together and reduced to `summary.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from eval.accuracy import NOTHING, Outcomes, align, kl_recovery, recovery, resample_tasks
from eval.benchmarks import averaged, benchmarks_of, weights_of
from eval.config import ReportJob
from eval.table import MODELS
from recovery.artifacts import read_manifest
from recovery.config import ForwardKL, ModelInput
from recovery.corpus import SUMMARY
from recovery.files import HELD_OUT, HISTORY, read_json, read_lines
from recovery.placement import skeleton

PLAIN = ForwardKL().model_dump()
"""The loss whose values are KLs as the measurements are."""


@dataclass(frozen=True)
class Evidence:
    manifests: dict[str, dict[str, Any]]
    """By stage: generate, those of degrade, contexts, repair and train that there were; `scores/<model>`."""
    corpus: dict[str, Any]
    scores: dict[str, dict[str, Any]]
    divergence: dict[str, dict[str, Any]]
    """Of the degraded and the recovered model: {held_out: Measurement, contexts: Measurement or null}."""
    outcomes: dict[str, Outcomes]
    history: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    tokens_generated: int

    @property
    def adapter(self) -> dict[str, Any]:
        """The manifest of the adapter that was scored: of training, or of the closed form where there was none."""
        return self.manifests["train" if "train" in self.manifests else "repair"]


def gather(job: ReportJob) -> Evidence:
    """Read everything. Raises UserError when the three models were not scored on the same items."""
    scores = {model: getattr(job.scores, model).path for model in MODELS}
    stages = {"degrade": job.degrade, "generate": job.corpus, "contexts": job.contexts, "repair": job.repair}
    if job.adapter != job.repair:
        stages["train"] = job.adapter
    manifests = {name: read_manifest(given.path) for name, given in stages.items() if given is not None}
    manifests |= {f"scores/{model}": read_manifest(path) for model, path in scores.items()}
    outcomes = {
        task: align(
            f"scores of {task}",
            *(read_json(scores[model] / "items" / f"{task}.json") for model in MODELS),
        )
        for task in job.tasks
    }
    return Evidence(
        manifests,
        read_json(job.corpus.path / SUMMARY),
        {model: read_json(path / "scores.json") for model, path in scores.items()},
        {model: read_json(scores[model] / "divergence.json") for model in MODELS[1:]},
        outcomes,
        read_lines(job.adapter.path / HISTORY),
        read_lines(job.adapter.path / HELD_OUT),
        count_tokens(job.corpus.path),
    )


def damage_of(evidence: Evidence) -> dict[str, float] | None:
    """The relative L2 of every changed tensor, by name, where this run made the damage."""
    if "degrade" not in evidence.manifests:
        return None
    tensors = evidence.manifests["degrade"]["details"]["tensors"]
    return {name: change["relative_l2"] for name, change in tensors.items()}


def count_tokens(corpus: Path) -> int:
    """Tokens of all splits, from the shards' length columns alone."""
    return sum(
        sum(pq.read_table(path, columns=["length"])["length"].to_pylist()) for path in corpus.glob("*/shard-*.parquet")
    )


def summarize(job: ReportJob, evidence: Evidence) -> dict[str, Any]:
    """`summary.json`: its keys are relied on by others and stay. Accuracies, gaps and top-1 agreement are fractions,
    KL is in nats per token, AR% is a percentage."""
    outcomes, scores = evidence.outcomes, evidence.scores
    draws = resample_tasks(outcomes, job.bootstrap, job.seed)
    tasks: dict[str, Any] = {}
    for benchmark, members in benchmarks_of(job.tasks).items():
        for name, parts in {benchmark: members, **{member: (member,) for member in members}}.items():
            entry: dict[str, Any] = {model: _mean_score(scores[model], parts) for model in MODELS}
            entry["n"] = sum(scores["reference"][part]["n"] for part in parts)
            entry["ar_percent"] = asdict(recovery(outcomes, draws, dict.fromkeys(parts, 1 / len(parts))))
            tasks[name] = entry
    found = benchmarks_of(job.tasks)
    certain = [name for name in found if tasks[name]["ar_percent"]["measurable"]]
    passing = recovery(outcomes, draws, weights_of(job.tasks, certain)) if certain else NOTHING
    details = evidence.adapter["details"]
    summary: dict[str, Any] = {
        "ar_percent": asdict(
            recovery(outcomes, draws, weights_of(job.tasks, averaged(job.tasks))) if job.tasks else NOTHING
        ),
        "ar_percent_measurable": {**asdict(passing), "tasks": certain},
        "tasks": tasks,
        "tokens": tokens_of(evidence),
        "tokens_generated": evidence.tokens_generated,
        "trainable_parameters": int(details["trainable_parameters"]),
        "model_parameters": parameters_of(job.reference),
        "tokens_per_sample": evidence.corpus["train"]["length"]["mean"],
        "seconds": seconds(evidence.manifests),
    }
    for suffix, text in (("", "held_out"), ("_contexts", "contexts")):
        summary |= _divergence(job, evidence, text, suffix)
    if summary["kl"] is not None:
        summary["kl"]["learned"] = learned_kl(evidence)
    summary["closed_form"] = _closed_form(job, summary)
    return summary


def tokens_of(evidence: Evidence) -> int:
    """All that were passed over: of training, all epochs, and of the closed form before it."""
    details = evidence.adapter["details"]
    return int(details["loss_tokens"]) + int(details.get("calibration_tokens", 0))


def learned_kl(evidence: Evidence) -> float | None:
    """Mean KL over the tokens of the last epoch, nats, each before its step's update.

    None where the loss was not plain KL to the reference, the text not the corpus, that epoch the text's first, or the
    delivered state an earlier one.
    """
    job, details = evidence.adapter["job"], evidence.adapter["details"]
    training = job.get("train")
    if training is None or training["epochs"] < 2 or job["labelled"] is not None:
        return None
    if training["loss"] != PLAIN or job["teacher"]["kind"] == "sparse_logits":
        return None
    first = details["steps"] - round(details["steps"] / training["epochs"])
    lines = [line for line in evidence.history if first < line["step"] <= details["best_step"]]
    tokens = sum(line["loss_tokens"] for line in lines)
    return sum(line["loss"] * line["loss_tokens"] for line in lines) / tokens if tokens else None


def parameters_of(model: ModelInput) -> int:
    """Of the whole model, from its config alone; tied ones once."""
    return sum(parameter.numel() for parameter in skeleton(model.path, model.revision).parameters())


def _closed_form(job: ReportJob, summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result before training, on held-out text; null without a closed form."""
    if job.repair is None:
        return None
    line = read_lines(job.repair.path / HELD_OUT)[-1]
    degraded = (summary["kl"] or {}).get("degraded")
    return {"kl": line["kl"], "top1": line["top1"], "recovery": 1 - line["kl"] / degraded if degraded else None}


def _mean_score(scores: Mapping[str, Any], parts: tuple[str, ...]) -> dict[str, float | None]:
    """acc and acc_norm of the mean over tasks, and the standard error of acc."""
    errors = [scores[part]["acc_stderr"] for part in parts]
    norms = [scores[part]["acc_norm"] for part in parts]
    return {
        "acc": sum(scores[part]["acc"] for part in parts) / len(parts),
        "acc_stderr": None if None in errors else sum(error**2 for error in errors) ** 0.5 / len(parts),
        "acc_norm": None if None in norms else sum(norms) / len(parts),
    }


def _divergence(job: ReportJob, evidence: Evidence, text: str, suffix: str) -> dict[str, Any]:
    degraded, recovered = (evidence.divergence[model][text] for model in MODELS[1:])
    if degraded is None or recovered is None:
        return {f"kl{suffix}": None, f"top1{suffix}": None}
    share = low = high = None
    if degraded["kl"] > 0:
        share = 1 - recovered["kl"] / degraded["kl"]
        low, high = kl_recovery(degraded["by_sample"], recovered["by_sample"], job.bootstrap, job.seed)
    return {
        f"kl{suffix}": {
            "degraded": degraded["kl"],
            "recovered": recovered["kl"],
            "recovery": share,
            "low": low,
            "high": high,
        },
        f"top1{suffix}": {"degraded": degraded["top1"], "recovered": recovered["top1"]},
    }


def seconds(manifests: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """What each stage took when its artifact was made; `evaluate` is all three models."""
    spent: dict[str, float] = {}
    for name, manifest in manifests.items():
        stage = "evaluate" if name.startswith("scores/") else name
        spent[stage] = round(spent.get(stage, 0.0) + float(manifest["seconds"]), 3)
    return spent
