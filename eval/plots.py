"""The report's plots as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from eval.benchmarks import TITLES, benchmarks_of, chance
from eval.table import MODELS, tasks_of

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
COLORS = {"reference": "#52606d", "degraded": "#d9822b", "recovered": "#1f77b4"}
TEXTS = {"held_out": ("held-out synthetic text", "#1f77b4"), "contexts": ("benchmark text", "#2a9d8f")}
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.dpi": 150,
}
NORMAL_95 = 1.96


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    # A Figure of its own draws with Agg and leaves no global state, as pyplot would.
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_axisbelow(True)
    return figure, axes


def plot_accuracy(summary: Mapping[str, Any], path: Path) -> None:
    """Accuracy of the three models on every benchmark, with 95% intervals and the level of chance."""
    names = list(benchmarks_of(tasks_of(summary)))
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(max(5.5, 1.15 * len(names) + 1.5), 4.2)
        places, width = np.arange(len(names)), 0.26
        for number, model in enumerate(MODELS):
            scores = [summary["tasks"][name][model] for name in names]
            errors = [100 * NORMAL_95 * (score["acc_stderr"] or 0.0) for score in scores]
            heights = [100 * score["acc"] for score in scores]
            # An interval of a share ends at 0 and 100.
            below = [min(error, height) for error, height in zip(errors, heights, strict=True)]
            above = [min(error, 100 - height) for error, height in zip(errors, heights, strict=True)]
            axes.bar(
                places + (number - 1) * width,
                heights,
                width * 0.92,
                color=COLORS[model],
                label=model,
                yerr=[below, above],
                error_kw={"ecolor": INK, "elinewidth": 0.9, "capsize": 2},
            )
        for place, name in zip(places, names, strict=True):
            level = 100 * chance(name)
            label = "chance" if place == 0 else "_nolegend_"
            axes.hlines(level, place - 0.45, place + 0.45, INK, "dotted", linewidth=1.2, label=label)
        axes.set_xticks(places, [TITLES[name] for name in names], rotation=25, ha="right")
        axes.set_ylabel("accuracy, %")
        axes.set_ylim(0, None)
        axes.grid(axis="y", color=GRID)
        axes.set_title("Zero-shot accuracy with 95% intervals")
        figure.legend(loc="outside lower center", ncols=4)
        figure.savefig(path)


def plot_kl(
    history: Sequence[Mapping[str, Any]],
    held_out: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    path: Path,
) -> None:
    """KL to the reference over the tokens of training, on both held-out texts, with the degraded model's level."""
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(7, 4.2)
        unit, scale = _token_unit(max([0, *(line["tokens"] for line in [*history, *held_out])]))
        if history:
            tokens = [line["tokens"] / scale for line in history]
            losses = [line["loss"] for line in history]
            axes.plot(tokens, losses, color=MUTED, linewidth=0.8, alpha=0.5, label="training step")
        levels = {"held_out": (summary["kl"] or {}).get("degraded")}
        levels["contexts"] = (summary["kl_contexts"] or {}).get("degraded")
        for split, (title, color) in TEXTS.items():
            if not (lines := [line for line in held_out if line["split"] == split]):
                continue
            axes.plot(
                [line["tokens"] / scale for line in lines],
                [line["kl"] for line in lines],
                marker="o",
                markersize=4,
                color=color,
                label=title,
            )
            if (level := levels[split]) is not None:
                axes.axhline(level, color=color, linestyle="dashed", linewidth=1, alpha=0.8)
                # At the right, where the curves are far below: the higher level's text over its line, the other under.
                over = level >= max(value for value in levels.values() if value is not None)
                axes.annotate(
                    f"degraded, {title}: {level:.2f}",
                    (1, level),
                    xycoords=("axes fraction", "data"),
                    xytext=(0, 3 if over else -3),
                    textcoords="offset points",
                    ha="right",
                    va="bottom" if over else "top",
                    color=color,
                    fontsize=8.5,
                )
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(f"tokens trained on{unit}")
        axes.set_ylabel("KL(reference ‖ model), nats per token")
        axes.grid(color=GRID)
        axes.set_title("Divergence from the reference")
        figure.legend(loc="outside lower center", ncols=3)
        figure.savefig(path)


def _token_unit(most: int) -> tuple[str, float]:
    for name, scale in ((", billions", 1e9), (", millions", 1e6), (", thousands", 1e3)):
        if most >= 2 * scale:
            return name, scale
    return "", 1.0


def plot_recovery(summary: Mapping[str, Any], path: Path) -> None:
    """AR% of every benchmark and of the averages; grey and without a bar where the damage is not certain."""
    tasks = summary["tasks"]
    rows = [(TITLES[name], tasks[name]["ar_percent"]) for name in benchmarks_of(tasks_of(summary))]
    benchmarks = len(rows)
    rows.append(("paper's average", summary["ar_percent"]))
    if summary["ar_percent_measurable"]["tasks"]:
        rows.append(("measurable average", summary["ar_percent_measurable"]))
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(7, 0.42 * len(rows) + 1.3)
        ends = [result[key] for _, result in rows if result["measurable"] for key in ("low", "high")]
        axes.set_xlim(min([-5, *ends]) - 5, max([105, *ends]) + 5)
        for place, (_, result) in enumerate(rows):
            if result["measurable"]:
                value = result["value"]
                span = [[value - result["low"]], [result["high"] - value]]
                axes.barh(place, value, 0.62, color=COLORS["recovered"], alpha=0.85)
                axes.errorbar(value, place, xerr=span, color=INK, elinewidth=1, capsize=3)
            else:
                gap = "" if result["gap"] is None else f": gap {100 * result['gap']:.1f}"
                error = "" if result["gap_se"] is None else f" ± {100 * result['gap_se']:.1f} points"
                text = f"not measurable{gap}{error}"
                axes.text(2, place, text, va="center", color=MUTED, fontsize=9, backgroundcolor="white")
        axes.axvline(0, color=INK, linewidth=0.9)
        axes.axvline(100, color=COLORS["reference"], linestyle="dashed", linewidth=1)
        axes.annotate(
            "reference", (100, 1.01), xycoords=("data", "axes fraction"), ha="center", fontsize=8.5, color=MUTED
        )
        axes.set_yticks(range(len(rows)), [title for title, _ in rows])
        for label, (_, result) in zip(axes.get_yticklabels(), rows, strict=True):
            label.set_color(INK if result["measurable"] else MUTED)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.axhline(benchmarks - 0.5, color=MUTED, linewidth=0.6)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("accuracy recovered (AR%), with 95% intervals over items")
        axes.grid(axis="x", color=GRID)
        axes.tick_params(axis="y", length=0)
        axes.set_title("Accuracy recovery", pad=16)
        figure.savefig(path)
