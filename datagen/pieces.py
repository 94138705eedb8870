"""Finished samples on disk within seconds, in the order in which they came; then sorted into the corpus' shards.

A pool of servers finishes samples in no particular order. They are written in small pieces as they come, so that
neither a slow sample nor a kill holds up or loses the others, and nothing but a buffer is kept in memory. When no index
is missing the pieces are sealed: sorted into shards of consecutive indices. Equal samples give equal
shards, whatever the servers, restarts and partitions were.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from datagen.config import Generate
from recovery.corpus import SCHEMA, Sample, read_table, to_table, write_table
from recovery.errors import DamagedArtifact
from recovery.teacher_signal import TopLogprobs, bytes_per_token, read_signal, write_signal

SHARD_SAMPLES = 2048
SIGNAL = "signal"  # column of a piece
SIGNAL_SHARD_BYTES = 64 << 20
CACHE_BYTES = 48 << 20


class Pieces:
    """The pieces of one split in `folder`. Written by one thread at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._next = 1 + max((int(path.stem.rpartition("-")[2]) for path in self.paths()), default=-1)

    def paths(self) -> list[Path]:
        return sorted(self._folder.glob("piece-*.parquet"))

    def write(self, samples: Sequence[Sample]) -> None:
        """One more piece, whole or not at all."""
        table = to_table(samples)
        if any(sample.signal is not None for sample in samples):
            packed = [None if sample.signal is None else sample.signal.pack() for sample in samples]
            table = table.append_column(SIGNAL, pa.array(packed, pa.large_binary()))
        write_table(self._folder / f"piece-{self._next:06d}.parquet", table)
        self._next += 1


def drop_damaged(paths: Sequence[Path], warn: Callable[[str], object]) -> None:
    """Remove shards and pieces that cannot be read (a bad disk): their samples count as missing and are made again."""
    for path in paths:
        try:
            read_table(path)
        except DamagedArtifact:
            warn(f"{path.name} is damaged; its samples are made again")
            path.unlink()


@dataclass(frozen=True)
class Places:
    """Where each index stands: `source[i]` and `row[i]` of `index[i]`, ascending; of doubles the first source's."""

    sources: list[Path]
    index: NDArray[np.int64]
    source: NDArray[np.int32]
    row: NDArray[np.int32]

    def missing(self, wanted: range) -> NDArray[np.int64]:
        there = np.zeros(len(wanted), dtype=bool)
        inside = self.index[(self.index >= wanted.start) & (self.index < wanted.stop)]
        there[inside - wanted.start] = True
        return np.flatnonzero(~there) + wanted.start


def locate(sources: Sequence[Path]) -> Places:
    """Find every sample of some shards or pieces by reading their index columns only."""
    columns = [read_table(path, ["index"])["index"].to_numpy() for path in sources]
    lengths = [len(column) for column in columns]
    every = np.concatenate(columns) if columns else np.empty(0, dtype=np.int64)
    source = np.repeat(np.arange(len(columns), dtype=np.int32), lengths)
    row = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]) if columns else np.empty(0, dtype=np.int32)
    index, first = np.unique(every, return_index=True)
    return Places(list(sources), index, source[first], row[first])


class _Cache:
    """The tables read last, up to CACHE_BYTES of them: neighbouring shards draw on the same few pieces."""

    def __init__(self, signal: bool) -> None:
        self._signal = signal
        self._tables: OrderedDict[Path, pa.Table] = OrderedDict()

    def __getitem__(self, path: Path) -> pa.Table:
        if path in self._tables:
            self._tables.move_to_end(path)
        else:
            self._tables[path] = with_signal(path, read_table(path)) if self._signal else read_table(path)
            while len(self._tables) > 1 and sum(table.nbytes for table in self._tables.values()) > CACHE_BYTES:
                self._tables.popitem(last=False)
        return self._tables[path]


def with_signal(path: Path, table: pa.Table) -> pa.Table:
    """A table with its signal as a column: a piece has it, a finished shard's is in a file of its own."""
    if SIGNAL in table.schema.names:
        return table
    rows = [np.asarray(row.values) for row in table["tokens"]]
    packed = [signal.pack() for signal in read_signal(path, table["index"].to_pylist(), rows)]
    return table.append_column(SIGNAL, pa.array(packed, pa.large_binary()))


def shard_samples(settings: Generate) -> int:
    """Samples of a shard: fewer where each carries megabytes of signal, so that a shard fits in memory."""
    if not settings.capture_logprobs:
        return SHARD_SAMPLES
    row = settings.max_length * bytes_per_token(settings.capture_logprobs)
    return min(max(SIGNAL_SHARD_BYTES // row, 1), SHARD_SAMPLES)


def blocks_of(wanted: range, size: int) -> list[range]:
    return [range(first, min(first + size, wanted.stop)) for first in range(wanted.start, wanted.stop, size)]


def is_shard_of(path: Path, wanted: range) -> bool:
    """Whether this shard is there, whole. One that cannot be read is not; its samples are made again."""
    if not path.exists():
        return False
    try:
        return read_table(path)["index"].to_pylist() == list(wanted)
    except DamagedArtifact:
        return False


def seal(
    sources: Sequence[Path],
    wanted: range,
    shards: Path,
    signal: Path | None = None,
    size: int = SHARD_SAMPLES,
    on_samples: Callable[[int], Any] = lambda _: None,
) -> None:
    """Sort the samples of `sources` into shards of consecutive indices in folder `shards`; what is there is kept.

    signal: folder for the teacher signal that the sources carry, written before its shard. Raises DamagedArtifact when
    an index is missing.
    """
    places, cache = locate(sources), _Cache(signal is not None)
    for number, block in enumerate(blocks_of(wanted, size)):
        path = shards / f"shard-{number:05d}.parquet"
        signal_path = None if signal is None else signal / f"shard-{number:05d}.safetensors"
        if not path.exists():
            table = _gather(places, block, cache)
            if signal_path is not None:
                rows = [np.asarray(row.values) for row in table["tokens"]]
                signals = [TopLogprobs.unpack(packed.as_py()) for packed in table[SIGNAL]]
                write_signal(signal_path, list(block), rows, signals)
            write_table(path, table.select(SCHEMA.names))
        on_samples(len(block))


def seal_known(sources: Sequence[Path], todo: Sequence[tuple[Path, range]]) -> int:
    """Write those of some shards whose samples other shards all hold; returns how many samples that are."""
    places, cache, taken = locate(sources), _Cache(signal=False), 0
    for path, block in todo:
        if not len(places.missing(block)):
            # Parquet gives lists' items another name.
            write_table(path, _gather(places, block, cache).select(SCHEMA.names).cast(SCHEMA))
            taken += len(block)
    return taken


def _gather(places: Places, block: range, cache: _Cache) -> pa.Table:
    first, last = np.searchsorted(places.index, [block.start, block.stop])
    if last - first != len(block):
        raise DamagedArtifact(
            str(places.sources[0].parent if places.sources else "corpus"),
            f"{len(block) - (last - first)} samples of {block.start}..{block.stop - 1} are missing",
            "run the same command again to fill them",
        )
    parts = []
    for number in np.unique(places.source[first:last]):
        rows = places.row[first:last][places.source[first:last] == number]
        parts.append(cache[places.sources[number]].take(pa.array(rows)))
    return pa.concat_tables(parts, promote_options="default").sort_by("index").combine_chunks()
