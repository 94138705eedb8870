"""What counts as one benchmark: tasks by title, the level of chance, and which of them an average is over."""

from __future__ import annotations

from collections.abc import Iterable

from eval.config import MMLU, PAPER

TITLES = {
    "hellaswag": "HellaSwag",
    "mmlu": "MMLU",
    "mmlu_philosophy": "MMLU philosophy",
    "mmlu_management": "MMLU management",
    "mmlu_astronomy": "MMLU astronomy",
    "arc_challenge": "ARC-Challenge",
    "winogrande": "WinoGrande",
    "piqa": "PIQA",
    "openbookqa": "OpenBookQA",
    "boolq": "BoolQ",
    "arc_easy": "ARC-Easy",
    "sciq": "SciQ",
}
TWO_CHOICES = ("winogrande", "piqa", "boolq")


def chance(benchmark: str) -> float:
    """Accuracy of guessing."""
    return 1 / 2 if benchmark in TWO_CHOICES else 1 / 4


def benchmarks_of(tasks: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """{benchmark: its tasks} in the order of `tasks`; the subsets of MMLU make one benchmark, `mmlu`."""
    found: dict[str, tuple[str, ...]] = {}
    for task in tasks:
        name = "mmlu" if task in MMLU else task
        found[name] = (*found.get(name, ()), task)
    return found


def averaged(tasks: Iterable[str]) -> tuple[str, ...]:
    """The benchmarks of the average: those of the paper (section 5.2), or all where none of them is the paper's."""
    found = benchmarks_of(tasks)
    paper = benchmarks_of(PAPER)
    return tuple(name for name in found if name in paper) or tuple(found)


def weights_of(tasks: Iterable[str], benchmarks: Iterable[str]) -> dict[str, float]:
    """{task: weight} of the mean over `benchmarks`, each benchmark the mean of its tasks."""
    found = benchmarks_of(tasks)
    chosen = list(benchmarks)
    return {task: 1 / len(chosen) / len(found[name]) for name in chosen for task in found[name]}
