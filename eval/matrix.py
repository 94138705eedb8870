"""A study's results side by side: one line a point, as Markdown and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from eval.plots import INK, STYLE, new_figure
from eval.table import MODELS, kl_share, percent, recovery_text

COLUMNS = (
    "KL",
    "KL on learned text",
    "KL recovery",
    "top-1",
    "accuracy: reference, degraded, recovered",
    "AR%",
    "tokens",
    "parameters",
    "minutes",
)
OWN_STAGES = ("repair", "cache", "train")
"""What a point spends on its adapter; corpus and scores are shared."""


def result_of(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of one finished point, from its summary.json. Accuracies are means over the benchmarks whose gap is
    measurable; null where none is."""
    measurable = summary["ar_percent_measurable"]
    tasks = measurable["tasks"]
    recovered = measurable if tasks else summary["ar_percent"]
    if tasks:
        accuracy = {model: float(np.mean([summary["tasks"][name][model]["acc"] for name in tasks])) for model in MODELS}
    else:
        accuracy = None
    return {
        "kl": summary["kl"],
        "closed_form": (summary["closed_form"] or {}).get("recovery"),
        "top1": summary["top1"],
        "tasks": tasks,
        "accuracy": accuracy,
        "ar_percent": {key: recovered[key] for key in ("value", "low", "high", "gap", "gap_se", "measurable")},
        "tokens": summary["tokens"],
        "parameters": summary["trainable_parameters"],
        "model_parameters": summary["model_parameters"],
        "tokens_per_sample": summary["tokens_per_sample"],
        "minutes": sum(summary["seconds"].get(stage, 0.0) for stage in OWN_STAGES) / 60,
    }


def cells(result: Mapping[str, Any]) -> list[str]:
    """The columns of one line."""
    kl, accuracy = result["kl"], result["accuracy"]
    return [
        f"{kl['degraded']:.3f} → {kl['recovered']:.3f}",
        "-" if kl.get("learned") is None else f"{kl['learned']:.3f}",
        kl_share(kl),
        percent(result["top1"]["recovered"]),
        "-" if accuracy is None else ", ".join(percent(accuracy[model]) for model in MODELS),
        "-" if result["ar_percent"]["gap"] is None else f"{recovery_text(result['ar_percent'])}{_of(result)}",
        f"{result['tokens']:,}",
        f"{result['parameters']:,}",
        f"{result['minutes']:.1f}",
    ]


def _of(result: Mapping[str, Any]) -> str:
    return f" of {len(result['tasks'])}" if result["tasks"] else ""


def markdown(rows: Sequence[Mapping[str, Any]], axes: Sequence[str]) -> str:
    """rows: {labels, result or null, note}. A table for each value of the first axis where there are several axes."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["labels"][axes[0]] if len(axes) > 1 else "", []).append(row)
    varying = axes[1:] if len(axes) > 1 else axes
    predicted = any(row["predicted"] is not None for row in rows)
    header = [*varying, *COLUMNS, *(["predicted recovery"] if predicted else [])]
    parts = []
    for title, members in groups.items():
        lines = [f"| {' | '.join(header)} |", f"| {' | '.join('---' for _ in header)} |"]
        for row in members:
            values = [row["labels"][axis] for axis in varying]
            values += cells(row["result"]) if row["result"] else [as_text(row["note"]), *[""] * (len(COLUMNS) - 1)]
            values += [percent(row["predicted"])] if predicted else []
            lines.append(f"| {' | '.join(values)} |")
        parts.append("\n".join([*([f"### {axes[0]}: {title}", ""] if title else []), *lines]))
    return "\n\n".join(parts) + "\n"


def as_text(note: str) -> str:
    """Words from elsewhere (an error, a path) as one table cell that shows them as they are."""
    plain = " ".join(note.split()).replace("`", "'").replace("|", "/")
    return f"`{plain}`" if plain else ""


def plot_recoveries(rows: Sequence[Mapping[str, Any]], axes: Sequence[str], path: Path) -> None:
    """KL recovery in color: rows are values of the first axis, columns those of the others together."""
    across = list(dict.fromkeys(_column(row, axes) for row in rows))
    down = list(dict.fromkeys(row["labels"][axes[0]] for row in rows))
    grid = np.full((len(down), len(across)), np.nan)
    for row in rows:
        if row["result"]:
            place = down.index(row["labels"][axes[0]]), across.index(_column(row, axes))
            grid[place] = row["result"]["kl"]["recovery"]
    with mpl.rc_context(STYLE):
        figure, picture = new_figure(max(5.0, 1.1 * len(across) + 2.5), max(2.4, 0.5 * len(down) + 1.8))
        image = picture.imshow(grid, aspect="auto", cmap="RdYlGn", vmin=0, vmax=1)
        for (line, column), value in np.ndenumerate(grid):
            if not np.isnan(value):
                picture.text(column, line, f"{100 * value:.0f}", ha="center", va="center", color=INK)
        picture.set_xticks(range(len(across)), across, rotation=30, ha="right")
        picture.set_yticks(range(len(down)), down)
        picture.set_title("KL recovered, % (white: none delivered, or not run)")
        figure.colorbar(image, ax=picture)
        figure.savefig(path)


def _column(row: Mapping[str, Any], axes: Sequence[str]) -> str:
    return " ".join(row["labels"][axis] for axis in axes[1:]) or "recovery"
