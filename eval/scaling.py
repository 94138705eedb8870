"""A study over data, rank or model size: curves, the plane of parameters and data, the fitted law in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from eval.law import DISTINCT, MOST, QUANTITIES, Law, NoLaw, fit, rounded, trend
from eval.plots import GRID, INK, MUTED, STYLE, new_figure
from eval.table import percent

TARGETS = (0.9, 0.95, 0.98)
SIZES = {"7B": 7e9, "13B": 13e9, "70B": 70e9}
REACH = 10.0
"""How far beyond the largest corpus the law is drawn, dashed."""
SEED = "seed"


@dataclass(frozen=True)
class Series:
    """Points that differ in nothing but what scales, and seed."""

    name: str
    members: list[Mapping[str, Any]]
    """Finished rows, by tokens."""
    law: Law | None
    why: str = ""
    """There is no law."""


def series_of(rows: Sequence[Mapping[str, Any]], over: Sequence[str]) -> list[Series]:
    """The finished rows by what is not varied, each with its law. over: the axes along which they scale."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        fixed = [label for axis, label in row["labels"].items() if axis not in over and axis != SEED]
        if row["result"] is not None and _has_shares(row["result"]["kl"]):
            found.setdefault(" ".join(fixed) or "all", []).append(row)
    made = []
    for name, members in found.items():
        members.sort(key=lambda row: row["result"]["tokens"])
        try:
            made.append(Series(name, members, fit([quantities(row) for row in members])))
        except NoLaw as error:
            made.append(Series(name, members, None, str(error)))
    return made


def _has_shares(kl: Mapping[str, float] | None) -> bool:
    """Whether there was a loss, and something of it is left: what has a logarithm."""
    return kl is not None and kl["degraded"] > 0 and kl["recovered"] > 0


def quantities(row: Mapping[str, Any]) -> dict[str, float]:
    """What a law is fitted to, of one finished row."""
    result = row["result"]
    return {
        **{name: float(result[name]) for name in QUANTITIES},
        "left": result["kl"]["recovered"] / result["kl"]["degraded"],
    }


