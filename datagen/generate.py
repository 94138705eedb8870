"""Generate: a synthetic corpus of token ids, hybrid-sampled from the reference.

    python -m datagen.generate JOB

A sample depends on (seed, split, index, model, settings) only. Finished samples are never asked for again, so a
restart fills in just the missing ones and ends with the same corpus.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np
from numpy.typing import NDArray

from datagen.config import BosMode, Generate, GenerateJob
from datagen.known import known_corpora
from datagen.pieces import Pieces, blocks_of, drop_damaged, is_shard_of, locate, seal, seal_known, shard_samples
from datagen.sampling import SamplingPlan, bos_id, eligible_ids, stop_ids
from datagen.served import ServedEngine, Vocabulary, agreeing
from recovery.artifacts import Workspace
from recovery.config import ModelInput
from recovery.corpus import SUMMARY, TOKENIZER, Sample, Split, Tokens, shards_of, tokens_of, write_shard
from recovery.corpus_statistics import describe_split
from recovery.files import write_json
from recovery.progress import progress
from recovery.sources import load_tokenizer, pretrained
from recovery.stage import run_stage
from recovery.tracking import Tracker

if TYPE_CHECKING:
    from datagen.embedded import EmbeddedEngine

log = logging.getLogger("recover-lora")
PIECES = ".pieces"


def load_sampling_vocabulary(model: ModelInput, bos_mode: BosMode) -> Vocabulary:
    """What sampling needs to know of the generating model, from its small files alone."""
    from transformers import AutoConfig, GenerationConfig

    place, arguments = pretrained(model.path, model.revision)
    tokenizer = load_tokenizer(model.path, model.revision)
    config = AutoConfig.from_pretrained(place, **arguments)
    try:
        generation = GenerationConfig.from_pretrained(place, revision=model.revision or "main")
    except OSError:  # it has none
        generation = GenerationConfig.from_model_config(config)
    width = min(max(tokenizer.get_vocab().values()) + 1, config.get_text_config().vocab_size)
    bos = bos_id(tokenizer, bos_mode)
    return Vocabulary(tokenizer, bos, stop_ids(config, generation, tokenizer), width, eligible_ids(tokenizer, width))


def wanted_of(job: GenerateJob) -> dict[Split, range]:
    """The indices of each split that this job makes."""
    settings = job.generate
    counts: dict[Split, int] = {"held_out": settings.held_out_samples, "train": settings.samples}
    if job.partition is None:
        return {split: range(count) for split, count in counts.items()}
    return {split: job.partition.indices(count) for split, count in counts.items()}


def fill_embedded(
    workspace: Workspace, split: Split, wanted: range, engine: EmbeddedEngine, plan: SamplingPlan, known: list[Path]
) -> None:
    """Write the missing shards of one split, those that other corpora hold from there. The last range is decoded whole
    too and cut afterwards, so that a smaller corpus is a prefix of a larger one, bit for bit."""
    settings = cast(GenerateJob, workspace.job).generate
    todo = []
    for number, block in enumerate(blocks_of(wanted, settings.batch_samples)):
        shard = workspace.path / split / f"shard-{number:05d}.parquet"
        if not is_shard_of(shard, block):
            if shard.exists():
                log.warning("%s is damaged and is made again", shard.name)
            todo.append((shard, block))
    taken = seal_known([shard for folder in known for shard in shards_of(folder, split)], todo)
    if taken:
        log.info("%s: %d samples taken from %s", split, taken, ", ".join(folder.name for folder in known))
        todo = [(shard, block) for shard, block in todo if not shard.exists()]
    done = len(wanted) - sum(len(block) for _, block in todo)
    if done and todo:
        log.info("%s: %d of %d samples are there already", split, done, len(wanted))
    size = settings.batch_samples * settings.max_length
    bar = progress(len(todo) * size, "tok", f"generate {split}")
    for shard, block in todo:
        whole = range(block.start, block.start + settings.batch_samples)
        decoded = 0

        def on_tokens(tokens: int) -> None:
            nonlocal decoded
            decoded += tokens
            bar.update(tokens)

        samples = engine.decode([plan.start(index) for index in whole], on_tokens)
        write_shard(shard, samples[: len(block)])
        workspace.tick()
        # Samples that ended early leave the bar short of its estimate.
        bar.total -= size - decoded
        bar.refresh()
    bar.close()


def generate_embedded(job: GenerateJob, workspace: Workspace, vocabulary: Vocabulary) -> dict[str, Any]:
    # Here, as torch alone is 200 MB of a client that does without it.
    from datagen.embedded import EmbeddedEngine
    from recovery.models import load_model

    model = load_model(job.model, job.dtype)
    engine = EmbeddedEngine(model, job.generate, vocabulary.width, vocabulary.bos, vocabulary.stops)
    known = known_corpora(job)
    for split, wanted in wanted_of(job).items():
        fill_embedded(workspace, split, wanted, engine, SamplingPlan(job.seed, split, vocabulary.eligible), known)
    return {}


def generate_served(job: GenerateJob, workspace: Workspace, vocabulary: Vocabulary, tracker: Tracker) -> dict[str, Any]:
    """Ask the servers for every index that no shard and no piece holds, then seal the shards."""
    folder = workspace.path
    known = agreeing(known_corpora(job), folder, job.runtime.servers)
    engine = ServedEngine(job, folder, vocabulary)
    wanted = wanted_of(job)
    pieces: dict[Split, Pieces] = {split: Pieces(folder / PIECES / split) for split in wanted}
    for split in wanted:
        drop_damaged([*shards_of(folder, split), *pieces[split].paths()], log.warning)
    elsewhere = {split: [shard for corpus in known for shard in shards_of(corpus, split)] for split in wanted}
    missing: dict[Split, NDArray[np.int64]] = {
        split: locate([*shards_of(folder, split), *pieces[split].paths(), *elsewhere[split]]).missing(indices)
        for split, indices in wanted.items()
    }
    total = sum(len(indices) for indices in wanted.values())
    left = sum(len(indices) for indices in missing.values())
    if 0 < left < total:
        log.info("%d of %d samples are there already", total - left, total)
    record = engine.fill(missing, pieces, tracker, total - left) if left else {}
    workspace.tick()
    capture = job.generate.capture_logprobs > 0
    bar = progress(total, "sample", "sort")
    for split, indices in wanted.items():
        signal = folder / "signal" / split if capture else None
        sources = [*shards_of(folder, split), *pieces[split].paths(), *elsewhere[split]]
        seal(sources, indices, folder / split, signal, shard_samples(job.generate), bar.update)
    bar.close()
    shutil.rmtree(folder / PIECES, ignore_errors=True)
    return {**engine.details, "throughput": record}


def sample_tokens(model: Any, vocabulary: Vocabulary, settings: Generate, seed: int) -> Tokens:
    """`settings.samples` samples of a loaded model in memory, as the embedded engine makes them."""
    from datagen.embedded import EmbeddedEngine

    engine = EmbeddedEngine(model, settings, vocabulary.width, vocabulary.bos, vocabulary.stops)
    plan = SamplingPlan(seed, "train", vocabulary.eligible)
    bar = progress(settings.samples * settings.max_length, "tok", "generate")
    samples: list[Sample] = []

    def tell(tokens: int) -> None:
        bar.update(tokens)

    for first in range(0, settings.samples, settings.batch_samples):
        block = range(first, min(first + settings.batch_samples, settings.samples))
        samples += engine.decode([plan.start(index) for index in block], tell)
    bar.close()
    return tokens_of(samples, 0 if vocabulary.bos is None else 1)


def describe(folder: Path, vocabulary: Vocabulary, tracker: Tracker) -> dict[str, Any]:
    """Write the tokenizer and the summary, and log the statistics."""
    vocabulary.tokenizer.save_pretrained(folder / TOKENIZER)
    summary: dict[str, Any] = {split: describe_split(folder, split) for split in get_args(Split)}
    skip, eligible = 0 if vocabulary.bos is None else 1, len(vocabulary.eligible)
    summary.update(skip=skip, bos_token_id=vocabulary.bos, eligible_start_tokens=eligible)
    summary.update(stop_token_ids=sorted(vocabulary.stops), vocabulary_width=vocabulary.width)
    write_json(folder / SUMMARY, summary)
    train = summary["train"]
    tracker.metrics(
        {
            "data/tokens": train["tokens"],
            "data/mean_length": train["length"]["mean"],
            "data/end_of_text_rate": train["end_of_text_rate"],
            "data/start_token_coverage": train["start_tokens"] / eligible,
            "data/distinct_2_grams": train["distinct_2"] or 0,
            "data/repeated_4_grams": train["repeats_4"] or 0,
        },
        step=train["samples"],
    )
    log.info(
        "%d samples, %d tokens, mean length %.1f, end of text %.1f%%, distinct 2-grams %.0f%%, repeated 4-grams %.1f%%",
        *(train["samples"], train["tokens"], train["length"]["mean"], 100 * train["end_of_text_rate"]),
        *(100 * (train["distinct_2"] or 0), 100 * (train["repeats_4"] or 0)),
    )
    return summary


def produce(job: GenerateJob, workspace: Workspace) -> dict[str, Any]:
    from datagen.plots import plot_corpus

    folder = workspace.path
    vocabulary = load_sampling_vocabulary(job.model, job.generate.bos)
    with Tracker(job.runtime.tracking, folder / "metrics.jsonl") as tracker:
        if job.generate.engine == "vllm":
            details = generate_served(job, workspace, vocabulary, tracker)
        else:
            details = generate_embedded(job, workspace, vocabulary)
        summary = describe(folder, vocabulary, tracker)
        # A working file: a picture's bytes depend on the version of the plotting library, a corpus does not.
        plot = folder / ".plot" / "corpus.png"
        plot_corpus(folder, plot)
        tracker.artifact(plot, "corpus")
    return {
        "tokens": summary["train"]["tokens"] + summary["held_out"]["tokens"],
        # Rounding depends on what shares a batch, so another engine, or the same at other times, may flip a token.
        "batch_invariant": False,
        "engine": job.generate.engine,
        **details,
    }


if __name__ == "__main__":
    run_stage(GenerateJob, produce, resumable=True, description=__doc__ or "")
