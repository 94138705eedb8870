"""The one file in which all benchmarks leave their rows: runs/bench/summary.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from recovery.artifacts import REPOSITORY, now
from recovery.files import write_json

SUMMARY = REPOSITORY / "runs" / "bench" / "summary.json"


def append_row(
    name: str,
    ours: float,
    unit: str,
    *,
    peer: float | None = None,
    better: Literal["lower", "higher"] = "higher",
    goal: float | None = None,
    path: Path = SUMMARY,
) -> None:
    """Add one measurement. ratio: ours / peer, or ours where there is no peer; met: whether it reaches the goal."""
    ratio = ours / peer if peer else ours
    met = None if goal is None else (ratio >= goal if better == "higher" else ratio <= goal)
    row = {
        "name": name,
        "ours": round(ours, 4),
        "peer": None if peer is None else round(peer, 4),
        "ratio": round(ratio, 4),
        "unit": unit,
        "better": better,
        "goal": goal,
        "met": met,
        "measured": now(),
    }
    rows = json.loads(path.read_text()) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, [*rows, row])
    against = "" if peer is None else f", peer {peer:.4g}, ratio {ratio:.3f}"
    verdict = "" if goal is None else f", goal {goal:g}: {'met' if met else 'NOT MET'}"
    print(f"{name}: {ours:.4g} {unit}{against}{verdict}", flush=True)
