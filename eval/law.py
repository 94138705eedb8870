"""Scaling laws: how the KL that is left falls with tokens, adapter parameters and model size, with intervals.

log(share of the KL left) = constant + sum of exponent * log(quantity), a power law without a floor (as Kaplan et al.,
arXiv 2001.08361, equation 1.1), by ordinary least squares. A floor, which every adapter has, is not in it: predictions
far beyond what was measured are too good, and are marked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.plots import NORMAL_95

QUANTITIES = {"tokens": "tokens", "parameters": "adapter parameters", "model_parameters": "model size"}
DISTINCT, APART = 3, 1.2
"""Values of a quantity below which nothing is said of it, and the ratio from which two of them count as two: two seeds'
corpora differ a little in their tokens."""
MOST = 1e15
"""Tokens beyond which no budget is named."""


@dataclass(frozen=True)
class Law:
    """Of one series. Logarithms are natural."""

    names: tuple[str, ...]
    """The quantities that vary, in the order of the coefficients after the constant."""
    coefficients: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]
    quantile: float
    """Of Student's t, for 95 %."""
    residuals: tuple[float, ...]
    """Of the logarithm, in the order of the points."""
    measured: dict[str, tuple[float, float]]
    """The least and largest value of every quantity."""

    def left(self, at: Mapping[str, float]) -> tuple[float, float, float]:
        """The share of the KL left: mean, and its 95 % interval."""
        row = np.array([1.0, *(math.log(at[name]) for name in self.names)])
        middle = float(row @ np.array(self.coefficients))
        error = self.quantile * math.sqrt(max(float(row @ np.array(self.covariance) @ row), 0.0))
        return math.exp(middle), math.exp(middle - error), math.exp(middle + error)

    def tokens_for(self, recovery: float, at: Mapping[str, float]) -> Budget | None:
        """What reaches this share of KL recovery. at: the other quantities. None where tokens do not measurably help,
        or it would take more than there are."""
        if "tokens" not in self.names or self.high[self.names.index("tokens") + 1] >= 0:
            return None
        found = [self._reach(1 - recovery, at, which) for which in (0, 1, 2)]
        if found[0] is None:
            return None
        return Budget(found[0], found[1], found[2], found[0] / self.measured["tokens"][1])

    def _reach(self, left: float, at: Mapping[str, float], which: int) -> float | None:
        """The fewest tokens at which that bound of the mean is below `left`, by bisection."""
        low, high = 1.0, MOST
        if self.left({**at, "tokens": high})[which] > left:
            return None
        while high / low > 1.001:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if self.left({**at, "tokens": middle})[which] <= left else (middle, high)
        return high

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Law:
        """Raises KeyError or TypeError for what is none."""
        tuples = {name: tuple(content[name]) for name in ("names", "coefficients", "low", "high", "residuals")}
        covariance = tuple(tuple(map(float, row)) for row in content["covariance"])
        measured = {name: (float(low), float(high)) for name, (low, high) in content["measured"].items()}
        return cls(**tuples, covariance=covariance, quantile=float(content["quantile"]), measured=measured)


@dataclass(frozen=True)
class Budget:
    """Trained tokens: expected, and where the interval's optimistic and pessimistic ends reach the target."""

    tokens: float
    low: float | None
    high: float | None
    beyond: float
    """Times the most that was measured; above 1 it is extrapolated."""


def fit(points: Sequence[Mapping[str, float]]) -> Law | None:
    """points: {tokens, parameters, model_parameters, left}, left in (0, inf). None where there are too few, or none of
    the quantities has DISTINCT values."""
    import statsmodels.api as sm

    usable = [point for point in points if point["left"] > 0]
    names = [name for name in QUANTITIES if _distinct([point[name] for point in usable]) >= DISTINCT]
    if not names or len(usable) < len(names) + 3:
        return None
    design = np.array([[1.0, *(math.log(point[name]) for name in names)] for point in usable])
    if np.linalg.matrix_rank(design) < design.shape[1]:  # quantities that vary together only
        return None
    result = sm.OLS(np.log([point["left"] for point in usable]), design).fit()
    interval: NDArray[np.float64] = np.asarray(result.conf_int(0.05))
    coefficients = np.asarray(result.params)
    errors = np.asarray(result.bse)
    spread = (interval[:, 1] - coefficients) / np.where(errors > 0, errors, 1)
    return Law(
        tuple(names),
        tuple(map(float, coefficients)),
        tuple(map(float, interval[:, 0])),
        tuple(map(float, interval[:, 1])),
        tuple(tuple(map(float, row)) for row in np.asarray(result.cov_params())),
        float(spread.max()),
        tuple(map(float, np.asarray(result.resid))),
        {name: (min(p[name] for p in usable), max(p[name] for p in usable)) for name in QUANTITIES},
    )


def _distinct(values: Sequence[float]) -> int:
    """How many values there are that are APART from the one below."""
    count, last = 0, 0.0
    for value in sorted(values):
        if value > APART * last:
            count, last = count + 1, value
    return count


@dataclass(frozen=True)
class Trend:
    """AR% = constant + gain * log10(tokens), weighted by the points' intervals."""

    constant: float
    gain: float
    low: float
    high: float


def trend(points: Sequence[Mapping[str, float]]) -> Trend | None:
    """points: {tokens, value, low, high} of those whose AR% is measurable."""
    import statsmodels.api as sm

    if _distinct([point["tokens"] for point in points]) < DISTINCT or len(points) < DISTINCT + 1:
        return None
    design = np.array([[1.0, math.log10(point["tokens"])] for point in points])
    errors = np.array([(point["high"] - point["low"]) / (2 * NORMAL_95) for point in points])
    weights: Any = 1 / np.maximum(errors, 1e-3) ** 2
    result = sm.WLS([point["value"] for point in points], design, weights=weights).fit()
    low, high = np.asarray(result.conf_int(0.05))[1]
    constant, gain = np.asarray(result.params)
    return Trend(float(constant), float(gain), float(low), float(high))
