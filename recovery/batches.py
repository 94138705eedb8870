"""Batches: which samples make an optimizer step, and how they are packed into forward passes.

The plan is a pure function of (lengths, seed, epoch, token budgets), so every rank derives it alone, a resumed run
finds its place by the step's number, and the global number of loss tokens is known without communication.

A forward pass takes whole samples, one behind the other, without padding between them (recovery.attention keeps them
apart): T tokens of S samples, N of them with loss.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recovery.corpus import Tokens


@dataclass(frozen=True)
class Step:
    """One optimizer step: micro-batches of row positions, over all ranks."""

    micro_batches: tuple[tuple[int, ...], ...]
    loss_tokens: int

    def of_rank(self, rank: int, ranks: int) -> list[tuple[int, ...]]:
        """The micro-batches of one rank; every rank gets as many (empty ones at the end where they run out)."""
        rounds = -(-len(self.micro_batches) // ranks)
        padded = [*self.micro_batches, *[()] * (rounds * ranks - len(self.micro_batches))]
        return padded[rank::ranks]


@dataclass(frozen=True)
class Batch:
    """Samples packed into one row of tokens."""

    rows: tuple[int, ...]
    """Positions of the samples in their split."""
    ids_T: Tensor
    """int64"""
    positions_T: Tensor
    """int64: each token's place in its own sample."""
    bounds: tuple[int, ...]
    """(0, ..., T): where each sample begins, and the end."""
    loss_N: Tensor
    """int64: places in the row that carry loss."""
    next_N: Tensor
    """int64: the ids that follow there."""

    @property
    def owners_N(self) -> Tensor:
        """int64: the sample of each place that carries loss, counted within the batch."""
        ends = torch.tensor(self.bounds[1:], device=self.loss_N.device)
        return torch.searchsorted(ends, self.loss_N, right=True)

    def to(self, device: torch.device) -> Batch:
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> Batch:
        """In page-locked memory, from which a GPU copies without the host waiting."""
        return self.each(Tensor.pin_memory)

    def without_loss(self) -> Batch:
        """The same forward pass, of which nothing is learned."""
        return replace(self, loss_N=self.loss_N[:0], next_N=self.next_N[:0])

    def each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same with every tensor changed."""
        names = ("ids_T", "positions_T", "loss_N", "next_N")
        return replace(self, **{name: change(getattr(self, name)) for name in names})


def plan_epoch(
    lengths: NDArray[np.int64], skip: int, seed: int, epoch: int, batch_tokens: int, micro_batch_tokens: int
) -> list[Step]:
    """The steps of one epoch over samples of these lengths, in a seeded order.

    skip: leading positions of every sample that carry no loss (1 where a beginning-of-text id stands in front).
    A step takes samples until the next would exceed batch_tokens; its micro-batches hold at most micro_batch_tokens;
    a sample longer than a budget goes alone.
    """
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(len(lengths))
    steps: list[Step] = []
    group: list[int] = []
    tokens = 0
    for position in order.tolist():
        length = int(lengths[position])
        if group and tokens + length > batch_tokens:
            steps.append(_step(group, lengths, skip, micro_batch_tokens))
            group, tokens = [], 0
        group.append(position)
        tokens += length
    if group:
        steps.append(_step(group, lengths, skip, micro_batch_tokens))
    return steps


def _step(group: list[int], lengths: NDArray[np.int64], skip: int, budget: int) -> Step:
    loss_tokens = sum(loss_positions(int(lengths[position]), skip) for position in group)
    return Step(pack(group, lengths, budget), loss_tokens)


def pack(group: list[int], lengths: NDArray[np.int64], budget: int) -> tuple[tuple[int, ...], ...]:
    """Micro-batches of at most `budget` tokens: best fit, longest first (each sample goes where least room stays)."""
    by_length = sorted(group, key=lambda position: (-int(lengths[position]), position))
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), in order
    for position in by_length:
        length = int(lengths[position])
        place = bisect.bisect_left(room, (length, -1))
        if place < len(room):
            left, number = room.pop(place)
        else:
            left, number = max(budget, length), len(bins)
            bins.append([])
        bins[number].append(position)
        bisect.insort(room, (left - length, number))
    return tuple(tuple(rows) for rows in bins)


def loss_positions(length: int, skip: int) -> int:
    """A position carries loss when it predicts a token of the sample and is not one of the `skip` first."""
    return max(0, length - 1 - skip)


def idle_share(plan: list[Step], lengths: NDArray[np.int64], micro_batch_tokens: int) -> float:
    """The share of all micro-batches' room that no sample fills: what padding them to their budget would waste."""
    used = sum(int(lengths[row]) for step in plan for rows in step.micro_batches for row in rows)
    room = sum(
        max(micro_batch_tokens, sum(int(lengths[row]) for row in rows)) for step in plan for rows in step.micro_batches
    )
    return 1 - used / room if room else 0.0


def collate(tokens: Tokens, rows: tuple[int, ...]) -> Batch:
    """The rows, one behind the other, on the CPU."""
    samples = [tokens.row(row) for row in rows]
    lengths = [len(sample) for sample in samples]
    bounds = (0, *np.cumsum(lengths).tolist())
    ids = np.concatenate(samples).astype(np.int64)
    places = [
        np.arange(start + tokens.skip, start + length - 1) for start, length in zip(bounds, lengths, strict=False)
    ]
    loss = np.concatenate(places).astype(np.int64)
    return Batch(
        rows,
        torch.from_numpy(ids),
        torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        bounds,
        torch.from_numpy(loss),
        torch.from_numpy(ids[loss + 1]),
    )


def micro_batches_of(tokens: Tokens, micro_batch_tokens: int) -> list[tuple[int, ...]]:
    """All rows in packed micro-batches, for measuring."""
    return list(pack(list(range(len(tokens))), tokens.lengths, micro_batch_tokens))
