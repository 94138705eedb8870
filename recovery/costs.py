"""What damaged weights cost a model, and what adapters would give back: on a small text, before anything is trained.

Both models are walked layer by layer on the same text, which gives the drift of the activations and KL. What a single
damaged matrix costs is recovery.curvature's estimate, to second order, checked by putting the dearest ones right for
real. The estimates of all matrices together exceed the KL where damage is large, as a distribution can only become so
wrong; KL = s (1 - exp(-Q / s)), with the one s that fits the measured KL, turns estimates Q into forecasts.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from recovery.allocation import Spectrum
from recovery.batches import Batch
from recovery.calibration import batches_of
from recovery.corpus import Tokens
from recovery.curvature import sensitivities
from recovery.layerwise import Stream, begin, layers_of, on_device, output_of
from recovery.measure import Measurement, measure_streams
from recovery.models import check_training_path, device, share_equal
from recovery.placement import matrices
from recovery.progress import progress
from recovery.survey import differing, names_by_layer, spectra_in

Places = frozenset[str]
"""Full names of matrices with adapters."""
DAMPING = 1e-4
"""Of both metrics: next to nothing, as the estimates are to be those of the damage itself."""


@dataclass(frozen=True)
class Restored:
    """One matrix put right for real."""

    module: str
    predicted: float
    """KL that this should save, nats"""
    measured: float


@dataclass(frozen=True)
class Forecast:
    """What adapters of one rank on all damaged matrices leave."""

    rank: int
    parameters: int
    kl: float
    recovery: float
    """1 - kl / the degraded model's"""


@dataclass(frozen=True)
class Costs:
    tokens: int
    degraded: Measurement
    drift: tuple[float, ...]
    """||x_degraded - x_reference|| / ||x_reference|| behind every layer"""
    floor: float
    """KL with all of `nats`' matrices put right: of damage that adapters on them do not reach"""
    nats: dict[str, float]
    """KL that each damaged matrix of the layers (of experts, all together) causes by itself, to second order"""
    restored: tuple[Restored, ...]
    forecasts: tuple[Forecast, ...]


@dataclass(frozen=True)
class Weighed:
    """costs, and what forecasts for other adapters are made from."""

    costs: Costs
    spectra: dict[str, Spectrum]
    floors: dict[Places, float]
    """KL with just these matrices put right"""


def saturation(total: float, kl: float) -> float:
    """The s at which s (1 - exp(-total / s)) is the measured kl; infinite where the estimate is not above it."""
    if total <= kl or kl <= 0:
        return math.inf
    low, high = kl, kl
    while high * -math.expm1(-total / high) < kl:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if middle * -math.expm1(-total / middle) < kl else (low, middle)
    return high


def saturated(estimate: float, total: float, kl: float) -> float:
    """The KL of damage whose estimate is this, where `total` was measured as `kl`."""
    ceiling = saturation(total, kl)
    if math.isinf(ceiling):  # everything is smaller than estimated, or larger: in proportion
        return estimate * kl / total if total > 0 else 0.0
    return ceiling * -math.expm1(-estimate / ceiling)


def predict(spectra: Mapping[str, Spectrum], ranks: Mapping[str, int], kl: float, floor: float) -> float:
    """The KL that a closed form of these ranks leaves, by module. floor: the KL with just these modules put right."""
    adapted = {name: rank for name, rank in ranks.items() if name in spectra}
    total = sum(float(spectra[name].gains_K.sum()) for name in adapted)
    left = sum(float(spectra[name].gains_K[rank:].sum()) for name, rank in adapted.items())
    return floor + saturated(left, total, kl - floor)


