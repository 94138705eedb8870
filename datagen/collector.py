"""Between the client and the disk: finished samples wait here for seconds, never more than a buffer of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from datagen.pieces import Pieces
from recovery.corpus import Sample, Split

FLUSH_SECONDS, FLUSH_BYTES = 5.0, 8 << 20


class Collector:
    """Takes finished samples and writes them as pieces, from a thread, at most FLUSH_SECONDS later."""

    def __init__(self, pieces: dict[Split, Pieces]) -> None:
        self._pieces = pieces
        self.on_written: Callable[[], None] = lambda: None
        """Called when there is room again."""
        self._waiting: dict[Split, list[Sample]] = {split: [] for split in pieces}
        self._bytes = 0
        self._since = time.monotonic()
        self._writing: asyncio.Task[None] | None = None
        self._failure: Exception | None = None

    def add(self, split: Split, sample: Sample) -> None:
        self._waiting[split].append(sample)
        self._bytes += 4 * len(sample.tokens) + 200 + (sample.signal.nbytes if sample.signal is not None else 0)
        if self._bytes > FLUSH_BYTES:
            self.flush()

    def is_full(self) -> bool:
        """Whether the disk is behind by a whole buffer: nothing more should be asked for."""
        return self._bytes > FLUSH_BYTES and self._writing is not None

    def tick(self) -> None:
        if time.monotonic() - self._since > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Start writing what is waiting, unless a write is under way; that one's end looks again."""
        if self._writing is None and self._bytes:
            self._writing = asyncio.ensure_future(self._write())

    async def _write(self) -> None:
        taken = self._take()
        self._bytes, self._since = 0, time.monotonic()
        try:
            await asyncio.to_thread(self._store, taken)
        except Exception as error:  # noqa: BLE001 - whatever a disk does: `watch` and `close` raise it
            self._failure = error
            for split, samples in taken.items():
                self._waiting[split] = samples + self._waiting[split]
        finally:
            self._writing = None
        self.on_written()

    def _take(self) -> dict[Split, list[Sample]]:
        taken = self._waiting
        self._waiting = {}
        for split in self._pieces:
            self._waiting[split] = []
        return taken

    def _store(self, taken: dict[Split, list[Sample]]) -> None:
        for split, samples in taken.items():
            if samples:
                self._pieces[split].write(samples)
                samples.clear()

    async def watch(self) -> None:
        """Flush in time, and raise what a write raised (a full disk)."""
        while True:
            await asyncio.sleep(0.5)
            if self._failure is not None:
                raise self._failure
            self.tick()

    async def close(self) -> None:
        """Write what is left, with what an earlier write could not: also after an interrupt or an error."""
        if self._writing is not None:
            await self._writing
        taken = self._take()
        self._store(taken)
