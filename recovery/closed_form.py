"""The best low-rank change of one linear layer, in closed form.

A layer y = W x of O outputs and I inputs lost its weights W_ref and has W_deg. Two ways to ask for A (R, I) and
B (O, R) so that (W_deg + B A) x_s comes nearest to what the reference gives, in mean square over calibration tokens:

- independent (QERA, arXiv 2410.06040; EoRA, arXiv 2410.21271): x_s is the reference's own input, so the wanted change
  is W_ref - W_deg, weighed by the inputs' second moment;
- sequential: x_s is what the student, repaired in its earlier layers, really feeds the layer, x_t what the reference
  feeds it. The wanted output is W_ref (a x_t + (1 - a) x_s), so that the layer also makes good what its inputs lost:
  a reduced-rank regression.

Both are one formula. With C = E[x_s x_s^T], X = E[x_t x_s^T] and a ridge l, the unrestricted solution is
M = (W_ref (a X + (1 - a) C) - W_deg C + l (W_ref - W_deg)) (C + l I)^-1, and the best rank-R one truncates the singular
value decomposition of M (C + l I)^(1/2). The ridge pulls towards the plain difference of weights, not towards zero, and
the same ridged moment is in both places, so that moments without full rank do no harm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TINY = 1e-30
DEAD = 1e-7
"""Singular values below this share of the largest are rounding."""


@dataclass
class Moments:
    """Second moments of one layer's inputs over calibration tokens, float64 sums on the inputs' device."""

    own_II: Tensor
    """sum of x_s x_s^T"""
    cross_II: Tensor
    """sum of x_t x_s^T"""
    tokens: Tensor
    """float64 scalar"""

    @classmethod
    def zero(cls, width: int, device: torch.device) -> Moments:
        own, cross = (torch.zeros(width, width, dtype=torch.float64, device=device) for _ in range(2))
        return cls(own, cross, torch.zeros((), dtype=torch.float64, device=device))

    def add(self, student_TI: Tensor, reference_TI: Tensor) -> None:
        """Inputs at the same tokens; products in float32 at least, summed in float64."""
        wide = torch.promote_types(student_TI.dtype, torch.float32)
        student_TI, reference_TI = student_TI.to(wide), reference_TI.to(wide)
        self.own_II += student_TI.T @ student_TI
        self.cross_II += reference_TI.T @ student_TI
        self.tokens += len(student_TI)

    def all_reduce(self) -> None:
        for tensor in (self.own_II, self.cross_II, self.tokens):
            torch.distributed.all_reduce(tensor)


@dataclass(frozen=True)
class Factors:
    """B A is the change of the weights; both float64, of equal scale."""

    a_RI: Tensor
    b_OR: Tensor
    kept: float
    """Share of the wanted change (squared, in the moments' metric) that the rank keeps; 1 where nothing is wanted."""


class Metric:
    """The ridged second moment of a layer's inputs, decomposed once for all the layers that share these inputs."""

    def __init__(self, moments: Moments, damping: float) -> None:
        """damping: the ridge, as a share of the mean square of an input."""
        tokens = moments.tokens.clamp(min=1.0)
        self.own_II, self.cross_II = moments.own_II / tokens, moments.cross_II / tokens
        self.ridge = float(damping * self.own_II.diagonal().mean()) + TINY
        values_I, self.vectors_II = torch.linalg.eigh((self.own_II + self.own_II.T) / 2)
        self.roots_I = (values_I.clamp(min=0.0) + self.ridge).sqrt()

    def factors(self, reference_OI: Tensor, degraded_OI: Tensor, rank: int, blend: float) -> Factors:
        """The best A and B for these weights. blend: the share a of the reference's own input in the target."""
        reference_OI, degraded_OI = reference_OI.double(), degraded_OI.double()
        wanted_OI = reference_OI @ (blend * self.cross_II + (1 - blend) * self.own_II) - degraded_OI @ self.own_II
        wanted_OI += self.ridge * (reference_OI - degraded_OI)
        # M (C + l I)^(1/2), up to a rotation of the inputs that the last line undoes.
        whitened_OI = wanted_OI @ self.vectors_II / self.roots_I
        u_OK, s_K, v_KI = torch.linalg.svd(whitened_OI, full_matrices=False)
        # Exact zeros where nothing is wanted: training may fill these ranks (recovery.repair keeps their random A).
        root_R = torch.where(s_K > DEAD * s_K.max(), s_K, 0.0)[:rank].sqrt()
        energy = s_K.square()
        kept = float(energy[:rank].sum() / energy.sum()) if float(energy.sum()) > 0 else 1.0
        a_RI = root_R[:, None] * v_KI[:rank] / self.roots_I @ self.vectors_II.T
        return Factors(a_RI, u_OK[:, :rank] * root_R, kept)
