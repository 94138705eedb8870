"""Successive halving: points that are behind the others they compete with are stopped early, by Optuna's pruner.

Asynchronous (ASHA, arXiv 1810.05934): a point goes on past first_tokens * factor**k trained tokens when its held-out KL
is among the best 1/factor of those that have come so far; it waits for nobody.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import optuna

from launch.study import Halving
from recovery.files import read_lines

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Race:
    """The points of one study that compete, by their held-out KL on the way."""

    def __init__(self, settings: Halving) -> None:
        pruner = optuna.pruners.SuccessiveHalvingPruner(settings.first_tokens, settings.factor, 0)
        self._study = optuna.create_study(direction="minimize", pruner=pruner)
        self._trials: dict[str, tuple[optuna.trial.Trial, int]] = {}

    def observe(self, point: str, held_out: Path) -> str | None:
        """Take in what a point has written to its held_out.jsonl since the last time. Returns why it is to be stopped,
        or None where it goes on. Equal files in equal order give equal answers, so a study that was killed asks
        again."""
        trial, seen = self._trials.get(point, (None, 0))
        lines = [line for line in read_lines(held_out) if line["split"] == "held_out" and line["tokens"] > 0]
        if len(lines) <= seen:
            return None
        trial = trial or self._study.ask()
        why = None
        for line in lines[seen:]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a point that went on after a kill reports a step again
                trial.report(line["kl"], line["tokens"])
            if why is None and trial.should_prune():
                why = f"stopped at {line['tokens']:,} tokens: its KL of {line['kl']:.3f} is behind the others'"
        self._trials[point] = trial, len(lines)
        return why
