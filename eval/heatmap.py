"""The heat map of a diagnosis: how much every tensor changed, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LogNorm

from eval.plots import STYLE, new_figure
from recovery.diagnosis import Finding, layer_of, module_of

LEAST = 1e-3


def plot_damage(findings: Sequence[Finding], path: Path) -> None:
    """Rows are modules, columns are layers (one more for tensors outside them); the color is the relative L2 change."""
    modules = list(dict.fromkeys(module_of(finding.tensor) for finding in findings))
    layers = [number for finding in findings if (number := layer_of(finding.tensor)) is not None]
    columns = max(layers, default=-1) + 2
    values = np.full((len(modules), columns), np.nan)
    for finding in findings:
        number = layer_of(finding.tensor)
        column = columns - 1 if number is None else number
        values[modules.index(module_of(finding.tensor)), column] = np.clip(finding.relative_l2, LEAST, 1e3)
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(max(5.5, 0.24 * columns + 2.5), max(2.2, 0.34 * len(modules) + 1.4))
        largest = max(1.0, float(np.nanmax(values)))
        image = axes.imshow(values, aspect="auto", cmap="YlOrRd", norm=LogNorm(LEAST, largest))
        axes.set_yticks(range(len(modules)), modules)
        shown = list(range(0, columns - 1, max(1, (columns - 1) // 10)))
        axes.set_xticks([*shown, columns - 1], [*map(str, shown), "other"])
        axes.set_xlabel("layer")
        axes.set_title("Change of each tensor, relative L2 (white: none)")
        figure.colorbar(image, ax=axes)
        figure.savefig(path)
