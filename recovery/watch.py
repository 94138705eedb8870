"""The held-out measurements of a training run: which was best, whether it goes on getting better."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from recovery.files import held_out_lines
from recovery.measure import Measurement
from recovery.models import device, of_first_rank


def advice(kls: list[float]) -> str | None:
    """What the latest held-out KLs say while training goes on, if anything is wrong."""
    if len(kls) >= 3 and kls[-1] > kls[-2] > kls[-3]:
        return "held-out KL has risen twice in a row: overfitting, or too high a learning rate"
    if len(kls) >= 4 and min(kls[-3:]) > 0.99 * min(kls[:-3]):
        return "held-out KL stagnates: more rank, another placement or more data would be needed"
    return None


def advice_on_warmup(details: Mapping[str, Any]) -> str | None:
    """What is wrong where a run is over before it has learned at its whole rate. details: of a trained adapter."""
    steps, warm = details["steps"], details.get("warmup_steps", 0)
    if warm == 0 or 2 * warm < steps:
        return None
    remedy = "a smaller train.batch_tokens, more epochs or a smaller train.warmup_steps gives it steps to learn in"
    return f"training has {steps} steps, {warm} of them below the whole learning rate (warm-up): {remedy}"


def line_of(found: Measurement, step: int, tokens: int, split: str = "held_out") -> str:
    """A line of the file. tokens: learned from until then."""
    content = {**asdict(found), "step": step, "tokens": tokens, "split": split, "measured_tokens": found.tokens}
    del content["by_sample"]
    return json.dumps(content) + "\n"


@dataclass
class Watch:
    """The held-out KLs so far, the same on every rank."""

    steps: list[int]
    kls: list[float]

    @classmethod
    def of(cls, folder: Path, *, leader: bool) -> Watch:
        """What earlier processes have measured, as the leader reads it."""
        own = of_first_rank(held_out_lines(folder) if leader else [], torch.distributed.get_world_size())
        return cls([line["step"] for line in own], [line["kl"] for line in own])

    def take(self, step: int, kl: float) -> bool:
        """Note a measurement; whether it is the best so far. The leader's figure counts on every rank."""
        shared = torch.tensor(kl, dtype=torch.float64, device=device())
        torch.distributed.broadcast(shared, 0)
        self.steps.append(step)
        self.kls.append(float(shared))
        return self.best == len(self.kls) - 1

    def best_until(self, step: int) -> int:
        """The step of the best measurement up to this step."""
        return min((kl, taken) for kl, taken in zip(self.kls, self.steps, strict=True) if taken <= step)[1]

    @property
    def best(self) -> int:
        return min(range(len(self.kls)), key=self.kls.__getitem__)

    @property
    def best_step(self) -> int:
        return self.steps[self.best]

    def has_stagnated(self, patience: int | None) -> bool:
        return patience is not None and len(self.kls) - 1 - self.best >= patience
