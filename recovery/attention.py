"""Attention over packed samples: many samples in one row of tokens, each looking at itself alone.

Registered with transformers under its own name, so any architecture that takes its attention from the
AttentionInterface runs packed batches. Every sample's causal attention is computed by itself: the work is that of the
samples, not of a (tokens x tokens) mask, and torch's fused kernel of the device does it. A sample may be a tree: a
context once, and behind it several continuations that do not see each other.

B = 1, Q query heads, K key heads, T tokens of all samples, L of one, D head width.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class Tree:
    """Who sees whom in a sample that branches: a token sees the trunk and its own branch, back from its own place."""

    def __init__(self, branch_L: Tensor, place_L: Tensor) -> None:
        """branch_L: int64, 0 on the trunk, from 1 on the branches. place_L: int64, tokens before it on its path."""
        self._branch_L = branch_L
        self._place_L = place_L
        self._masks: dict[int | None, Tensor] = {}

    def mask(self, sliding_window: int | None) -> Tensor:
        """(L, L) bool, the same for all layers of a window."""
        if sliding_window not in self._masks:
            distance_LL = self._place_L[:, None] - self._place_L[None, :]
            seen_LL = (self._branch_L[None, :] == 0) | (self._branch_L[None, :] == self._branch_L[:, None])
            seen_LL &= distance_LL >= 0
            self._masks[sliding_window] = (
                seen_LL if sliding_window is None else seen_LL & (distance_LL < sliding_window)
            )
        return self._masks[sliding_window]


NAME = "recover_lora_packed"


def packed_attention(
    _module: Any,
    query_BQTD: Tensor,
    key_BKTD: Tensor,
    value_BKTD: Tensor,
    attention_mask: Tensor | None,
    *,
    bounds: tuple[int, ...],
    trees: tuple[Tree | None, ...] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """(B, T, Q, D). bounds: where each sample begins, and the end: (0, ..., T). trees: of the samples that branch."""
    assert attention_mask is None, "samples are kept apart by their bounds, not by a mask"
    assert dropout == 0, "attention dropout is not there"
    assert s_aux is None, "attention sinks are not there"
    if sliding_window is None:  # Qwen2-MoE's window is in the mask alone
        sliding_window = getattr(_module, "sliding_window", None)
    grouped = query_BQTD.shape[1] != key_BKTD.shape[1]
    parts = []
    for number, (first, end) in enumerate(itertools.pairwise(bounds)):
        tree = trees[number] if trees is not None else None
        query, key, value = (x[:, :, first:end] for x in (query_BQTD, key_BKTD, value_BKTD))
        if tree is not None:
            window = tree.mask(sliding_window)
        else:
            window = _window(end - first, sliding_window, query_BQTD.device)
        if softcap is not None:
            parts.append(_capped(query, key, value, scaling, softcap, window))
        else:
            parts.append(
                torch.nn.functional.scaled_dot_product_attention(
                    query, key, value, attn_mask=window, is_causal=window is None, scale=scaling, enable_gqa=grouped
                )
            )
    whole_BQTD = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return whole_BQTD.transpose(1, 2).contiguous(), None


def _window(length: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """(L, L) bool, causal and no further back than the window; None where causal says it all."""
    if sliding_window is None or length <= sliding_window:
        return None
    place_L = torch.arange(length, device=device)
    distance_LL = place_L[:, None] - place_L[None, :]
    return (distance_LL >= 0) & (distance_LL < sliding_window)


def _capped(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, softcap: float, window: Tensor | None
) -> Tensor:
    """Attention with soft-capped scores (Gemma2), which no fused kernel has."""
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores_BQLL = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores_BQLL = torch.tanh(scores_BQLL / softcap) * softcap
    if window is None:
        window = torch.ones(length, length, dtype=torch.bool, device=query.device).tril_()
    scores_BQLL = scores_BQLL.masked_fill(~window, -torch.inf)
    return torch.softmax(scores_BQLL, dim=-1, dtype=torch.float32).to(query.dtype) @ value


def use_packed_attention(model: Any) -> str:
    """Switch a transformers model to packed attention; returns the name of the attention it had."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
    before = str(model.config._attn_implementation)
    model.set_attn_implementation(NAME)
    return before


@contextlib.contextmanager
def packed(model: Any) -> Iterator[None]:
    """Packed attention for a while."""
    before = use_packed_attention(model)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
