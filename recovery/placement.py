"""Placements: which `nn.Linear` modules get an adapter or a damage, by the last part of their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recovery.config import Adapter, Placement
from recovery.damage_config import ALL
from recovery.errors import UserError

PLACEMENTS: dict[Placement, tuple[str, ...]] = {
    "kv": ("k_proj", "v_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "attention_mlp": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}


def linear_modules(model: Any, *, head: bool = False) -> dict[str, Any]:
    """All `nn.Linear` modules by full name. head: the output head too, where it has weights of its own."""
    from torch import nn

    output = model.get_output_embeddings()
    tied = output.weight is model.get_input_embeddings().weight
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (module is not output or (head and not tied))
    }


def skeleton(path: str, revision: str | None) -> Any:
    """The model's modules without their weights (meta tensors). Raises UserError for an unknown architecture."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path, revision=revision)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(path, f"not a causal language model that transformers knows ({first})", "give one") from error


def select(model: Any, patterns: Sequence[str], where: str, *, head: bool = False) -> list[str]:
    """Full names of the linear modules whose last name parts match, in the model's order. head: as linear_modules;
    [all] is every one but the head.

    Raises UserError listing what there was for a pattern that matches nothing.
    """
    if tuple(patterns) == ALL:
        return list(linear_modules(model))
    names = list(linear_modules(model, head=head))
    chosen = {
        pattern: [name for name in names if name == pattern or name.endswith(f".{pattern}")] for pattern in patterns
    }
    missing = [pattern for pattern, found in chosen.items() if not found]
    if missing:
        available = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
        raise UserError(where, f"no linear module is named {', '.join(missing)}", f"this model has: {available}")
    wanted = {name for found in chosen.values() for name in found}
    return [name for name in names if name in wanted]


def patterns_of(placement: Placement | tuple[str, ...]) -> tuple[str, ...]:
    return placement if isinstance(placement, tuple) else PLACEMENTS[placement]


def check_inside_layers(model: Any, names: Sequence[str]) -> None:
    """Raise UserError for a module that a closed form cannot reach."""
    inside = {id(module) for layer in model.get_decoder().layers for module in layer.modules()}
    outside = [name for name in names if id(model.get_submodule(name)) not in inside]
    if outside:
        raise UserError(
            "adapter.init",
            f"{', '.join(outside)} lies outside the decoder's layers, which a closed form repairs",
            "leave it out of adapter.placement, or set init: zero",
        )


def check_rank(model: Any, names: Sequence[str], rank: int) -> None:
    """Raise UserError when the rank exceeds the narrower side of an adapted module."""
    sides = {name: min(model.get_submodule(name).weight.shape) for name in names}
    narrowest = min(sides, key=lambda name: sides[name])
    if rank > sides[narrowest]:
        raise UserError(
            "adapter.rank",
            f"{rank}, but {narrowest} has full rank {sides[narrowest]}",
            "lower it, or adapt others",
        )


def check_adapter(model: Any, adapter: Adapter) -> list[str]:
    """Full names of the modules that the adapter sits on. Raises UserError where there is none, where a closed form
    cannot reach one, or where the rank is too high."""
    names = select(model, patterns_of(adapter.placement), "adapter.placement", head=True)
    if adapter.init != "zero":
        check_inside_layers(model, names)
    check_rank(model, names, adapter.rank)
    return names