def forecast(spectra: Mapping[str, Spectrum], kl: float, floor: float) -> tuple[Forecast, ...]:
    """For powers of two up to half of the narrowest matrix' rank. floor: as in Costs."""
    narrowest = min(len(found.gains_K) for found in spectra.values())
    ranks = [1 << power for power in range(2, 12) if 1 << power <= narrowest // 2] or [1]
    forecasts = []
    for rank in ranks:
        predicted = predict(spectra, dict.fromkeys(spectra, rank), kl, floor)
        parameters = sum(rank * found.parameters for found in spectra.values())
        forecasts.append(Forecast(rank, parameters, predicted, 1 - predicted / kl))
    return tuple(forecasts)


@torch.no_grad()
def drift_of(reference: Any, degraded: Any, pairs: Sequence[tuple[Stream, Stream]]) -> list[float]:
    """Carry the texts through all layers; the relative L2 difference of the states behind each."""
    where, found = device(), []
    for number, layers in enumerate(zip(layers_of(reference), layers_of(degraded), strict=True)):
        wrong = right = 0.0
        with on_device(where, *layers):
            for pair in pairs:
                for layer, stream in zip(layers, pair, strict=True):
                    stream.states_1TH = output_of(layer, number, stream, where).cpu()
                wrong += float((pair[1].states_1TH - pair[0].states_1TH).double().square().sum())
                right += float(pair[0].states_1TH.double().square().sum())
        found.append(math.sqrt(wrong / max(right, 1e-30)))
    return found


def weigh(
    reference: Any,
    degraded: Any,
    tokens: Tokens,
    width: int,
    seed: int,
    checked: int = 3,
    places: Collection[Places] = (),
) -> Weighed:
    """Everything above for these two models, which lie on the CPU. checked: matrices that are put right for real.
    places: where else than on all damaged matrices adapters are to be forecast."""
    share_equal(degraded, reference)
    for model, name in ((reference, "REFERENCE"), (degraded, "DEGRADED")):
        check_training_path(model, width, name)
    batches, _ = batches_of(tokens, range(len(tokens)), 0, 1)

    def measured() -> tuple[list[float], Measurement]:
        pairs = [(begin(reference, batch), begin(degraded, batch)) for batch in batches]
        found = drift_of(reference, degraded, pairs)
        return found, measure_streams(reference, degraded, pairs, width)

    def with_right(names: Sequence[str]) -> float:
        """KL with these matrices put right for a moment."""
        own, theirs = matrices(degraded), matrices(reference)
        wrong = {name: own[name].data for name in names}
        for name in names:
            own[name].data = theirs[name].data
        found = measured()[1].kl
        for name, data in wrong.items():
            own[name].data = data
        return found

    drift, before = measured()
    spectra = spectra_of(reference, degraded, batches, width, seed)
    nats = {name: float(found.gains_K.sum()) for name, found in spectra.items()}
    if not nats:
        return Weighed(Costs(before.tokens, before, tuple(drift), before.kl, {}, (), ()), {}, {})
    total, floor = sum(nats.values()), min(with_right(list(nats)), before.kl)
    restored = []
    for name in sorted(nats, key=nats.__getitem__, reverse=True)[:checked]:
        predicted = before.kl - floor - saturated(total - nats[name], total, before.kl - floor)
        restored.append(Restored(name, predicted, before.kl - with_right([name])))
    forecasts = forecast(spectra, before.kl, floor)
    floors = {
        place: floor if place >= set(nats) else min(with_right([name for name in nats if name in place]), before.kl)
        for place in places
    }
    return Weighed(Costs(before.tokens, before, tuple(drift), floor, nats, tuple(restored), forecasts), spectra, floors)


def spectra_of(reference: Any, degraded: Any, batches: Sequence[Batch], width: int, seed: int) -> dict[str, Spectrum]:
    """Of every damaged matrix in the layers, in the model's order."""
    names = differing(reference, degraded)
    inside = names_by_layer(reference, names)
    theirs, own = matrices(reference), matrices(degraded)
    streams = [begin(reference, batch) for batch in batches]
    spectra: dict[str, Spectrum] = {}
    bar = progress(len(inside), "layer", "cost")
    for number, found in sensitivities(reference, streams, inside, width, seed, device(), with_inputs=True):
        spectra |= spectra_in(theirs, own, inside[number], found, DAMPING, DAMPING)
        bar.update(1)
    bar.close()
    return {name: spectra[name] for name in names if name in spectra}
