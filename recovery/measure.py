"""KL to the reference, top-1 agreement and perplexity on held-out text."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recovery.batches import Batch, collate, micro_batches_of
from recovery.corpus import Tokens
from recovery.loss import compare
from recovery.models import Head, causal_lm, final_hidden, head_of
from recovery.progress import progress
from recovery.teacher import OnlineTeacher, TeacherSignal


@dataclass(frozen=True)
class Measurement:
    kl: float
    """Mean KL(reference || model) per token, in nats."""
    top1: float
    """Share of positions at which both models prefer the same token, 0 to 1."""
    perplexity: float
    """exp of the model's mean -log p(next token)."""
    reference_perplexity: float
    tokens: int


def measure(
    student: Any, reference: Any, tokens: Tokens, width: int, micro_batch_tokens: int, description: str
) -> Measurement:
    """Compare two causal LMs (PEFT models too) on every position of `tokens` that predicts a token."""
    held_out = HeldOut(tokens, OnlineTeacher(reference, width), causal_lm(reference).device, micro_batch_tokens)
    head = head_of(student, width)
    return held_out.measure(lambda: nullcontext(head), lambda ids_BT: final_hidden(student, ids_BT), description)


class HeldOut:
    """Held-out text with a teacher signal. keep: remember the reference's states between measurements."""

    def __init__(
        self,
        tokens: Tokens,
        teacher: TeacherSignal,
        device: torch.device,
        micro_batch_tokens: int,
        *,
        keep: bool = False,
    ) -> None:
        self._tokens = tokens
        self._teacher = teacher
        self._device = device
        self._rows = micro_batches_of(tokens, micro_batch_tokens)
        self._kept: dict[int, Tensor] | None = {} if keep else None

    def _reference_hidden(self, number: int, batch: Batch) -> Tensor:
        if self._kept is None:
            return self._teacher.hidden(batch)
        if number not in self._kept:
            self._kept[number] = self._teacher.hidden(batch).cpu()
        return self._kept[number].to(self._device)

    @torch.no_grad()
    def measure(
        self,
        head: Callable[[], AbstractContextManager[Head]],
        hidden_of: Callable[[Tensor], Tensor],
        description: str | None = None,
    ) -> Measurement:
        """head: gives the student's head, entered for each batch after its hidden states are there.

        hidden_of: ids (B, T) to the student's final hidden states (B, T, H). description: show a progress bar.
        """
        sums = torch.zeros(4, dtype=torch.float64)
        count = 0
        bar = progress(int(self._tokens.lengths.sum()), "tok", description) if description else None
        for number, rows in enumerate(self._rows):
            batch = collate(self._tokens, rows, self._device)
            next_N = batch.ids_BT.roll(-1, dims=1)[batch.mask_BT]
            hidden_NH = hidden_of(batch.ids_BT)[batch.mask_BT]
            reference_NG = self._reference_hidden(number, batch)
            with head() as student_head:
                sums += compare(hidden_NH, student_head, reference_NG, self._teacher.head, next_N).cpu()
            count += len(next_N)
            if bar is not None:
                bar.update(int(sum(self._tokens.lengths[row] for row in rows)))
        if bar is not None:
            bar.close()
        kl, top1, nll, reference_nll = (sums / max(count, 1)).tolist()
        return Measurement(kl, top1, float(np.exp(nll)), float(np.exp(reference_nll)), count)
