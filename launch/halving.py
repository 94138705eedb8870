"""Successive halving: points that are behind the others they compete with are stopped early, by Optuna's pruner.

Asynchronous (ASHA, arXiv 1810.05934): a point goes on past first_tokens * factor**k trained tokens when its held-out KL
is among the best 1/factor of those that have come so far; it waits for nobody. What was seen is kept in its order, so
that a study that was killed judges as before.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna

from launch.execution import Plan
from launch.outcomes import alone
from launch.stages import Stage
from launch.study import Halving, Point
from recovery.artifacts import folder_of
from recovery.files import held_out_lines

HALVING = "halving.jsonl"
"""In the study's folder: the measurements that points were judged by."""
optuna.logging.set_verbosity(optuna.logging.WARNING)


class Race:
    """The points that compete, by their held-out KL on the way."""

    def __init__(self, settings: Halving) -> None:
        pruner = optuna.pruners.SuccessiveHalvingPruner(settings.first_tokens, settings.factor, 0)
        self._study = optuna.create_study(direction="minimize", pruner=pruner)
        self._trials: dict[str, optuna.trial.Trial] = {}

    def take(self, point: str, tokens: int, kl: float) -> bool:
        """One measurement of a point; whether it is behind now."""
        trial = self._trials.get(point) or self._study.ask()
        self._trials[point] = trial
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a point that went on after a kill reports a step again
            trial.report(kl, tokens)
        return trial.should_prune()


class Races:
    """All races of a study; none without halving. plans: of the points, by name; what they had measured under another
    recipe does not compete. folder: the study's, where what was seen is kept in its order, also by other commands that
    run slices of it."""

    def __init__(
        self, settings: Halving | None, points: Mapping[str, Point], plans: Mapping[str, Plan], folder: Path
    ) -> None:
        self._settings, self._points, self._folder = settings, points, folder
        self._trains = {name: stage.job.artifact_name for name, plan in plans.items() if (stage := _train_of(plan))}
        self._begin()
        if settings is not None:
            with alone(folder):
                self._catch_up()

    def _begin(self) -> None:
        """Nothing has been seen."""
        self._races: dict[tuple[str, ...], Race] = {}
        self._seen: set[tuple[str, int]] = set()
        """Points' keys, and tokens."""
        self._read = 0
        """Bytes of the log."""
        self._behind: dict[str, str] = {}

    def observe(self, point: str, plan: Plan) -> str | None:
        """Take in what a point has measured since the last time. Why it is to be stopped, or None."""
        stage = _train_of(plan)
        if self._settings is None or stage is None:
            return None
        train = stage.job.artifact_name
        trained = [line for line in held_out_lines(folder_of(stage.job)) if line["tokens"] > 0]
        if any((_key(point, train), line["tokens"]) not in self._seen for line in trained):
            with alone(self._folder):
                self._catch_up()
                for line in trained:
                    if (_key(point, train), line["tokens"]) not in self._seen:
                        self._write({"point": point, "train": train, "tokens": line["tokens"], "kl": line["kl"]})
                self._catch_up()
        return self._behind.get(_key(point, train))

    def _catch_up(self) -> None:
        """Judge by the lines that are new. A last line that a kill cut short is removed: its writer measures again."""
        with (self._folder / HALVING).open("a+b") as file:
            if file.seek(0, os.SEEK_END) < self._read:  # removed, to judge anew
                self._begin()
            file.seek(self._read)
            whole, end, _ = file.read().rpartition(b"\n")
            self._read += len(whole + end)
            file.truncate(self._read)
        assert self._settings is not None
        for text in whole.splitlines():
            line = json.loads(text)
            same_rules = line["settings"] == self._settings.model_dump_json()
            if same_rules and line["train"] == self._trains.get(line["point"]):
                self._take(line["point"], line["train"], line["tokens"], line["kl"])

    def _take(self, point: str, train: str, tokens: int, kl: float) -> None:
        assert self._settings is not None
        labels = self._points[point].labels
        group = tuple(label for axis, label in labels.items() if axis not in self._settings.among)
        race = self._races.setdefault(group, Race(self._settings))
        key = _key(point, train)
        self._seen.add((key, tokens))
        if race.take(key, tokens, kl) and key not in self._behind:
            self._behind[key] = f"stopped at {tokens:,} tokens: its KL of {kl:.3f} is behind the others'"

    def _write(self, line: dict[str, Any]) -> None:
        assert self._settings is not None
        with (self._folder / HALVING).open("a") as file:
            file.write(json.dumps({**line, "settings": self._settings.model_dump_json()}) + "\n")


def _train_of(plan: Plan) -> Stage | None:
    return next((stage for stage in plan.stages if stage.label == "train"), None)


def _key(point: str, train: str) -> str:
    """Another recipe under the same name is another point."""
    return f"{point} {train}"