def accuracies(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """AR% of those rows in which it is measurable."""
    found = [(row["result"]["tokens"], row["result"]["ar_percent"]) for row in rows]
    return [
        {"tokens": tokens, "value": result["value"], "low": result["low"], "high": result["high"]}
        for tokens, result in found
        if result["measurable"]
    ]


def laws_file(series: Sequence[Series]) -> dict[str, Any]:
    """The laws as JSON, each with the mean length of the samples behind it; series without one are left out."""
    return {
        one.name: {
            **one.law.to_json(),
            "tokens_per_sample": float(np.mean([row["result"]["tokens_per_sample"] for row in one.members])),
        }
        for one in series
        if one.law is not None
    }


def plot_scaling(series: Sequence[Series], path: Path) -> None:
    """Left: the share of the KL left over tokens, measured as points and the law as a line, dashed where it predicts.
    Right: AR% with 95 % intervals."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for number, one in enumerate(series):
            color = f"C{number % 10}"
            tokens = [row["result"]["tokens"] for row in one.members]
            shares = [100 * quantities(row)["left"] for row in one.members]
            left.plot(tokens, shares, "o", markersize=5, color=color, label=f"{one.name}, measured")
            if one.law is not None and one.law.names == ("tokens",):
                _draw_law(left, one.law, color)
            found = accuracies(one.members)
            middle = [point["value"] for point in found]
            spans = [[p["value"] - p["low"] for p in found], [p["high"] - p["value"] for p in found]]
            right.errorbar(
                [p["tokens"] for p in found],
                middle,
                yerr=spans,
                fmt="o",
                color=color,
                capsize=3,
                elinewidth=1,
                label=one.name,
            )
        left.set_yscale("log")
        left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        left.yaxis.set_major_formatter("{x:g}")
        left.yaxis.set_minor_locator(NullLocator())
        left.set_ylabel("KL left, % of the degraded model's")
        left.set_title("KL over tokens (dashed: predicted)")
        right.axhline(0, color=INK, linewidth=0.9)
        right.axhline(100, color=MUTED, linestyle="dashed", linewidth=1)
        right.set_ylabel("AR%, measurable benchmarks")
        right.set_title("Accuracy recovered, 95 % intervals")
        for axes in (left, right):
            axes.set_xscale("log")
            axes.set_xlabel("trained tokens, all epochs")
            axes.grid(color=GRID)
            axes.set_axisbelow(True)
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        figure.savefig(path)


def _draw_law(axes: Axes, law: Law, color: str) -> None:
    """The mean, solid where it was measured, and its 95 % band."""
    low, high = law.measured["tokens"]
    for first, last, style in ((low, high, "solid"), (high, REACH * high, "dashed")):
        at = np.geomspace(first, last, 40)
        lines = 100 * np.array([law.left({"tokens": float(tokens)}) for tokens in at])
        axes.plot(at, lines[:, 0], color=color, linestyle=style, linewidth=1.2)
        axes.fill_between(at, lines[:, 1], lines[:, 2], color=color, alpha=0.12, linewidth=0)


def plot_plane(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """What every point spent, parameters over tokens; its color is the KL that came back (the paper's Figure 2)."""
    done = [row["result"] for row in rows if row["result"] is not None and row["result"]["kl"] is not None]
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(7, 4.4)
        image = axes.scatter(
            [result["tokens"] for result in done],
            [result["parameters"] for result in done],
            c=[100 * (result["kl"]["recovery"] or 0.0) for result in done],
            cmap="viridis",
            s=70,
            edgecolors=INK,
            linewidths=0.5,
        )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("trained tokens, all epochs")
        axes.set_ylabel("trainable parameters")
        axes.set_title("Parameters and data")
        axes.grid(color=GRID)
        figure.colorbar(image, ax=axes, label="KL recovered, %")
        figure.savefig(path)


def scaling_text(series: Sequence[Series]) -> str:
    """The laws in words, and what they predict."""
    parts = []
    for one in series:
        lines = [f"### {one.name}", ""]
        lines += [f"No law: {one.why}.", ""] if one.law is None else _law_lines(one.law, one.members)
        lines += _accuracy_lines(one.members)
        parts.append("\n".join(lines))
    return "\n\n".join(["## Scaling", "![KL and accuracy over tokens](scaling.png)", *parts]) + "\n"


def _law_lines(law: Law, members: Sequence[Mapping[str, Any]]) -> list[str]:
    powers = [
        f"{QUANTITIES[name]}^{law.coefficients[number]:.3f} [{law.low[number]:.3f}, {law.high[number]:.3f}]"
        for number, name in enumerate(law.names, 1)
    ]
    worst = max(abs(np.expm1(residual)) for residual in law.residuals)
    claim = (
        f"The share of the KL left goes with {' x '.join(powers)} ({len(law.residuals)} points, 95 % intervals; "
        f"residuals up to {100 * worst:.0f} %). A power law has no floor, and adapters have one: above the measured "
        "tokens it is too good rather than too bad."
    )
    lines = [
        claim,
        "",
        "| tokens | KL left, measured | law | residual |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for row, residual in zip(members, law.residuals, strict=True):
        found = quantities(row)
        lines.append(
            f"| {found['tokens']:,.0f} | {percent(found['left'])} | {percent(law.left(found)[0])} "
            f"| {100 * np.expm1(residual):+.0f} % |"
        )
    return [*lines, "", *_budget_lines(law, members)]


def _budget_lines(law: Law, members: Sequence[Mapping[str, Any]]) -> list[str]:
    """Predicted tokens for some targets, at the measured model size with the smallest and the largest adapter, and at
    larger models where size was varied."""
    if "tokens" not in law.names:
        return []
    places, without = _places(law, [quantities(row) for row in members])
    lines = [
        "| target | model | adapter parameters | tokens, predicted | range | beyond what was measured |",
        "| ---: | --- | ---: | ---: | --- | --- |",
    ]
    for target in TARGETS:
        for name, at in places:
            budget = law.tokens_for(target, at)
            if budget is None:
                return [*lines[:-2], "More tokens do not measurably help: no number of them is given for a target.", ""]
            ends = f"{rounded(budget.low)} to {rounded(budget.high)}"
            found = law.beyond({**at, "tokens": budget.tokens or MOST})
            far = ", ".join(_how_far(QUANTITIES[quantity], times) for quantity, times in found.items())
            far = far if budget.tokens is not None else f"at least {far}"
            grows = law.adapter_grows and "model_parameters" in found
            parameters = "grow with it" if grows else f"{at['parameters']:,.0f}"
            cells = [percent(target, 0), name, parameters, rounded(budget.tokens), ends, far or "within"]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, *(["", without] if without else []), ""]


def _how_far(quantity: str, times: float) -> str:
    return f"x {times:,.1f} {quantity}" if times > 1 else f"below: {times:.2f} of the least {quantity}"


def _places(law: Law, measured: Sequence[Mapping[str, float]]) -> tuple[list[tuple[str, dict[str, float]]], str]:
    """Model sizes to predict at, by name, with their adapters; and why there are no larger ones."""
    largest = max(point["model_parameters"] for point in measured)
    adapters = sorted({p["parameters"] for p in measured if p["model_parameters"] == largest})
    ends = [adapters[0], adapters[-1]] if "parameters" in law.names and len(adapters) > 1 else [adapters[-1]]
    places = [("as measured", {"parameters": end, "model_parameters": largest}) for end in ends]
    if law.values["model_parameters"] < DISTINCT:
        return places, "Of other model sizes nothing can be said: fewer than three were measured."
    if not law.is_sure("model_parameters"):
        return places, "Of larger models nothing can be said: the exponent of their size is not told from zero."
    larger = {name: size for name, size in SIZES.items() if size > largest}
    places += [(name, {"parameters": ends[-1], "model_parameters": size}) for name, size in larger.items()]
    return places, ""


def _accuracy_lines(members: Sequence[Mapping[str, Any]]) -> list[str]:
    found = accuracies(members)
    if not found:
        return ["No benchmark's loss of accuracy is measurable."]
    lines = []
    if (line := trend(found)) is not None:
        lines.append(
            f"AR% grows by {line.gain:.0f} points [{line.low:.0f}, {line.high:.0f}] with ten times the tokens "
            f"(weighted least squares over {len(found)} points)."
        )
    by_size: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in members:
        if row["result"]["ar_percent"]["gap"] is None:  # no benchmarks
            continue
        by_size.setdefault(tuple(label for axis, label in row["labels"].items() if axis != SEED), []).append(
            row["result"]
        )
    sure = sorted(
        min(result["tokens"] for result in seeds)
        for seeds in by_size.values()
        if all(seed["ar_percent"]["measurable"] and seed["ar_percent"]["low"] > 0 for seed in seeds)
    )
    lines.append(
        f"The smallest corpus with every seed's AR% interval above zero: {sure[0]:,.0f} trained tokens."
        if sure
        else "At no size is every seed's AR% interval above zero."
    )
    return lines
