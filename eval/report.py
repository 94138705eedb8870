"""Report: the result of a run as a page, plots and `summary.json`.

    python -m eval.report JOB

Writes `report.html` (one page that holds its pictures) and `report.md`, `kl.png`, `accuracy.png` and `recovery.png`
(where there are benchmarks), `damage.png` (where the run made it), `summary.json` (keys that stay) and `metrics.jsonl`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eval.config import ReportJob
from eval.evidence import damage_of, gather, summarize
from eval.heatmap import plot_tensors
from eval.markdown import render
from eval.page import html_page
from eval.plots import plot_accuracy, plot_kl, plot_recovery
from eval.table import MODELS, tasks_of
from recovery.artifacts import Workspace
from recovery.files import write_atomic, write_json
from recovery.stage import run_stage
from recovery.tracking import Tracker, shown_files


def flat_metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a summary under tracking names; what is null is left out."""
    metrics: dict[str, float | None] = {
        "data/tokens_used": summary["tokens"],
        "data/tokens_generated": summary["tokens_generated"],
        "data/trainable_parameters": summary["trainable_parameters"],
    }
    for name in ("kl", "top1", "kl_contexts", "top1_contexts"):
        metrics |= {f"eval/{name}_{key}": value for key, value in (summary[name] or {}).items()}
    for name in ("ar_percent", "ar_percent_measurable"):
        for key in ("value", "low", "high", "gap", "gap_se"):
            metrics[f"eval/{name}{'' if key == 'value' else f'_{key}'}"] = summary[name][key]
    for task in tasks_of(summary):
        for model in MODELS:
            metrics[f"eval/{model}_{task}_acc"] = summary["tasks"][task][model]["acc"]
    metrics |= {f"perf/seconds_{stage}": spent for stage, spent in summary["seconds"].items()}
    return {name: float(value) for name, value in metrics.items() if value is not None}


def produce(job: ReportJob, workspace: Workspace) -> dict[str, Any]:
    folder = workspace.path
    evidence = gather(job)
    summary = summarize(job, evidence)
    write_json(folder / "summary.json", summary)
    plot_kl(evidence.history, evidence.held_out, summary, folder / "kl.png")
    if (damage := damage_of(evidence)) is not None:
        plot_tensors(damage, "Change of every tensor, relative L2", folder / "damage.png")
    if job.tasks:
        plot_accuracy(summary, folder / "accuracy.png")
        plot_recovery(summary, folder / "recovery.png")
    text = render(job, evidence, summary)
    write_atomic(folder / "report.md", text)
    write_atomic(folder / "report.html", html_page(job.name, text, folder))
    with Tracker(job.runtime.tracking, folder / "metrics.jsonl") as tracker:
        step = max((line["step"] for line in evidence.history), default=0)
        tracker.metrics(flat_metrics(summary), step)
        for path in shown_files(folder):
            tracker.artifact(path, "report")
    return {"kl": summary["kl"], "ar_percent": summary["ar_percent"]}


if __name__ == "__main__":
    run_stage(ReportJob, produce, resumable=False, description=__doc__ or "")
