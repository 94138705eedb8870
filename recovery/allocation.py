"""Where ranks buy most: a budget of adapter parameters spread over the damaged matrices.

Every singular direction of a matrix' wanted change, in the metric of recovery.closed_form with recovery.curvature's
G, saves half its square in nats a token and costs inputs + outputs parameters. The dearest come first: directions of a
matrix are in falling order, so what is taken is the first ranks of each. A layer's experts, which have one rank, are
bought together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recovery.closed_form import OutputMetric
from recovery.curvature import Sensitivity


@dataclass(frozen=True)
class Spectrum:
    """Of one matrix, or of one parameter of a layer's experts."""

    gains_K: Tensor
    """float64, falling: nats a token that the first, second, ... rank saves, to second order"""
    parameters: int
    """that one rank costs"""


def spectrum(
    reference_OI: Tensor, degraded_OI: Tensor, sensitivity: Sensitivity, damping: float, output_damping: float
) -> Spectrum:
    outputs = OutputMetric(sensitivity.curvature, output_damping)
    change_OI = sensitivity.weighed(reference_OI, degraded_OI, damping, outputs)
    # Of the smaller Gram matrix: many times faster than a singular value decomposition, and exact enough to compare.
    gram = change_OI @ change_OI.T if len(change_OI) <= change_OI.shape[1] else change_OI.T @ change_OI
    energies_K = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0.0)
    return Spectrum((0.5 * sensitivity.share * outputs.mean * energies_K).cpu(), sum(reference_OI.shape))


def of_experts(spectra: Sequence[Spectrum], experts: int) -> Spectrum:
    """Of all experts' matrices, with one rank for all of them. spectra: of those that tokens came by."""
    gains_K = torch.stack([one.gains_K for one in spectra]).sum(0)
    return Spectrum(gains_K, experts * spectra[0].parameters)


def allocate(spectra: Mapping[str, Spectrum], budget: int) -> dict[str, int]:
    """The rank of each module that gets any; together at most `budget` parameters."""
    offers = sorted(
        (
            (-float(gain) / found.parameters, name, place)
            for name, found in spectra.items()
            for place, gain in enumerate(found.gains_K.tolist())
            if gain > 0
        ),
    )
    ranks: dict[str, int] = {}
    left = budget
    for _, name, place in offers:
        # A direction too dear for what is left shuts its module: later ones without it would be worth less than said.
        if spectra[name].parameters <= left and ranks.get(name, 0) == place:
            ranks[name] = place + 1
            left -= spectra[name].parameters
    return {name: ranks[name] for name in spectra if name in ranks}
