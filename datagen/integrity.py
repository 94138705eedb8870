"""`recover-lora corpus verify`: everything that must hold of a finished corpus, read anew from its shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np

from datagen.config import GenerateJob, GenerateRuntime
from datagen.generate import wanted_of
from datagen.sampling import SamplingPlan, eligible_ids
from datagen.served import MOST_REDRAWS, Vocabulary
from recovery.artifacts import read_manifest
from recovery.corpus import SUMMARY, TOKENIZER, Split, read_table, shards_of
from recovery.errors import DamagedArtifact, UserError
from recovery.files import read_json
from recovery.progress import progress
from recovery.teacher_signal import check_signal

REMEDY = "remove the corpus and generate it again"


def vocabulary_of(corpus: Path) -> Vocabulary:
    """What the corpus was sampled with, from its own files: the model may be gone."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(corpus / TOKENIZER)
    summary = read_json(corpus / SUMMARY)
    width, stops = int(summary["vocabulary_width"]), frozenset(summary["stop_token_ids"])
    return Vocabulary(tokenizer, summary["bos_token_id"], stops, width, eligible_ids(tokenizer, width))


def check_corpus(corpus: Path) -> dict[str, tuple[int, int]]:
    """{split: (samples, tokens)}. Raises DamagedArtifact naming the shard and the row at fault.

    Checked: every index once and in order, start token and seed as the sampling plan has them, lengths, ids within the
    vocabulary, ends where a text ends, and the teacher signal against its rows.
    """
    manifest = read_manifest(corpus)
    if manifest["stage"] != GenerateJob.stage:
        raise UserError(str(corpus), f"an artifact of stage {manifest['stage']}", "give a corpus")
    job = GenerateJob.model_validate({**manifest["job"], "runtime": GenerateRuntime(output=corpus)})
    vocabulary, mode = vocabulary_of(corpus), manifest["details"].get("mode")
    counts = {}
    wanted = wanted_of(job)
    bar = progress(sum(map(len, wanted.values())), "sample", "verify")
    for split in get_args(Split):
        plan = SamplingPlan(job.seed, split, vocabulary.eligible)
        expected, tokens = iter(wanted[split]), 0
        for shard in shards_of(corpus, split):
            rows = read_table(shard).to_pylist()
            for row in rows:
                if fault := _fault(row, next(expected, None), job, plan, vocabulary, mode):
                    raise DamagedArtifact(str(shard), f"sample {row['index']}: {fault}", REMEDY)
                tokens += row["length"]
            if job.generate.capture_logprobs:
                path = corpus / "signal" / split / f"{shard.stem}.safetensors"
                check_signal(path, [r["index"] for r in rows], [np.array(r["tokens"], np.int32) for r in rows])
            bar.update(len(rows))
        if (missing := next(expected, None)) is not None:
            raise DamagedArtifact(str(corpus / split), f"sample {missing} is missing", REMEDY)
        counts[split] = (len(wanted[split]), tokens)
    bar.close()
    return counts


def _fault(
    row: dict[str, Any],
    index: int | None,
    job: GenerateJob,
    plan: SamplingPlan,
    vocabulary: Vocabulary,
    mode: str | None,
) -> str | None:
    ids = row["tokens"]
    if row["index"] != index:
        return f"where {index} should stand"
    start = plan.start(row["index"])
    head = [start.token] if vocabulary.bos is None else [vocabulary.bos, start.token]
    # Without our logits processor a sample may have been drawn again from the seeds that follow from its own.
    seeds = [start.seed]
    while mode == "two_requests" and len(seeds) <= MOST_REDRAWS and row["seed"] != seeds[-1]:
        seeds.append(SamplingPlan.next_seed(seeds[-1]))
    if row["start_token"] != start.token or ids[: len(head)] != head:
        return f"starts with {ids[: len(head)]}, the plan has {head}"
    if row["seed"] not in seeds:
        return f"seed {row['seed']}, the plan has {start.seed}"
    if row["length"] != len(ids) or len(ids) > job.generate.max_length:
        return f"{len(ids)} tokens, its length is {row['length']}, the longest is {job.generate.max_length}"
    if min(ids) < 0 or max(ids) >= vocabulary.width:
        return f"token id {max(ids)}, the vocabulary has {vocabulary.width}"
    ended = ids[-1] in vocabulary.stops and len(ids) > len(head)
    if ended != (row["finish_reason"] == "stop") or (not ended and len(ids) != job.generate.max_length):
        return f"finish reason {row['finish_reason']} after {len(ids)} tokens"
    return None
