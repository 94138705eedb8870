"""The teacher signal: what the student is compared with at every position. `teacher.kind` chooses it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from recovery.batches import Batch
from recovery.head import Head
from recovery.models import causal_lm, final_hidden, head_of
from recovery.partition import gathered
from recovery.targets import DenseTargets, NoTargets, Targets


class TeacherSignal(Protocol):
    """Where the targets of a batch come from."""

    def fetch(self, rows: tuple[int, ...]) -> tuple[Tensor, ...]:
        """What lies on disk for these samples, on the CPU; called ahead of the step, in another thread."""
        ...

    def targets(self, batch: Batch, fetched: tuple[Tensor, ...]) -> Targets:
        """One target for each of `batch.loss_N`, on the batch's device."""
        ...


class DenseTeacher(TeacherSignal, Protocol):
    """A signal of whole distributions; texts for measuring always have one."""

    head: Head

    def targets(self, batch: Batch, fetched: tuple[Tensor, ...]) -> DenseTargets: ...


class OnlineTeacher:
    """The reference's forward beside the student's: no gradient, no logits kept."""

    def __init__(self, reference: Any, width: int, hidden: Callable[[Batch], Tensor] | None = None) -> None:
        """hidden: batch to final hidden states, where the reference is partitioned over the ranks; its head is then
        held whole on each of them."""
        self._hidden = partial(final_hidden, reference) if hidden is None else hidden
        self._in_pieces = hidden is not None  # then every rank runs every layer, whether it needs it or not
        with gathered(list(causal_lm(reference).get_output_embeddings().parameters())):
            head = head_of(reference, width)
            self.head = head if hidden is None else replace(head, weight_VH=head.weight_VH.clone())

    def fetch(self, rows: tuple[int, ...]) -> tuple[Tensor, ...]:  # noqa: ARG002 - nothing lies on disk
        return ()

    @torch.no_grad()
    def targets(self, batch: Batch, fetched: tuple[Tensor, ...] = ()) -> DenseTargets:  # noqa: ARG002 - see fetch
        if not len(batch.loss_N) and not self._in_pieces:
            return DenseTargets(self.head.weight_VH[:0], self.head)
        return DenseTargets(self._hidden(batch)[batch.loss_N], self.head)


class NoTeacher:
    """For supervised fine-tuning: nothing but the text's own tokens."""

    def fetch(self, rows: tuple[int, ...]) -> tuple[Tensor, ...]:  # noqa: ARG002 - nothing lies on disk
        return ()

    def targets(self, batch: Batch, fetched: tuple[Tensor, ...] = ()) -> NoTargets:  # noqa: ARG002 - see fetch
        return NoTargets(len(batch.loss_N))
