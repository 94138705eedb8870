"""The result as a plain-text table, for the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eval.benchmarks import TITLES, averaged, benchmarks_of
from eval.config import KNOWN

MODELS = ("reference", "degraded", "recovered")
ENOUGH = 0.9
HEADER = ("", *MODELS, "recovery")


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction as a percentage."""
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def recovery_text(result: Mapping[str, Any]) -> str:
    """AR% with its interval, or why there is none."""
    if result["measurable"]:
        return f"AR {result['value']:.0f} % [{result['low']:.0f}, {result['high']:.0f}]"
    if result["gap"] is None:
        return "not measurable"
    error = "?" if result["gap_se"] is None else f"{100 * result['gap_se']:.1f}"
    return f"not measurable (gap {100 * result['gap']:.1f} ± {error} points)"


def kl_share(kl: Mapping[str, Any]) -> str:
    """KL recovery with its interval."""
    shown = percent(kl["recovery"])
    return shown if kl["low"] is None else f"{shown} [{100 * kl['low']:.1f}, {100 * kl['high']:.1f}]"


def verdict(summary: Mapping[str, Any]) -> str:
    """One sentence for those who read no table: what came back, and where to look for the rest.

    Recovered: at least nine tenths of the KL, and of the accuracy where its loss can be measured. Not recovered: less
    than nothing is within the interval of the KL's share, or the accuracy itself is no better than the degraded one's.
    """
    kl, certain, top = summary["kl"], summary["ar_percent_measurable"], summary["kl_contexts"]
    if kl is None or kl["recovery"] is None:
        return "**Nothing to recover**: on held-out text the degraded model says what the reference says."
    accuracy = certain["value"] if certain["tasks"] else None
    found = f"{kl_share(kl)} of the KL came back"
    if accuracy is not None:
        found += f", and {accuracy:.0f} % [{certain['low']:.0f}, {certain['high']:.0f}] of the accuracy"
    elif summary["tasks"]:
        found += "; no benchmark's loss of accuracy is large enough to be measured"
    if kl["recovery"] >= ENOUGH and (accuracy is None or accuracy >= 100 * ENOUGH):
        return f"**Recovered**: {found}."
    lost = (kl["low"] if kl["low"] is not None else kl["recovery"]) <= 0 or (accuracy is not None and accuracy <= 0)
    why = "`recover-lora diagnose --run RECIPE` splits what is left: rank and training, text, placement"
    if lost and kl["recovery"] > 0:
        why = f"the accuracy follows once the KL is below 1, and it is {kl['recovered']:.2f}; {why}"
        if kl["recovered"] < 1 and top is not None and top["recovery"] is not None:
            why = f"on the benchmarks' own text {percent(top['recovery'])} of the KL came back; {why}"
    return f"**{'Not' if lost else 'Partly'} recovered**: {found}. Why: {why}."


def average_row(summary: Mapping[str, Any], benchmarks: list[str], title: str, result: Mapping[str, Any]) -> list[str]:
    tasks = summary["tasks"]
    means = [sum(tasks[name][model]["acc"] for name in benchmarks) / len(benchmarks) for model in MODELS]
    return [title, *map(percent, means), recovery_text(result)]


def tasks_of(summary: Mapping[str, Any]) -> list[str]:
    """The tasks that were scored, in the suite's order (JSON files are sorted by key)."""
    return [task for task in KNOWN if task in summary["tasks"]]


def divergence_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for suffix, where in (("", "held-out text"), ("_contexts", "benchmark text")):
        if (kl := summary[f"kl{suffix}"]) is None:
            continue
        top1 = summary[f"top1{suffix}"]
        share = f"{kl_share(kl)} of the KL"
        rows.append([f"KL, {where}", "0", f"{kl['degraded']:.3f}", f"{kl['recovered']:.3f}", share])
        if not suffix and (before := summary.get("closed_form")) is not None:
            share = f"{percent(before['recovery'])} of the KL"
            rows.append(["    closed form alone", "", "", f"{before['kl']:.3f}", share])
        rows.append([f"top-1, {where}", "100.0 %", percent(top1["degraded"]), percent(top1["recovered"]), ""])
    return rows


def benchmark_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """One row a benchmark, then the paper's average and the average over the measurable ones."""
    tasks = summary["tasks"]
    scored = tasks_of(summary)
    rows = []
    for name, members in benchmarks_of(scored).items():
        title = TITLES[name] if len(members) == 1 else f"{TITLES[name]} ({len(members)} subsets)"
        accuracies = [percent(tasks[name][model]["acc"]) for model in MODELS]
        rows.append([title, *accuracies, recovery_text(tasks[name]["ar_percent"])])
    if not scored:
        return rows
    whole = list(averaged(scored))
    rows.append(average_row(summary, whole, f"paper's average ({len(whole)})", summary["ar_percent"]))
    certain = summary["ar_percent_measurable"]
    if certain["tasks"]:
        rows.append(average_row(summary, certain["tasks"], f"measurable average ({len(certain['tasks'])})", certain))
    return rows


def terminal_table(summary: Mapping[str, Any]) -> str:
    """Aligned text: KL and top-1 agreement first, then benchmarks with AR%, then tokens and parameters."""
    first, second = divergence_rows(summary), benchmark_rows(summary)
    widths = [max(len(row[column]) for row in (HEADER, *first, *second)) for column in range(len(HEADER))]

    def line(row: list[str] | tuple[str, ...]) -> str:
        numbers = [cell.rjust(width) for cell, width in zip(row[1:4], widths[1:4], strict=True)]
        return "  ".join([row[0].ljust(widths[0]), *numbers, row[4]]).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    rows = [line(HEADER), rule, *map(line, first), *([rule, *map(line, second)] if second else []), rule]
    rows.append(f"tokens used           {summary['tokens']:,} (generated: {summary['tokens_generated']:,})")
    rows.append(f"trainable parameters  {summary['trainable_parameters']:,}")
    return "\n".join(rows)
