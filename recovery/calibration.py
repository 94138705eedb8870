"""The texts that a repair looks at: the first samples of the corpus, shared between ranks, a forward pass at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recovery.batches import Batch, collate, pack
from recovery.corpus import Tokens

FORWARD_TOKENS = 2048
"""Tokens of one forward pass."""


def calibration_rows(tokens: Tokens, wanted: int) -> list[int]:
    """The first samples, until they have that many tokens: a larger calibration holds every smaller one."""
    rows: list[int] = []
    total = 0
    for row, length in enumerate(tokens.lengths.tolist()):
        if total >= wanted:
            break
        rows.append(row)
        total += length
    return rows


def batches_of(tokens: Tokens, rows: Sequence[int], rank: int, ranks: int) -> tuple[list[Batch], bool]:
    """This rank's share of the rows, and whether there is any; without one it goes the same way with another's, and
    must learn nothing from it."""
    groups = pack(list(rows), tokens.lengths, FORWARD_TOKENS)
    own = groups[rank::ranks]
    return [collate(tokens, group) for group in own or groups[:1]], bool(own)


def places_of(batch: Batch, tokens: Tokens, rows: Sequence[int]) -> Tensor:
    """int64 (T,): where the batch's tokens stand in the text of all these rows, one behind the other."""
    ends = dict(zip(rows, tokens.lengths[list(rows)].cumsum().tolist(), strict=True))
    return torch.cat([torch.arange(ends[row] - int(tokens.lengths[row]), ends[row]) for row in batch.rows])
