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

Outputs need not count alike: with G = E[g g^T], g the gradient of the reference's log-probabilities to the layer's
output (recovery.curvature), the change D of the weights costs 1/2 tr(G D C D^T) nats a token, and the best rank-R one
truncates G^(1/2) M (C + l I)^(1/2).

Nor need tokens: C and X may be means weighed by w, how much the reference's distribution depends on the layer there.
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
    """sum of w x_s x_s^T"""
    cross_II: Tensor
    """sum of w x_t x_s^T"""
    tokens: Tensor
    """float64 scalar: sum of w"""

    @classmethod
    def zero(cls, width: int, device: torch.device) -> Moments:
        own, cross = (torch.zeros(width, width, dtype=torch.float64, device=device) for _ in range(2))
        return cls(own, cross, torch.zeros((), dtype=torch.float64, device=device))

    @classmethod
    def alike(cls, width: int, device: torch.device) -> Moments:
        """All inputs count alike: the closed form is then the truncated singular value decomposition."""
        own, cross = (torch.eye(width, dtype=torch.float64, device=device) for _ in range(2))
        return cls(own, cross, torch.ones((), dtype=torch.float64, device=device))

    def add(self, student_TI: Tensor, reference_TI: Tensor, weights_T: Tensor | None = None) -> None:
        """Inputs at the same tokens, and how much each of these counts (1 unless given); products in float32 at least,
        summed in float64."""
        wide = torch.promote_types(student_TI.dtype, torch.float32)
        student_TI, reference_TI = student_TI.to(wide), reference_TI.to(wide)
        weighed_TI = student_TI if weights_T is None else student_TI * weights_T.to(wide)[:, None]
        self.own_II += weighed_TI.T @ student_TI
        self.cross_II += reference_TI.T @ weighed_TI
        self.tokens += len(student_TI) if weights_T is None else weights_T.sum(dtype=torch.float64)

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
        self.own_II = moments.own_II / tokens
        # The widest matrices stand here: no copy more than is needed.
        self.cross_II = self.own_II if moments.cross_II is moments.own_II else moments.cross_II / tokens
        self.ridge = float(damping * self.own_II.diagonal().mean()) + TINY
        values_I, self.vectors_II = torch.linalg.eigh(self.own_II)  # of its lower half
        self.roots_I = (values_I.clamp(min=0.0) + self.ridge).sqrt()

    def factors(
        self, reference_OI: Tensor, degraded_OI: Tensor, rank: int, blend: float, outputs: OutputMetric | None = None
    ) -> Factors:
        """The best A and B for these weights; arguments as for `whitened`."""
        whitened_OI = self.whitened(reference_OI, degraded_OI, blend, outputs)
        u_OK, s_K, v_KI = torch.linalg.svd(whitened_OI, full_matrices=False)
        # Exact zeros where nothing is wanted: training may fill these ranks (recovery.repair keeps their random A).
        root_R = torch.where(s_K > DEAD * s_K.max(), s_K, 0.0)[:rank].sqrt()
        energy = s_K.square()
        kept = float(energy[:rank].sum() / energy.sum()) if float(energy.sum()) > 0 else 1.0
        a_RI = root_R[:, None] * v_KI[:rank] / self.roots_I @ self.vectors_II.T
        b_OR = u_OK[:, :rank] * root_R
        return Factors(a_RI, b_OR if outputs is None else outputs.undo(b_OR), kept)

    def whitened(
        self, reference_OI: Tensor, degraded_OI: Tensor, blend: float, outputs: OutputMetric | None = None
    ) -> Tensor:
        """The wanted change in the metric of inputs and outputs, up to rotations of both: its singular values squared
        are what each rank is worth. blend: the share a of the reference's own input in the target; outputs: how much
        each of them counts; None: all alike.
        """
        reference_OI, degraded_OI = reference_OI.double(), degraded_OI.double()
        wanted_OI = reference_OI @ (blend * self.cross_II + (1 - blend) * self.own_II) - degraded_OI @ self.own_II
        wanted_OI += self.ridge * (reference_OI - degraded_OI)
        # M (C + l I)^(1/2), up to a rotation of the inputs that `factors` undoes.
        whitened_OI = wanted_OI @ self.vectors_II / self.roots_I
        return whitened_OI if outputs is None else outputs.weigh(whitened_OI)


class OutputMetric:
    """The ridged square root of G: how much the outputs of a layer count, up to a factor."""

    def __init__(self, curvature: Tensor, damping: float) -> None:
        """curvature: G (O, O), or its diagonal (O) alone, any float dtype. damping: the ridge, as a share of its mean
        diagonal."""
        curvature = curvature.double()
        whole = curvature.dim() == 2
        self.mean = float((curvature.diagonal() if whole else curvature).mean()) + TINY
        """By which G is divided."""
        curvature = curvature / self.mean
        if whole:
            values_O, self._vectors_OO = torch.linalg.eigh((curvature + curvature.T) / 2)
        else:
            values_O, self._vectors_OO = curvature, None
        self._roots_O1 = (values_O.clamp(min=0.0) + damping).sqrt()[:, None]

    def weigh(self, change_OI: Tensor) -> Tensor:
        """G^(1/2) times the change, up to a rotation of the outputs that `undo` knows."""
        rotated_OI = change_OI if self._vectors_OO is None else self._vectors_OO.T @ change_OI
        return self._roots_O1 * rotated_OI

    def undo(self, b_OR: Tensor) -> Tensor:
        """G^(-1/2) times b."""
        scaled_OR = b_OR / self._roots_O1
        return scaled_OR if self._vectors_OO is None else self._vectors_OO @ scaled_OR
