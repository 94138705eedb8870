"""What a training step is fed with: packed micro-batches and what their teacher has on disk, made ahead of the step."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from recovery.batches import Batch, Step, collate
from recovery.config import SparseLogitsTeacher, TrainJob
from recovery.corpus import Tokens
from recovery.errors import UserError
from recovery.head import Head
from recovery.models import TORCH_DTYPES, device
from recovery.teacher import DenseTeacher, NoTeacher, OnlineTeacher, TeacherSignal
from recovery.teacher_cache import CachedHiddenStates, CachedSparseLogits, read_head

AHEAD = 3
"""Micro-batches that are made ready while one is computed."""
Prepared = tuple[Batch, tuple[Tensor, ...]]
"""A micro-batch and what its teacher has on disk, both on the CPU."""


def teachers(
    job: TrainJob,
    online: OnlineTeacher | None,
    width: int,
    tokens: Tokens,
    texts: dict[str, Tokens],
    student_head: Head,
) -> tuple[TeacherSignal, Mapping[str, DenseTeacher]]:
    """The signal to learn from, and those to measure the other texts with. online: None where there is a cache."""
    if job.cache is None:
        assert online is not None
        learned_from = NoTeacher() if job.train.loss.cross_entropy == 1 else online
        return learned_from, dict.fromkeys(texts, online)
    folder = job.cache.path
    head = read_head(folder, student_head, TORCH_DTYPES[job.dtype])
    if head.width != width:
        raise UserError(str(folder), f"logits of {head.width} tokens, the models have {width}", "make the cache anew")
    measuring = {name: CachedHiddenStates(folder / name, text, head) for name, text in texts.items()}
    if isinstance(job.teacher, SparseLogitsTeacher):
        return CachedSparseLogits(folder / "train", tokens), measuring
    return CachedHiddenStates(folder / "train", tokens, head), measuring


def prepared(
    tokens: Tokens, teacher: TeacherSignal, plan: Sequence[Step], rank: int, ranks: int
) -> Generator[Prepared, None, None]:
    """One rank's micro-batches of the steps of a plan, in their order."""

    def make(rows: tuple[int, ...], spare: bool) -> Prepared:
        batch, fetched = collate(tokens, rows), teacher.fetch(rows)
        if spare:
            batch = batch.without_loss()
        if device().type != "cpu":
            batch, fetched = batch.pin(), tuple(tensor.pin_memory() for tensor in fetched)
        return batch, fetched

    def wanted() -> Iterator[tuple[tuple[int, ...], bool]]:
        for step in plan:
            for rows in step.of_rank(rank, ranks):
                # A rank without a micro-batch of its own runs one without loss, so that all reduce together.
                yield rows or step.micro_batches[0], not rows

    with ThreadPoolExecutor(1, "data") as thread:
        waiting: deque[Future[Prepared]] = deque()
        try:
            for rows, spare in wanted():
                waiting.append(thread.submit(make, rows, spare))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
