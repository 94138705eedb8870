"""The teacher signal: what the student is compared with at every position. `teacher.kind` chooses it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from recovery.batches import Batch
from recovery.models import Head, final_hidden, head_of


class TeacherSignal(Protocol):
    """The reference's final hidden states at a batch's loss positions, and the head they belong to."""

    head: Head

    def hidden(self, batch: Batch) -> Tensor:
        """(N, G): one row per True of `batch.mask_BT`, in row-major order; G is the reference's own width."""
        ...


class OnlineTeacher:
    """The reference's forward beside the student's: no gradient, no logits kept."""

    def __init__(self, reference: Any, width: int) -> None:
        self._reference = reference
        self.head = head_of(reference, width)

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        return final_hidden(self._reference, batch.ids_BT)[batch.mask_BT]
