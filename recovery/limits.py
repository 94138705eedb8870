"""What limits a recovery: the KL that is left, split by what would remove it.

The degraded model is put right in steps, by writing reference weights into it: first the matrices that have adapters
(what adapters of full rank, perfectly trained, would come to), then all matrices (what any placement could). What is
left between the steps is what rank and training, placement, and damage outside of matrices still cost. Adapters that
make good damage elsewhere (a sequential closed form does) may leave less than their own matrices put right.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recovery.adapters import load_adapter
from recovery.calibration import FORWARD_TOKENS, calibration_rows
from recovery.corpus import Tokens
from recovery.experts import is_expert
from recovery.measure import HeldOut, measure_on, remember
from recovery.models import device
from recovery.placement import counterparts, matrices


@dataclass(frozen=True)
class Limits:
    """KL to the reference in nats a token, on held-out text unless said otherwise."""

    degraded: float
    recovered: float
    learned: float | None
    """on as many tokens of the text that was learned from; None where that is labelled text of another kind"""
    modules: float
    """with the adapted matrices put right: what other damage costs"""
    matrices: float
    """with all matrices put right: what no adapter undoes"""

    @property
    def rank(self) -> float:
        """What more rank or longer training could still remove, at least."""
        return max(self.recovered - self.modules, 0.0)

    @property
    def elsewhere(self) -> float:
        """What the adapters make good of the damage in other matrices, at least."""
        return max(self.modules - self.recovered, 0.0)

    @property
    def placement(self) -> float:
        """What adapters in more places could still remove."""
        return max(min(self.modules, self.recovered) - self.matrices, 0.0)

    @property
    def beyond(self) -> float:
        """What no adapter undoes of what is left; a trained one may make good some of that too."""
        return min(self.matrices, self.recovered)

    @property
    def data(self) -> float | None:
        """What more text could still remove, which is part of `rank`."""
        return None if self.learned is None else self.recovered - self.learned


def adapted_names(adapted: Any) -> list[str]:
    """Names of the matrices with an adapter, as recovery.placement has them."""
    names = []
    for name, module in adapted.named_modules():
        if hasattr(module, "lora_A"):
            inside = name.removeprefix("base_model.model.").replace(".base_layer", "")
            names.append(f"{inside}.{module.parameter_name}" if is_expert(module) else inside)
    return names


@torch.no_grad()
def put_right(degraded: Any, reference: Any, names: Iterable[str] | None = None) -> None:
    """Write the reference's weights into these matrices; into all of them unless named.

    Raises UserError where the reference has other matrices.
    """
    wrong, right = matrices(degraded, head=True), counterparts(degraded, reference, "models.degraded")
    for name in wrong if names is None else names:
        wrong[name].copy_(right[name])


def parts_of(learned: Tokens | None, held_out: Tokens) -> list[Tokens]:
    """The held-out text, and the first samples that were learned from, as many tokens."""
    if learned is None:
        return [held_out]
    return [held_out, learned.head(len(calibration_rows(learned, int(held_out.lengths.sum()))))]


def as_read(reference: Any, width: int, texts: Sequence[Tokens]) -> list[HeldOut]:
    """What the reference makes of the texts; it makes room on the device for the models that are measured."""
    reference.to(device())
    found = [remember(reference, tokens, width, FORWARD_TOKENS, "reference") for tokens in texts]
    reference.to("cpu")
    return found


def limits_of_whole(
    reference: Any, degraded: Any, recovered: Any, learned: Tokens | None, held_out: Tokens, width: int
) -> Limits:
    """Of a model whose parameters all learned: nothing is out of its reach. All models lie on the CPU; one at a time is
    on the device."""
    held, *learned_from = as_read(reference, width, parts_of(learned, held_out))
    before = measure_on(held, degraded.to(device()), width, "degraded").kl
    degraded.to("cpu")
    recovered.to(device())
    left = measure_on(held, recovered, width, "recovered").kl
    on_learned = [measure_on(text, recovered, width, "recovered, learned text").kl for text in learned_from]
    return Limits(before, left, next(iter(on_learned), None), modules=0.0, matrices=0.0)


def limits_of(
    reference: Any, degraded: Any, adapter: Path, learned: Tokens | None, held_out: Tokens, width: int
) -> Limits:
    """Both models lie on the CPU; one at a time is on the device. The degraded one ends there, with the reference's
    matrices.

    Raises UserError, before anything is measured, where the reference has other matrices.
    """
    counterparts(degraded, reference, "models.degraded")
    held, *learned_from = as_read(reference, width, parts_of(learned, held_out))

    def kl(model: Any, what: str) -> float:
        return measure_on(held, model, width, what).kl

    before = kl(degraded.to(device()), "degraded")
    adapted = load_adapter(degraded, adapter)
    names = adapted_names(adapted)
    recovered = kl(adapted, "recovered")
    on_learned = [measure_on(text, adapted, width, "recovered, learned text").kl for text in learned_from]
    degraded = adapted.unload()
    put_right(degraded, reference, names)
    modules = kl(degraded, "adapted matrices put right")
    put_right(degraded, reference)
    everything = kl(degraded, "all matrices put right")
    return Limits(before, recovered, next(iter(on_learned), None), modules, everything)
