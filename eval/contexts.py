"""Contexts: the text of benchmark items, for measuring how far recovery on synthetic text carries over.

    python -m eval.contexts JOB

KL and top-1 agreement are measured on these texts during training and at the end. Nothing is ever trained on them:
they are written as a corpus that has a held-out split only. They hold prompts, no answers.
"""

from __future__ import annotations

from itertools import takewhile
from typing import Any

from eval.config import ContextsJob
from eval.tasks import Items, load_items
from recovery.artifacts import Workspace
from recovery.corpus import SUMMARY, Sample, write_shard
from recovery.corpus_statistics import summarize
from recovery.files import write_json
from recovery.sources import load_tokenizer
from recovery.stage import run_stage


def shares(count: int, tasks: tuple[str, ...]) -> dict[str, int]:
    """`count` contexts spread evenly over the tasks; the first ones get what does not divide."""
    each, rest = divmod(count, len(tasks))
    return {task: each + (position < rest) for position, task in enumerate(tasks)}


def context_text(items: Items, position: int) -> str:
    """What is shown before the answer. Where each choice has a prompt of its own (WinoGrande fills the choice into a
    sentence), the words that all of them begin with."""
    prompt = items.prompt(position)
    if isinstance(prompt, str):
        return prompt
    letters = zip(*prompt, strict=False)
    shared = "".join(letter for letter, *_ in takewhile(lambda column: len(set(column)) == 1, letters))
    return shared.rpartition(" ")[0] or prompt[0]


def produce(job: ContextsJob, workspace: Workspace) -> dict[str, Any]:
    tokenizer = load_tokenizer(job.tokenizer.path, job.tokenizer.revision)
    data_dir = job.data.path if job.data is not None else None
    rows: list[list[int]] = []
    counts: dict[str, int] = {}
    for name, share in shares(job.count, job.tasks).items():
        if not share:
            continue
        items = load_items(name, job.seed, share, data_dir)
        counts[name] = len(items.documents)
        # The tokenizer puts its beginning of text in front where that is its habit, as lm-eval lets it.
        texts = [context_text(items, position) for position in range(len(items.documents))]
        rows += [tokenizer(text).input_ids[: job.context_tokens] for text in texts]
    samples = [Sample(index, job.seed, ids[0], "length", tuple(ids)) for index, ids in enumerate(rows)]
    write_shard(workspace.path / "held_out" / "shard-00000.parquet", samples)
    start = tokenizer.bos_token_id
    skip = int(start is not None and all(ids[0] == start for ids in rows))
    summary = summarize(rows, 0)
    write_json(workspace.path / SUMMARY, {"skip": skip, "tasks": counts, "held_out": summary})
    return {"tokens": summary["tokens"], "samples": len(rows)}


if __name__ == "__main__":
    run_stage(ContextsJob, produce, resumable=False, description=__doc__ or "")
