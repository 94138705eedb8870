"""The worked examples of docs/plan.md, as Markdown: all predicted, nothing is run.

python -m tests.benchmarks.plan_examples      # some minutes
"""

from __future__ import annotations

import sys
from dataclasses import replace

from launch.cluster import load_cluster
from launch.plan_task import Task, task_of
from launch.plan_text import duration, in_bytes
from launch.planner import cheapest, predictions
from launch.recipe import load_recipe
from recovery.artifacts import REPOSITORY

RECIPE = REPOSITORY / "launch" / "recipes" / "cluster" / "llama-3.1-8b.yaml"
SIZES, NODES = ("1b", "7b", "13b", "70b"), (1, 4, 16)

HEAD = (
    "model",
    "nodes",
    "recommended",
    "a device",
    "step",
    "of it sent",
    "tokens/s",
    "cache",
    "train",
    "disk",
    "device-hours",
)


def task_for(size: str, nodes: int) -> Task:
    shape = REPOSITORY / "launch" / "shapes" / f"llama-{size}"
    return task_of(load_recipe(RECIPE, [f"models.reference={shape}"]), load_cluster("mi300x"), nodes, None)


def example(task: Task, size: str, nodes: int) -> str:
    """One row: what is recommended."""
    best = cheapest(task, predictions(task))
    assert best is not None, f"nothing fits for {size} on {nodes} nodes"
    rate = task.recipe.train.batch_tokens / best.step.seconds
    share = best.step.communication / best.step.seconds
    cells = (
        size.upper(),
        str(nodes),
        str(best.layout),
        in_bytes(best.memory.peak),
        f"{best.step.seconds:.2g} s",
        f"{share:.0%}",
        f"{rate:,.0f}",
        duration(best.cache_s),
        duration(best.train_s),
        in_bytes(best.disk),
        f"{(best.cache_s + best.train_s) * task.devices / 3600:.2g}",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    print(f"| {' | '.join(HEAD)} |")
    print("|---|---:|---|" + "---:|" * (len(HEAD) - 3))
    for size in sys.argv[1:] or SIZES:
        first = task_for(size, NODES[0])
        for nodes in NODES:
            task = replace(task_for(size, nodes), rehearsals=first.rehearsals)
            print(example(task, size, nodes), flush=True)


if __name__ == "__main__":
    main()
