"""Batches: which samples make an optimizer step, and how a step is cut into forward passes.

The plan is a pure function of (lengths, seed, epoch, token budgets), so every rank derives it alone, a resumed run
finds its place by the step's number, and the global number of loss tokens is known without communication.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    """Right-padded rows: ids (B, T) int64, and which positions carry loss (B, T) bool."""

    ids_BT: Tensor
    mask_BT: Tensor


def plan_epoch(
    lengths: NDArray[np.int64], skip: int, seed: int, epoch: int, batch_tokens: int, micro_batch_tokens: int
) -> list[Step]:
    """The steps of one epoch over samples of these lengths, in a seeded order.

    skip: leading positions of every sample that carry no loss (1 where a beginning-of-text id stands in front).
    A step takes samples until the next would exceed batch_tokens; a micro-batch holds rows of similar length whose
    padded size stays within micro_batch_tokens; a sample longer than a budget goes alone.
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
    by_length = sorted(group, key=lambda position: (-int(lengths[position]), position))
    micro_batches: list[list[int]] = []
    widest = 0
    for position in by_length:
        if micro_batches and (len(micro_batches[-1]) + 1) * widest <= budget:
            micro_batches[-1].append(position)
        else:
            micro_batches.append([position])
            widest = int(lengths[position])
    loss_tokens = sum(loss_positions(int(lengths[position]), skip) for position in group)
    return Step(tuple(tuple(rows) for rows in micro_batches), loss_tokens)


def loss_positions(length: int, skip: int) -> int:
    """A position carries loss when it predicts a token of the sample and is not one of the `skip` first."""
    return max(0, length - 1 - skip)


def collate(tokens: Tokens, rows: tuple[int, ...], device: torch.device) -> Batch:
    """The rows, padded on the right with id 0 (no causal model looks there)."""
    samples = [tokens.row(position) for position in rows]
    width = max(len(sample) for sample in samples)
    ids = np.zeros((len(samples), width), dtype=np.int64)
    mask = np.zeros((len(samples), width), dtype=bool)
    for number, sample in enumerate(samples):
        ids[number, : len(sample)] = sample
        mask[number, tokens.skip : len(sample) - 1] = True
    return Batch(
        torch.from_numpy(ids).to(device, non_blocking=True),
        torch.from_numpy(mask).to(device, non_blocking=True),
    )


def micro_batches_of(tokens: Tokens, micro_batch_tokens: int) -> list[tuple[int, ...]]:
    """All rows in micro-batches of similar length, for measuring."""
    rows = list(range(len(tokens)))
    return list(_step(rows, tokens.lengths, 0, micro_batch_tokens).micro_batches) if rows else []
