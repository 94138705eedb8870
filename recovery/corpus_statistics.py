"""What a corpus is like: lengths, end-of-text rate, start-token coverage, repetition, n-gram diversity.

Lengths, ends and starts are of every row; n-grams are counted over the first rows, up to N_GRAM_TOKENS tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recovery.corpus import Split, read_table, shards_of

N_GRAM_TOKENS = 1_000_000


def describe_split(corpus: Path, split: Split) -> dict[str, Any]:
    """The statistics of one split, shard by shard, so that memory holds one shard and the rows of the n-grams."""
    lengths: list[NDArray[np.int32]] = []
    starts: list[NDArray[np.int32]] = []
    rows: list[NDArray[np.int32]] = []
    stopped = tokens = 0
    for shard in shards_of(corpus, split):
        table = read_table(shard, ["length", "start_token", "finish_reason"])
        lengths.append(table["length"].to_numpy())
        starts.append(np.unique(table["start_token"].to_numpy()))
        stopped += table["finish_reason"].to_pylist().count("stop")
        if tokens < N_GRAM_TOKENS:
            for row in read_table(shard, ["tokens"])["tokens"]:
                rows.append(np.asarray(row.values))
                tokens += len(rows[-1])
                if tokens >= N_GRAM_TOKENS:
                    break
    summary = summarize(rows, stopped, np.concatenate(lengths))
    return {**summary, "start_tokens": len(np.unique(np.concatenate(starts)))}


def summarize(
    rows: Sequence[Sequence[int] | NDArray[np.int32]], stopped: int, all_lengths: NDArray[np.int32] | None = None
) -> dict[str, Any]:
    """Lengths, end-of-text rate, distinct n-grams and the share of repeated 4-grams of a list of token rows.

    all_lengths: of the whole split, where `rows` are only its beginning. distinct_n: different n-grams over all
    n-grams; repeats_4: the share of a row's 4-grams that already occurred in the same row, averaged over rows (loops
    show here).
    """
    lengths = np.array([len(row) for row in rows]) if all_lengths is None else all_lengths
    summary: dict[str, Any] = {
        "samples": len(lengths),
        "rows_of_n_grams": len(rows),
        "tokens": int(lengths.sum()),
        "length": {
            "min": int(lengths.min()),
            "mean": round(float(lengths.mean()), 2),
            "median": float(np.median(lengths)),
            "max": int(lengths.max()),
        },
        "end_of_text_rate": round(stopped / len(lengths), 4),
    }
    for size in (1, 2, 3):
        grams = np.concatenate([_hashes(row, size) for row in rows])
        summary[f"distinct_{size}"] = round(len(np.unique(grams)) / len(grams), 4) if len(grams) else None
    shares = repeats(rows)
    summary["repeats_4"] = round(float(shares.mean()), 4) if len(shares) else None
    return summary


def repeats(rows: Sequence[Sequence[int] | NDArray[np.int32]]) -> NDArray[np.float64]:
    """For every row of at least four tokens, the share of its 4-grams that occurred in it before."""
    grams = [_hashes(row, 4) for row in rows if len(row) >= 4]
    return np.array([1 - len(np.unique(row)) / len(row) for row in grams])


def _hashes(row: Sequence[int] | NDArray[np.int32], size: int) -> NDArray[np.uint64]:
    """One 64-bit number for each n-gram of a row; two that differ share one with a chance of 2^-64."""
    ids = np.asarray(row, dtype=np.uint64)
    count = len(ids) - size + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    mixed = np.zeros(count, dtype=np.uint64)
    for offset in range(size):
        # The finalizer of splitmix64 after each id: order counts, and neighbours spread over all bits.
        mixed = (mixed + ids[offset : offset + count] + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(27)
    return mixed
