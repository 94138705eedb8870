"""The corpus format: Parquet shards of token ids, never text.

    <corpus>/train/shard-00000.parquet     samples that adapters learn from, global indices 0, 1, 2, ...
    <corpus>/held_out/shard-00000.parquet  samples of a stream of their own, for measuring only
    <corpus>/tokenizer/                    the tokenizer the ids belong to
    <corpus>/summary.json                  lengths, end-of-text rate, n-gram diversity; "skip": leading positions
                                           of a row that carry no loss (a beginning-of-text id)

Each row: global index, seed, start token, length, finish reason, token ids.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recovery.errors import DamagedArtifact, UserError
from recovery.files import read_json, write_atomic

SUMMARY = "summary.json"
TOKENIZER = "tokenizer"
SUMMARY_ROWS = 2000
Split = Literal["train", "held_out"]
FinishReason = Literal["length", "stop"]
SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("seed", pa.uint64()),
        ("start_token", pa.int32()),
        ("length", pa.int32()),
        ("finish_reason", pa.string()),
        ("tokens", pa.list_(pa.int32())),
    ]
)


@dataclass(frozen=True)
class Sample:
    index: int
    seed: int
    start_token: int
    finish_reason: FinishReason
    tokens: tuple[int, ...]
    """All ids, with the beginning-of-text id where the recipe puts one."""


@dataclass(frozen=True)
class Tokens:
    """One split in memory: row i is `ids[offsets[i]:offsets[i + 1]]` (int32), its global index `index[i]`."""

    index: NDArray[np.int64]
    offsets: NDArray[np.int64]
    ids: NDArray[np.int32]
    skip: int = 0
    """Leading positions of every row that carry no loss: 1 where a beginning-of-text id stands in front."""

    def __len__(self) -> int:
        return len(self.index)

    def row(self, position: int) -> NDArray[np.int32]:
        return self.ids[self.offsets[position] : self.offsets[position + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    def head(self, rows: int) -> Tokens:
        """The first `rows` rows."""
        rows = min(rows, len(self))
        return replace(
            self,
            index=self.index[:rows],
            offsets=self.offsets[: rows + 1],
            ids=self.ids[: self.offsets[rows]],
        )


def write_shard(path: Path, samples: Iterable[Sample]) -> None:
    """Write one shard, whole or not at all; equal samples give equal bytes."""
    rows = list(samples)
    table = pa.table(
        {
            "index": [sample.index for sample in rows],
            "seed": [sample.seed for sample in rows],
            "start_token": [sample.start_token for sample in rows],
            "length": [len(sample.tokens) for sample in rows],
            "finish_reason": [sample.finish_reason for sample in rows],
            "tokens": [list(sample.tokens) for sample in rows],
        },
        schema=SCHEMA,
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())


def _read_table(path: Path) -> pa.Table:
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise DamagedArtifact(
            str(path), "not a readable Parquet shard (truncated?)", "remove its corpus and generate it again"
        ) from error
    if table.schema.names != SCHEMA.names:
        raise DamagedArtifact(
            str(path),
            f"columns {table.schema.names}, a corpus shard has {SCHEMA.names}",
            "give a corpus of this project",
        )
    return table.cast(SCHEMA)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of one shard."""
    return _read_table(path).to_pylist()


def read_split(corpus: Path, split: Split) -> Tokens:
    """All samples of a split in the order of their global index.

    Raises UserError for an empty split, DamagedArtifact for a shard that cannot be read or an index held twice.
    """
    shards = sorted((corpus / split).glob("shard-*.parquet"))
    tables = [_read_table(path) for path in shards]
    if not any(table.num_rows for table in tables):
        raise UserError(str(corpus / split), "the corpus has no samples", "generate at least one")
    table = pa.concat_tables(tables).sort_by("index").combine_chunks()
    index = table["index"].to_numpy()
    if len(np.unique(index)) != len(index):
        raise DamagedArtifact(str(corpus / split), "an index is held twice", "remove the corpus and generate it again")
    lists = table["tokens"].combine_chunks()
    lists = lists.chunk(0) if isinstance(lists, pa.ChunkedArray) else lists
    offsets = lists.offsets.to_numpy().astype(np.int64)
    ids = lists.values.to_numpy()
    if not np.array_equal(np.diff(offsets), table["length"].to_numpy()):
        raise DamagedArtifact(str(corpus / split), "a row's length differs from its token count", "generate it again")
    skip = int(read_json(corpus / SUMMARY).get("skip", 0))
    return Tokens(index, offsets - offsets[0], ids[offsets[0] : offsets[-1]], skip)


def check_ids(tokens: Tokens, width: int, where: str) -> None:
    """Raise UserError unless all ids lie below `width`, the number of logits in use."""
    if len(tokens.ids) and (int(tokens.ids.max()) >= width or int(tokens.ids.min()) < 0):
        raise UserError(
            where,
            f"token id {int(tokens.ids.max())}, the vocabulary has {width}",
            "generate the corpus from a model of the same vocabulary",
        )


def describe_split(folder: Path) -> dict[str, Any]:
    """The summary of one split's shards; n-grams are counted over its first SUMMARY_ROWS rows."""
    lengths: list[int] = []
    starts: set[int] = set()
    texts: list[list[int]] = []
    stopped = 0
    for shard in sorted(folder.glob("shard-*.parquet")):
        table = _read_table(shard)
        lengths += table["length"].to_pylist()
        starts.update(table["start_token"].to_pylist())
        stopped += table["finish_reason"].to_pylist().count("stop")
        if len(texts) < SUMMARY_ROWS:
            texts += table["tokens"][: SUMMARY_ROWS - len(texts)].to_pylist()
    return {**summarize(texts, stopped, lengths), "start_tokens": len(starts)}


def summarize(rows: Sequence[Sequence[int]], stopped: int, all_lengths: Sequence[int] | None = None) -> dict[str, Any]:
    """Lengths, end-of-text rate, distinct n-grams and the share of repeated 4-grams of a list of token rows.

    all_lengths: of the whole split, where `rows` are only its beginning.
    distinct_n: different n-grams over all n-grams; repeats_4: the share of a row's 4-grams that already occurred in
    the same row, averaged over rows (loops show here).
    """
    lengths = np.array([len(row) for row in rows] if all_lengths is None else all_lengths)
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
        seen: set[tuple[int, ...]] = set()
        total = 0
        for row in rows:
            grams = list(zip(*(row[offset:] for offset in range(size)), strict=False))
            seen.update(grams)
            total += len(grams)
        summary[f"distinct_{size}"] = round(len(seen) / total, 4) if total else None
    shares = []
    for row in rows:
        grams = list(zip(*(row[offset:] for offset in range(4)), strict=False))
        if grams:
            shares.append(1 - len(set(grams)) / len(grams))
    summary["repeats_4"] = round(float(np.mean(shares)), 4) if shares else None
    return summary
