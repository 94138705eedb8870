"""KL to the reference, top-1 agreement and perplexity on held-out text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recovery.attention import packed
from recovery.batches import Batch, collate, micro_batches_of
from recovery.corpus import Tokens
from recovery.head import Head
from recovery.layerwise import Stream, end
from recovery.loss import compare
from recovery.models import causal_lm, device, final_hidden, head_of
from recovery.progress import progress
from recovery.targets import DenseTargets
from recovery.teacher import DenseTeacher, OnlineTeacher


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
    by_sample: tuple[tuple[float, int], ...] = field(default=(), repr=False)
    """Of every sample in order: KL summed over its tokens, and their number."""


class Tally:
    """Sums over a text, sample by sample."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._counts: dict[int, int] = {}

    def add(self, batch: Batch, found_N4: Tensor) -> None:
        """found_N4: what recovery.loss.compare gives for the places of the batch that carry loss."""
        # On the CPU, where equal runs add in the same order.
        owners_N, found_N4 = batch.owners_N.cpu(), found_N4.cpu()
        sums_S4 = found_N4.new_zeros(len(batch.rows), 4).index_add_(0, owners_N, found_N4)
        counts = torch.bincount(owners_N, minlength=len(batch.rows)).tolist()
        for row, sums, count in zip(batch.rows, sums_S4, counts, strict=True):
            self._sums[row], self._counts[row] = sums, count

    def measurement(self) -> Measurement:
        rows, count = sorted(self._sums), sum(self._counts.values())
        total = torch.stack([self._sums[row] for row in rows]).sum(0) if rows else torch.zeros(4)
        kl, top1, nll, reference_nll = (total / max(count, 1)).tolist()
        by_sample = tuple((float(self._sums[row][0]), self._counts[row]) for row in rows)
        return Measurement(kl, top1, float(np.exp(nll)), float(np.exp(reference_nll)), count, by_sample)


def remember(reference: Any, tokens: Tokens, width: int, micro_batch_tokens: int, description: str) -> HeldOut:
    """The text with the reference's final states (on the host, in its dtype) and head: the rest of the reference may
    go before the model that is compared with it comes onto the device."""
    held_out = HeldOut(
        tokens, OnlineTeacher(reference, width), causal_lm(reference).device, micro_batch_tokens, keep=True
    )
    with packed(causal_lm(reference)):
        held_out.remember(description)
    return held_out


def measure_on(held_out: HeldOut, student: Any, width: int, description: str) -> Measurement:
    """Compare a causal LM (a PEFT model too) on every position of the text that predicts a token."""
    head = head_of(student, width)
    with packed(causal_lm(student)):
        return held_out.measure(lambda: nullcontext(head), lambda batch: final_hidden(student, batch), description)


@torch.no_grad()
def measure_streams(reference: Any, student: Any, pairs: Iterable[tuple[Stream, Stream]], width: int) -> Measurement:
    """The same of texts that were carried to the end of the layers (recovery.layerwise): the reference's and the
    student's stream of each."""
    # The models lie on the host; the heads' products are worth the device.
    where = device()
    theirs_head, own_head = head_of(reference, width).to(where), head_of(student, width).to(where)
    tally = Tally()
    for theirs, own in pairs:
        batch = theirs.batch
        theirs_NH = end(reference, theirs)[batch.loss_N].to(where)
        own_NH = end(student, own)[batch.loss_N].to(where)
        tally.add(batch, compare(own_NH, own_head, DenseTargets(theirs_NH, theirs_head), batch.next_N.to(where)))
    return tally.measurement()


class HeldOut:
    """Held-out text with a teacher signal. keep: remember the reference's states between measurements."""

    def __init__(
        self,
        tokens: Tokens,
        teacher: DenseTeacher,
        device: torch.device,
        micro_batch_tokens: int,
        *,
        keep: bool = False,
    ) -> None:
        self._tokens = tokens
        self._teacher: DenseTeacher | None = teacher
        self._head = teacher.head
        self._device = device
        self._rows = micro_batches_of(tokens, micro_batch_tokens)
        self._kept: dict[int, Tensor] | None = {} if keep else None

    def _targets(self, number: int, batch: Batch) -> DenseTargets:
        kept = None if self._kept is None else self._kept.get(number)
        if kept is not None:
            return DenseTargets(kept.to(self._device), self._head)
        assert self._teacher is not None, "a text that was remembered has all of its states"
        targets = self._teacher.targets(batch, self._teacher.fetch(batch.rows))
        if self._kept is not None:
            self._kept[number] = targets.hidden_NG.cpu()
        return targets

    def remember(self, description: str) -> None:
        """Take in all of the reference's states; it is not asked again."""
        for number, batch in self._batches(description):
            self._targets(number, batch)
        self._teacher = None

    def _batches(self, description: str | None) -> Iterator[tuple[int, Batch]]:
        bar = progress(int(self._tokens.lengths.sum()), "tok", description) if description else None
        for number, rows in enumerate(self._rows):
            yield number, collate(self._tokens, rows).to(self._device)
            if bar is not None:
                bar.update(int(sum(self._tokens.lengths[row] for row in rows)))
        if bar is not None:
            bar.close()

    @torch.no_grad()
    def measure(
        self,
        head: Callable[[], AbstractContextManager[Head]],
        hidden_of: Callable[[Batch], Tensor],
        description: str | None = None,
    ) -> Measurement:
        """head: gives the student's head, entered for each batch after its hidden states are there.

        hidden_of: a batch to the student's final hidden states (T, H). description: show a progress bar.
        """
        tally = Tally()
        for number, batch in self._batches(description):
            hidden_NH = hidden_of(batch)[batch.loss_N]
            targets = self._targets(number, batch)
            with head() as student_head:
                tally.add(batch, compare(hidden_NH, student_head, targets, batch.next_N))
        return tally.measurement()
