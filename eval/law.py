"""Scaling laws: how the KL that is left falls with tokens, adapter parameters and model size, with intervals.

log(share of the KL left) = constant + sum of exponent * log(quantity), a power law without a floor (as Kaplan et al.,
arXiv 2001.08361, equation 1.1), by ordinary least squares. A floor, which every adapter has, is not in it: predictions
far beyond what was measured are too good, and are marked.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.plots import NORMAL_95

QUANTITIES = {"tokens": "tokens", "parameters": "adapter parameters", "model_parameters": "model size"}
DISTINCT, APART = 3, 1.2
"""Values of a quantity that tell a law from chance, and the ratio from which two of them count as two: two seeds'
corpora differ a little in their tokens."""
TOGETHER = 0.95
"""Correlation of two quantities' logarithms from which their merits are not told apart."""
MOST = 1e15
"""Tokens beyond which no budget is named."""
INSIDE = 1.01
"""Of the measured range: how far outside still counts as there."""


class NoLaw(Exception):
    """Why no law can be fitted, in words."""


@dataclass(frozen=True)
class Law:
    """Of one series. Logarithms are natural."""

    names: tuple[str, ...]
    """The quantities that vary, in the order of the coefficients after the constant, but for adapter parameters that
    grow with the model size: its exponent stands for both."""
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
    values: dict[str, int]
    """How many there are of each, APART."""
    adapter_grows: bool
    """Whether adapter parameters are left out, as they grow with the model size."""

    def left(self, at: Mapping[str, float]) -> tuple[float, float, float]:
        """The share of the KL left: mean, and its 95 % interval."""
        row = np.array([1.0, *(math.log(at[name]) for name in self.names)])
        middle = float(row @ np.array(self.coefficients))
        error = self.quantile * math.sqrt(max(float(row @ np.array(self.covariance) @ row), 0.0))
        return math.exp(middle), math.exp(middle - error), math.exp(middle + error)

    def is_sure(self, name: str) -> bool:
        """Whether the quantity took DISTINCT values and the 95 % interval of its exponent leaves out zero."""
        if name not in self.names or self.values[name] < DISTINCT:
            return False
        place = self.names.index(name) + 1
        return self.low[place] > 0 or self.high[place] < 0

    def tokens_for(self, recovery: float, at: Mapping[str, float]) -> Budget | None:
        """What reaches this share of KL recovery. at: the other quantities. None where tokens do not measurably
        help."""
        if not (self.is_sure("tokens") and self.high[self.names.index("tokens") + 1] < 0):
            return None
        return Budget(*(self._reach(1 - recovery, at, which) for which in (0, 1, 2)))

    def beyond(self, at: Mapping[str, float]) -> dict[str, float]:
        """Of the quantities outside their measured range: how many times the largest value (above 1), or which share of
        the least (below 1)."""
        found = {}
        for name, value in at.items():
            low, high = self.measured[name]
            if value > INSIDE * high:
                found[name] = value / high
            elif value < low / INSIDE:
                found[name] = value / low
        return found

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
        values = {name: int(count) for name, count in content["values"].items()}
        known = {"quantile": float(content["quantile"]), "adapter_grows": bool(content["adapter_grows"])}
        return cls(**tuples, **known, covariance=covariance, measured=measured, values=values)


@dataclass(frozen=True)
class Budget:
    """Trained tokens: expected, and where the interval's optimistic and pessimistic ends reach the target; None is more
    than MOST."""

    tokens: float | None
    low: float | None
    high: float | None


def fit(points: Sequence[Mapping[str, float]]) -> Law:
    """points: {tokens, parameters, model_parameters, left}, all above 0. Raises NoLaw."""
    import statsmodels.api as sm

    values = {name: _distinct([point[name] for point in points]) for name in QUANTITIES}
    if max(values.values()) < DISTINCT:
        raise NoLaw(f"none of {', '.join(QUANTITIES.values())} has {DISTINCT} values in {len(points)} finished points")
    # One of two values is in it too: points of two adapters are not points of one.
    names = [name for name in QUANTITIES if values[name] > 1]
    grows = {"parameters", "model_parameters"} <= set(names) and _together(points, "parameters", "model_parameters") > 0
    if grows:
        names.remove("parameters")
    for one, other in itertools.combinations(names, 2):
        if _together(points, one, other):
            raise NoLaw(f"{QUANTITIES[one]} and {QUANTITIES[other]} vary together: whose merit it is cannot be told")
    if len(points) < len(names) + 3:
        varied = ", ".join(QUANTITIES[name] for name in names)
        raise NoLaw(f"{len(points)} finished points, and {varied} need {len(names) + 3}")
    design = np.array([[1.0, *(math.log(point[name]) for name in names)] for point in points])
    if np.linalg.matrix_rank(design) < design.shape[1]:
        raise NoLaw(f"{', '.join(QUANTITIES[name] for name in names)} vary together")
    result = sm.OLS(np.log([point["left"] for point in points]), design).fit()
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
        {name: (min(p[name] for p in points), max(p[name] for p in points)) for name in QUANTITIES},
        values,
        grows,
    )


def _together(points: Sequence[Mapping[str, float]], one: str, other: str) -> int:
    """1 or -1 where the logarithms rise together or one falls as the other rises, too much to tell them apart; else
    0."""
    logarithms = np.log([[point[one], point[other]] for point in points])
    correlation = float(np.corrcoef(logarithms.T)[0, 1])
    return round(math.copysign(1, correlation)) if abs(correlation) > TOGETHER else 0


def rounded(tokens: float | None) -> str:
    """Three digits: a prediction has no more."""
    return f"more than 10^{math.log10(MOST):.0f}" if tokens is None else f"{float(f'{tokens:.3g}'):,.0f}"


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
