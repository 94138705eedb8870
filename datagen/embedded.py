"""The embedded engine: transformers in this process, a fixed range of indices decoded together with a KV cache.

Every row has a seed of its own and one uniform number a position, which picks the token by inverting the cumulative
distribution. The rows of a range share one batch whatever was done before, so a range gives the same bits again.

B rows still running, V logits in use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datagen.config import Generate
from datagen.sampling import Start, uniforms
from recovery.corpus import FinishReason, Sample

# Rows that have ended are dropped from the batch once they make up this share: each drop copies the cache.
DROP_SHARE = 0.25


def draw(logits_BV: Tensor, uniforms_B: Tensor, temperature: float) -> Tensor:
    """Token ids (B,) drawn from softmax(logits / temperature) by inverse transform, in float64.

    uniforms_B: float64 in [0, 1). The full vocabulary takes part: no top-k, no top-p.
    """
    probabilities_BV = torch.softmax(logits_BV.double() / temperature, dim=-1)
    cumulative_BV = probabilities_BV.cumsum_(-1)
    # The last sum is 1 up to rounding; scaling by it keeps every draw inside the vocabulary.
    targets_B1 = (uniforms_B * cumulative_BV[:, -1])[:, None]
    return torch.searchsorted(cumulative_BV, targets_B1, right=True)[:, 0].clamp_(max=logits_BV.shape[-1] - 1)


class EmbeddedEngine:
    """Decodes ranges of samples. model: a transformers causal LM in eval mode; width: logits in use."""

    def __init__(self, model: Any, settings: Generate, width: int, bos: int | None, stops: frozenset[int]) -> None:
        self._model = model
        self._settings = settings
        self._width = width
        self._bos = bos
        self._stops = torch.tensor(sorted(stops), device=model.device)

    @torch.inference_mode()
    def decode(self, starts: Sequence[Start], on_tokens: Callable[[int], None] = lambda _: None) -> list[Sample]:
        """The samples of these starts, in their order. on_tokens is told how many tokens each position added."""
        from transformers import DynamicCache

        settings = self._settings
        prefix = [] if self._bos is None else [self._bos]
        texts = [[*prefix, start.token] for start in starts]
        reasons: list[FinishReason] = ["length"] * len(starts)
        steps = settings.max_length - len(prefix) - 1
        draws = torch.from_numpy(np.stack([uniforms(start.seed, max(steps, 1)) for start in starts]))
        on_tokens(sum(map(len, texts)))

        device = self._model.device
        cache = DynamicCache(config=self._model.config.get_text_config())
        rows = torch.arange(len(starts))
        running = torch.ones(len(starts), dtype=torch.bool)
        ids_BT = torch.tensor(texts, device=device)
        for step in range(steps):
            output = self._model(input_ids=ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits_BV = output.logits[:, -1, : self._width].float()
            if step < settings.greedy_tokens:
                next_B = logits_BV.argmax(-1)
            else:
                next_B = draw(logits_BV, draws[rows, step].to(device), settings.temperature)
            ended = torch.isin(next_B, self._stops).cpu()
            for place, token in enumerate(next_B.tolist()):
                if running[place]:
                    texts[int(rows[place])].append(token)
            on_tokens(int(running.sum()))
            for place in torch.nonzero(ended & running)[:, 0].tolist():
                reasons[int(rows[place])] = "stop"
            running &= ~ended
            if not running.any():
                break
            if (~running).float().mean() >= DROP_SHARE:
                kept = torch.nonzero(running)[:, 0]
                cache.batch_select_indices(kept.to(device))
                next_B, rows, running = next_B[kept.to(device)], rows[kept], running[kept]
            ids_BT = next_B[:, None]
        return [
            Sample(start.index, start.seed, start.token, reason, tuple(text))
            for start, text, reason in zip(starts, texts, reasons, strict=True)
        ]
