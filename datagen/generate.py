"""Generate: a synthetic corpus of token ids, hybrid-sampled from the reference.

    python -m datagen.generate JOB

A sample depends on (seed, split, index, model, settings) only. Shards are written whole and never touched again, so a
restart fills in just the missing ones and ends with the same corpus.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast, get_args

from datagen.config import GenerateJob
from datagen.embedded import EmbeddedEngine
from datagen.sampling import SamplingPlan, bos_id, eligible_ids, stop_ids
from recovery.artifacts import Workspace
from recovery.corpus import SUMMARY, TOKENIZER, Split, describe_split, read_rows, write_shard
from recovery.errors import DamagedArtifact
from recovery.files import write_json
from recovery.models import load_model, quiet_libraries
from recovery.progress import progress
from recovery.stage import run_stage

log = logging.getLogger("recover-lora")


def ranges(count: int, size: int) -> list[range]:
    """Indices 0..count-1 in ranges of `size`. The last one is decoded whole too and cut afterwards, so that a smaller
    corpus is a prefix of a larger one, bit for bit."""
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def is_finished(shard: Path, wanted: range) -> bool:
    """Whether an earlier process left this shard whole. One that cannot be read is made again."""
    if not shard.exists():
        return False
    try:
        return [row["index"] for row in read_rows(shard)] == list(wanted)
    except DamagedArtifact:
        log.warning("%s is damaged and is made again", shard.name)
        return False


def fill(workspace: Workspace, split: Split, count: int, engine: EmbeddedEngine, plan: SamplingPlan) -> None:
    """Write the missing shards of one split."""
    settings = cast(GenerateJob, workspace.job).generate
    todo = []
    for number, wanted in enumerate(ranges(count, settings.batch_samples)):
        shard = workspace.path / split / f"shard-{number:05d}.parquet"
        if not is_finished(shard, wanted):
            todo.append((shard, wanted))
    done = count - sum(len(wanted) for _, wanted in todo)
    if done and todo:
        log.info("%s: %d of %d samples are there already", split, done, count)
    size = settings.batch_samples * settings.max_length
    bar = progress(len(todo) * size, "tok", f"generate {split}")
    for shard, wanted in todo:
        whole = range(wanted.start, wanted.start + settings.batch_samples)
        decoded = 0

        def on_tokens(tokens: int) -> None:
            nonlocal decoded
            decoded += tokens
            bar.update(tokens)

        samples = engine.decode([plan.start(index) for index in whole], on_tokens)
        write_shard(shard, samples[: len(wanted)])
        workspace.tick()
        # Samples that ended early leave the bar short of its estimate.
        bar.total -= size - decoded
        bar.refresh()
    bar.close()


def produce(job: GenerateJob, workspace: Workspace) -> dict[str, Any]:
    from transformers import AutoTokenizer

    quiet_libraries()
    settings = job.generate
    tokenizer: Any = AutoTokenizer.from_pretrained(job.model.path, revision=job.model.revision)
    model = load_model(job.model, job.dtype)
    width = min(max(tokenizer.get_vocab().values()) + 1, model.config.get_text_config().vocab_size)
    bos = bos_id(tokenizer, settings.bos)
    stops = stop_ids(model.config, model.generation_config, tokenizer)
    engine = EmbeddedEngine(model, settings, width, bos, stops)
    eligible = eligible_ids(tokenizer, width)
    counts: dict[Split, int] = {"train": settings.samples, "held_out": settings.held_out_samples}
    for split in get_args(Split):
        fill(workspace, split, counts[split], engine, SamplingPlan(job.seed, split, eligible))
    tokenizer.save_pretrained(workspace.path / TOKENIZER)
    summary: dict[str, Any] = {split: describe_split(workspace.path / split) for split in get_args(Split)}
    summary.update(skip=0 if bos is None else 1, bos_token_id=bos, eligible_start_tokens=len(eligible))
    write_json(workspace.path / SUMMARY, summary)
    train = summary["train"]
    log.info(
        "%d samples, %d tokens, mean length %.1f, end of text %.1f%%, distinct 2-grams %.0f%%, repeated 4-grams %.1f%%",
        *(train["samples"], train["tokens"], train["length"]["mean"], 100 * train["end_of_text_rate"]),
        *(100 * (train["distinct_2"] or 0), 100 * (train["repeats_4"] or 0)),
    )
    return {
        "tokens": train["tokens"] + summary["held_out"]["tokens"],
        "batch_invariant": False,
        "engine": settings.engine,
    }


if __name__ == "__main__":
    run_stage(GenerateJob, produce, resumable=True, description=__doc__ or "")
