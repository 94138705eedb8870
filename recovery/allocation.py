"""Where ranks buy most: a budget of adapter parameters spread over the damaged modules.

Every singular direction of a module's wanted change, in the metric of recovery.closed_form with recovery.curvature's
G, saves half its square in nats a token and costs inputs + outputs parameters. The dearest come first: directions of a
module are in falling order, so what is taken is the first ranks of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from recovery.closed_form import Metric, OutputMetric
from recovery.curvature import Sensitivity


@dataclass(frozen=True)
class Spectrum:
    """Of one module."""

    gains_K: Tensor
    """float64, falling: nats a token that the first, second, ... rank saves, to second order"""
    parameters: int
    """that one rank costs"""


def spectrum(
    reference_OI: Tensor, degraded_OI: Tensor, sensitivity: Sensitivity, damping: float, output_damping: float
) -> Spectrum:
    assert sensitivity.inputs is not None, "made without the moments of the inputs"
    outputs = OutputMetric(sensitivity.curvature, output_damping)
    change_OI = Metric(sensitivity.inputs, damping).whitened(reference_OI, degraded_OI, 0.0, outputs)
    # Of the smaller Gram matrix: many times faster than a singular value decomposition, and exact enough to compare.
    gram = change_OI @ change_OI.T if len(change_OI) <= change_OI.shape[1] else change_OI.T @ change_OI
    energies_K = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0.0)
    return Spectrum((0.5 * outputs.mean * energies_K).cpu(), sum(reference_OI.shape))


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
