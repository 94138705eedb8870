"""The pictures of a diagnosis: how much every tensor changed, and what that costs, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LogNorm

from eval.plots import STYLE, new_figure
from recovery.advice import layer_of, module_of

DECADES = 3
"""Of the color scale, below the largest value."""
CEILING = 1e3
"""Shown for what is larger, or not a number."""


def plot_tensors(values: Mapping[str, float], title: str, path: Path) -> None:
    """A value by tensor name, in color: rows are modules, columns are layers (one more for tensors outside them)."""
    modules = list(dict.fromkeys(module_of(tensor) for tensor in values))
    layers = [number for tensor in values if (number := layer_of(tensor)) is not None]
    columns = max(layers, default=-1) + 2
    grid = np.full((len(modules), columns), np.nan)
    finite = {name: min(value, CEILING) if math.isfinite(value) else CEILING for name, value in values.items()}
    largest = max(*finite.values(), 1e-12)
    least = 10.0**-DECADES * largest
    for tensor, value in finite.items():
        number = layer_of(tensor)
        column = columns - 1 if number is None else number
        grid[modules.index(module_of(tensor)), column] = max(value, least)
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(max(5.5, 0.24 * columns + 2.5), max(2.2, 0.34 * len(modules) + 1.4))
        image = axes.imshow(grid, aspect="auto", cmap="YlOrRd", norm=LogNorm(least, largest))
        axes.set_yticks(range(len(modules)), modules)
        shown = list(range(0, columns - 1, max(1, (columns - 1) // 10)))
        axes.set_xticks([*shown, columns - 1], [*map(str, shown), "other"])
        axes.set_xlabel("layer")
        axes.set_title(title)
        figure.colorbar(image, ax=axes)
        figure.savefig(path)
