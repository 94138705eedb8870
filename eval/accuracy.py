"""Accuracy recovery, AR%, with paired intervals, and when it means anything.

    AR% = (E_rec - E_deg) / |E_deg - E_ref| * 100                                  (equation 3 of the paper)

where E is the accuracy of the recovered, degraded and reference model on the same items. The denominator is a small
difference of noisy numbers, so AR% is given only where the damage itself is certain; see `recovery`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recovery.errors import UserError

CERTAIN = 3.0
"""Paired standard errors by which the reference must stand above the degraded model."""
FEWEST = 10
"""Items below which nothing is certain, though all of them were lost: paired errors of equal items are zero."""
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Outcomes:
    """0 or 1 for each item of one task, the same items for all three models."""

    reference: NDArray[np.int64]
    degraded: NDArray[np.int64]
    recovered: NDArray[np.int64]

    @property
    def means(self) -> NDArray[np.float64]:
        """(3,): reference, degraded, recovered."""
        return np.array([self.reference.mean(), self.degraded.mean(), self.recovered.mean()])


@dataclass(frozen=True)
class Recovery:
    """AR% of one benchmark or average. gap = E_ref - E_deg and gap_se are fractions; null where there is no item."""

    value: float | None
    low: float | None
    high: float | None
    gap: float | None
    gap_se: float | None
    measurable: bool


NOTHING = Recovery(None, None, None, None, None, False)


def align(
    where: str,
    reference: Sequence[Mapping[str, Any]],
    degraded: Sequence[Mapping[str, Any]],
    recovered: Sequence[Mapping[str, Any]],
) -> Outcomes:
    """The outcomes of three evaluations by item. Raises UserError unless they scored the same items."""
    keys = [[(item["doc_id"], item["doc_hash"]) for item in items] for items in (reference, degraded, recovered)]
    for name, other in (("degraded", keys[1]), ("recovered", keys[2])):
        if other != keys[0]:
            different = set(keys[0]) ^ set(other)
            raise UserError(
                where,
                f"the {name} model was scored on other items than the reference ({len(different)} differ)",
                "evaluate all three on the same data, with the same seed and limit",
            )
    return Outcomes(*(np.array([item["acc"] for item in items]) for items in (reference, degraded, recovered)))


def resample(outcomes: Outcomes, draws: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """(draws, 3) means of the three models, each draw over the same items taken with replacement.

    Items only differ in which models got them right, so a draw is a multinomial over these 8 patterns: the same
    distribution as that of indexed items, at a cost that does not grow with their number.
    """
    count = len(outcomes.reference)
    pattern = 4 * outcomes.reference + 2 * outcomes.degraded + outcomes.recovered
    shares = np.bincount(pattern, minlength=8) / count
    drawn = generator.multinomial(count, shares, size=draws)
    right = np.array([[pattern >> 2 & 1, pattern >> 1 & 1, pattern & 1] for pattern in range(8)])
    return drawn @ right / count


def resample_tasks(outcomes: Mapping[str, Outcomes], draws: int, seed: int) -> dict[str, NDArray[np.float64]]:
    """`resample` of every task, each from a stream of its own that depends on (seed, task) alone."""
    streams = {
        task: np.random.default_rng(
            int.from_bytes(hashlib.sha256(f"bootstrap:{seed}:{task}".encode()).digest()[:8], "big")
        )
        for task in outcomes
    }
    return {task: resample(outcomes[task], draws, streams[task]) for task in outcomes}


def ar_percent(means: NDArray[np.float64]) -> NDArray[np.float64]:
    """Equation 3 for means (..., 3) of reference, degraded and recovered; NaN where there is no gap."""
    reference, degraded, recovered = np.moveaxis(means, -1, 0)
    gap = np.abs(degraded - reference)
    return np.divide(100 * (recovered - degraded), gap, out=np.full_like(gap, np.nan), where=gap > 0)


def recovery(
    outcomes: Mapping[str, Outcomes], draws: Mapping[str, NDArray[np.float64]], weights: Mapping[str, float]
) -> Recovery:
    """AR% of the weighted sum of task accuracies, with its 95% percentile interval.

    It is measurable where E_ref - E_deg is at least three of its paired standard errors, over ten items or more. Not
    its absolute value: a degraded model that scores better has lost nothing that could be recovered, and a repair that
    brings back the reference's behaviour would show as a negative AR%.
    """
    gap = sum(weight * float(np.mean(_lost(outcomes[task]))) for task, weight in weights.items())
    if any(len(outcomes[task].reference) < 2 for task in weights):
        return Recovery(None, None, None, gap, None, False)
    variance = sum(
        weight**2 * float(np.var(_lost(outcomes[task]), ddof=1)) / len(outcomes[task].reference)
        for task, weight in weights.items()
    )
    error = math.sqrt(variance)
    # Differences of equal sums of fractions may leave a rounding error in place of zero.
    few = sum(len(outcomes[task].reference) for task in weights) < FEWEST
    if few or gap < CERTAIN * error or gap < 1e-12:
        return Recovery(None, None, None, gap, error, False)
    means = sum((weight * outcomes[task].means for task, weight in weights.items()), np.zeros(3))
    drawn = sum((weight * draws[task] for task, weight in weights.items()), np.zeros((1, 3)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(ar_percent(drawn), [tail, 1 - tail])
    return Recovery(float(ar_percent(means)), float(low), float(high), gap, error, True)


def kl_recovery(
    degraded: Sequence[tuple[float, int]], recovered: Sequence[tuple[float, int]], draws: int, seed: int
) -> tuple[float, float] | tuple[None, None]:
    """The 95% percentile interval of 1 - KL(recovered) / KL(degraded), over texts drawn anew.

    degraded, recovered: of the same samples in order, (KL summed over its tokens, their number). Samples are drawn with
    replacement, not tokens, which depend on each other; a single one has no interval.
    """
    both = zip(degraded, recovered, strict=True)
    sums_S2 = np.array([[before, after] for (before, tokens), (after, _) in both if tokens])
    count = len(sums_S2)
    if count < 2:
        return None, None
    drawn_DS = np.random.default_rng([seed, count]).multinomial(count, np.full(count, 1 / count), size=draws)
    before_D, after_D = (drawn_DS @ sums_S2).T
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(1 - after_D / before_D, [tail, 1 - tail])
    return float(low), float(high)


def _lost(outcomes: Outcomes) -> NDArray[np.int64]:
    return outcomes.reference - outcomes.degraded
