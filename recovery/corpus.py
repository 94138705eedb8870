"""The corpus format: Parquet shards of token ids, never text.

    <corpus>/train/shard-00000.parquet     samples that adapters learn from, global indices 0, 1, 2, ...
    <corpus>/held_out/shard-00000.parquet  samples of a stream of their own, for measuring only
    <corpus>/tokenizer/                    the tokenizer the ids belong to
    <corpus>/summary.json                  lengths, end-of-text rate, n-gram diversity; "skip": leading positions
                                           of a row that carry no loss (a beginning-of-text id)
    <corpus>/signal/train/shard-00000.safetensors     teacher signal of the rows of the shard of that number, where
                                                      it was captured (recovery.teacher_signal)

Each row: global index, seed, start token, length, finish reason, token ids. Pages carry checksums.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recovery.errors import DamagedArtifact, UserError
from recovery.files import read_json, write_atomic
from recovery.teacher_signal import TopLogprobs

SUMMARY = "summary.json"
REMEDY = "remove its corpus and generate it again"
TOKENIZER = "tokenizer"
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
    tokens: Sequence[int] | NDArray[np.int32]
    """All ids, with the beginning-of-text id where the recipe puts one."""
    signal: TopLogprobs | None = None
    """The teacher's log-probabilities of the generated tokens, where the server was asked for them."""


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

    @cached_property
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


def tokens_of(samples: Sequence[Sample], skip: int) -> Tokens:
    """Samples in memory as one split. skip: as in Tokens."""
    lengths = [len(sample.tokens) for sample in samples]
    ids = np.concatenate([np.asarray(sample.tokens, dtype=np.int32) for sample in samples])
    index = np.array([sample.index for sample in samples], dtype=np.int64)
    return Tokens(index, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), ids, skip)


def to_table(samples: Sequence[Sample]) -> pa.Table:
    """The samples as a table of SCHEMA, without a Python object per token."""
    lengths = [len(sample.tokens) for sample in samples]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    parts = [np.asarray(sample.tokens, dtype=np.int32) for sample in samples]
    values = np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
    return pa.table(
        {
            "index": [sample.index for sample in samples],
            "seed": pa.array([sample.seed for sample in samples], pa.uint64()),
            "start_token": [sample.start_token for sample in samples],
            "length": lengths,
            "finish_reason": [sample.finish_reason for sample in samples],
            "tokens": pa.ListArray.from_arrays(pa.array(offsets), pa.array(values)),
        },
        schema=SCHEMA,
    )


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file, whole or not at all; equal tables give equal bytes."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getbuffer())


def write_shard(path: Path, samples: Sequence[Sample]) -> None:
    """Write one shard, whole or not at all; equal samples give equal bytes."""
    write_table(path, to_table(samples))


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file of ours, or some columns of it. Raises DamagedArtifact for one that cannot be read."""
    try:
        table = pq.read_table(path, columns=columns, page_checksum_verification=True)
        _ = table.schema.names  # decoded here
        return table
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise DamagedArtifact(str(path), "not a readable Parquet shard (truncated?)", REMEDY) from error


def _read_shard(path: Path) -> pa.Table:
    table = read_table(path)
    if table.schema.names != SCHEMA.names:
        raise DamagedArtifact(
            str(path),
            f"columns {table.schema.names}, a corpus shard has {SCHEMA.names}",
            "give a corpus of this project",
        )
    try:
        table = table.cast(SCHEMA)
    except pa.ArrowException as error:
        raise DamagedArtifact(str(path), f"columns of other types ({error})", REMEDY) from error
    holes = [name for name in SCHEMA.names if table[name].null_count]
    if holes or any(chunk.values.null_count for chunk in table["tokens"].chunks):
        raise DamagedArtifact(str(path), f"holes in column {holes[0] if holes else 'tokens'}", REMEDY)
    return table


def shards_of(corpus: Path, split: Split) -> list[Path]:
    return sorted((corpus / split).glob("shard-*.parquet"))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of one shard."""
    return _read_shard(path).to_pylist()


def read_split(corpus: Path, split: Split) -> Tokens:
    """All samples of a split in the order of their global index.

    Raises UserError for an empty split, DamagedArtifact for a shard that cannot be read or an index held twice.
    """
    tables = [_read_shard(path) for path in shards_of(corpus, split)]
    if not any(table.num_rows for table in tables):
        raise UserError(str(corpus / split), "the corpus has no samples", "generate at least one")
    table = pa.concat_tables(tables).sort_by("index").combine_chunks()
    index = table["index"].to_numpy()
    if len(np.unique(index)) != len(index):
        raise DamagedArtifact(str(corpus / split), "an index is held twice", REMEDY)
    lists = table["tokens"].combine_chunks()
    lists = lists.chunk(0) if isinstance(lists, pa.ChunkedArray) else lists
    offsets = lists.offsets.to_numpy().astype(np.int64)
    ids = lists.values.to_numpy()
    if not np.array_equal(np.diff(offsets), table["length"].to_numpy()):
        raise DamagedArtifact(str(corpus / split), "a row's length differs from its token count", REMEDY)
    skip = read_skip(corpus)
    return Tokens(index, offsets - offsets[0], ids[offsets[0] : offsets[-1]], skip)


def read_skip(corpus: Path) -> int:
    """Leading positions of every row that carry no loss. Raises UserError."""
    summary = read_json(corpus / SUMMARY)
    skip = summary.get("skip", 0) if isinstance(summary, dict) else None
    if skip not in (0, 1):
        raise DamagedArtifact(str(corpus / SUMMARY), f"skip is {skip!r}, not 0 or 1", REMEDY)
    return int(skip)


def check_ids(tokens: Tokens, width: int, where: str) -> None:
    """Raise UserError unless all ids lie below `width`, the number of logits in use."""
    if len(tokens.ids) and (int(tokens.ids.max()) >= width or int(tokens.ids.min()) < 0):
        raise UserError(
            where,
            f"token id {int(tokens.ids.max())}, the vocabulary has {width}",
            "generate the corpus from a model of the same vocabulary",
        )
