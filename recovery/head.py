"""The output head: final hidden states to logits and back, in float32 whatever the model's dtype.

T tokens, H hidden width, V logits in use. Rounding logits or their gradient to bf16 is what makes other losses wrong
by several percent, so neither is ever rounded:

- float32 (and float64) heads: plain products;
- bf16 heads on a CPU, which has no product of bf16 factors with a float32 result: tiles of the head are widened, one
  at a time, and multiplied in float32;
- bf16 heads on a GPU: bf16 factors, float32 accumulation and result; the gradient to the logits goes in as the sum of
  two bf16 numbers, which keeps 16 of its 24 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

TILE_ROWS = 2048


@dataclass(frozen=True)
class Head:
    """What turns final hidden states (T, H) into logits (T, V): rows beyond the tokenizer's are cut off."""

    weight_VH: Tensor
    bias_V: Tensor | None
    scale: float
    softcap: float | None

    @property
    def width(self) -> int:
        return len(self.weight_VH)

    def to(self, device: torch.device) -> Head:
        bias_V = None if self.bias_V is None else self.bias_V.to(device)
        return replace(self, weight_VH=self.weight_VH.to(device), bias_V=bias_V)

    def logits(self, hidden_TH: Tensor, out_TV: Tensor | None = None) -> Tensor:
        """Logits (T, V), float32 (float64 of float64 states), written into `out_TV` where it is given."""
        if out_TV is None:
            dtype = torch.promote_types(hidden_TH.dtype, torch.float32)
            out_TV = torch.empty(len(hidden_TH), self.width, dtype=dtype, device=hidden_TH.device)
        _project(hidden_TH, self.weight_VH, out_TV)
        if self.bias_V is not None:
            out_TV += self.bias_V.to(out_TV.dtype)
        if self.scale != 1.0:
            out_TV *= self.scale
        if self.softcap is not None:
            out_TV.div_(self.softcap).tanh_().mul_(self.softcap)
        return out_TV

    def backward(self, gradient_TV: Tensor, logits_TV: Tensor | None) -> Tensor:
        """The gradient to the hidden states (T, H), of a gradient to the logits (overwritten) and in its dtype.

        logits_TV: what `logits` returned; needed where they are capped.
        """
        if self.softcap is not None:
            assert logits_TV is not None, "the derivative of the cap needs the logits"
            gradient_TV *= 1 - (logits_TV / self.softcap).square()
        if self.scale != 1.0:
            gradient_TV *= self.scale
        return _project_back(gradient_TV, self.weight_VH)


def _project(hidden_TH: Tensor, weight_VH: Tensor, out_TV: Tensor) -> None:
    """out = hidden @ weight.T"""
    if hidden_TH.is_cuda and weight_VH.dtype == out_TV.dtype:
        torch.mm(hidden_TH.to(out_TV.dtype), weight_VH.T, out=out_TV)
    elif hidden_TH.is_cuda and hidden_TH.dtype == weight_VH.dtype:
        out_TV.copy_(torch.mm(hidden_TH, weight_VH.T, out_dtype=torch.float32))
    else:
        # A float32 head in tiles too: on CPUs an eighth faster than in one product.
        wide_TH = hidden_TH.to(out_TV.dtype)
        for rows, tile_RH in _tiles(weight_VH, out_TV.dtype):
            out_TV[:, rows] = _linear(wide_TH, tile_RH)


def _project_back(gradient_TV: Tensor, weight_VH: Tensor) -> Tensor:
    """gradient @ weight"""
    if weight_VH.dtype == gradient_TV.dtype:
        return _linear(gradient_TV, weight_VH.T)
    if gradient_TV.is_cuda:
        high_TV, low_TV = split(gradient_TV, weight_VH.dtype)
        product_TH = torch.mm(high_TV, weight_VH, out_dtype=torch.float32)
        return product_TH.add_(torch.mm(low_TV, weight_VH, out_dtype=torch.float32))
    product_TH = gradient_TV.new_zeros(len(gradient_TV), weight_VH.shape[1])
    for rows, tile_RH in _tiles(weight_VH, gradient_TV.dtype):
        product_TH += _linear(gradient_TV[:, rows], tile_RH.T)
    return product_TH


def _linear(rows_TK: Tensor, weight_OK: Tensor) -> Tensor:
    """rows @ weight.T (T, O), without a gradient; of float32 on a CPU by oneDNN, which torch asks for compiled models
    only: in float32 throughout, and on AMD's processors twice as fast as MKL's product."""
    if rows_TK.device.type == "cpu" and rows_TK.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(rows_TK, weight_OK, None, "none", [], "")
    return rows_TK @ weight_OK.T


def split(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(high, low) of a narrow dtype whose sum is `values` up to twice that dtype's precision."""
    high = values.to(dtype)
    return high, (values - high).to(dtype)


def _tiles(weight_VH: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Row ranges of the head and these rows in `dtype`: as they are, or widened through one buffer."""
    if weight_VH.dtype == dtype:
        for first in range(0, len(weight_VH), TILE_ROWS):
            part_RH = weight_VH[first : first + TILE_ROWS]
            yield slice(first, first + len(part_RH)), part_RH
        return
    buffer_RH = torch.empty(min(TILE_ROWS, len(weight_VH)), weight_VH.shape[1], dtype=dtype, device=weight_VH.device)
    for first in range(0, len(weight_VH), TILE_ROWS):
        part_RH = weight_VH[first : first + TILE_ROWS]
        yield slice(first, first + len(part_RH)), buffer_RH[: len(part_RH)].copy_(part_RH)
