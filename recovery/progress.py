"""Progress bars with a rate and the remaining time; sparse lines where the output is not a terminal."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress(total: int, unit: str, description: str, initial: int = 0) -> tqdm[Any]:
    """A bar over `total` units; `initial` of them were done by an earlier process and do not count in the rate."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=initial,
        unit=unit,
        desc=description,
        dynamic_ncols=terminal,
        ncols=None if terminal else 100,
        mininterval=0.5 if terminal else 10.0,
        smoothing=0.1,
        file=sys.stderr,
    )
