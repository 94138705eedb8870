"""Placements: which linear modules and experts get an adapter or a damage, by the last part of their names."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from recovery.config import Adapter, ModelInput, Placement
from recovery.damage_config import ALL
from recovery.errors import UserError, first_line
from recovery.sources import check_packing, pretrained

KEYS_VALUES = frozenset({"k_proj", "v_proj", "kv_a_proj_with_mqa", "kv_b_proj", "qkv_proj"})
"""Apart, through a latent (DeepSeek's MLA), or in one matrix with the queries (Phi-3)."""
QUERIES_OUTPUT = frozenset({"q_proj", "q_a_proj", "q_b_proj", "o_proj"})
MLP = frozenset({"gate_proj", "up_proj", "down_proj", "gate_up_proj"})
PLACEMENTS: dict[str, tuple[frozenset[str], ...]] = {
    "kv": (KEYS_VALUES,),
    "attention": (KEYS_VALUES, QUERIES_OUTPUT),
    "attention_mlp": (KEYS_VALUES, QUERIES_OUTPUT, MLP),
}
"""Parts of a layer, each with the last parts of names that architectures have for its modules."""


def modules_of_text(model: Any) -> Iterator[tuple[str, Any]]:
    """The decoder's modules by full name: what a model has beside it, such as a tower for images, no text comes by."""
    inside = {id(module) for module in model.get_decoder().modules()}
    return ((name, module) for name, module in model.named_modules() if id(module) in inside)


def linear_modules(model: Any, *, head: bool = False) -> dict[str, Any]:
    """All `nn.Linear` modules of the decoder by full name, but for what routes: gates of one output (Qwen2-MoE's of its
    shared expert), and gates beside experts (AFMoE's; other routers are no such modules). head: the output head too,
    where it has weights of its own."""
    from torch import nn

    experts = expert_parameters(model)
    found = {
        name: module
        for name, module in modules_of_text(model)
        if isinstance(module, nn.Linear) and module.out_features > 1 and not (experts and _last_part(name) == "gate")
    }
    output = model.get_output_embeddings()
    if head and output.weight is not model.get_input_embeddings().weight:
        found |= {name: module for name, module in model.named_modules() if module is output}
    return found


def shape_of(weight: Any) -> tuple[int, ...]:
    """The whole parameter's, where ZeRO-3 holds it in pieces."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


def rank_parameters(weight: Any) -> int:
    """Parameters of one rank: of a matrix inputs + outputs, of experts that for each of them."""
    *experts, outputs, inputs = shape_of(weight)
    return math.prod(experts) * (outputs + inputs)


def expert_parameters(model: Any) -> dict[str, Any]:
    """Weights of all experts of a layer in one parameter (E, O, I), by full name: gate_up_proj and down_proj of
    Mixtral, Qwen-MoE, OLMoE and DeepSeek. Transposed ones, and those with biases or norms, are left out."""
    return {
        f"{name}.{part}": getattr(module, part)
        for name, module in modules_of_text(model)
        if getattr(module, "is_transposed", True) is False
        and module.has_gate
        and module.is_concatenated
        and not module.has_bias
        and not getattr(module, "has_post_expert_norm", False)
        for part in ("gate_up_proj", "down_proj")
    }


def matrices(model: Any, *, head: bool = False) -> dict[str, Any]:
    """The weights of all linear modules and experts by the names that placements are matched with, in the model's
    order. head: as linear_modules."""
    linear = {name: module.weight for name, module in linear_modules(model, head=head).items()}
    found = linear | expert_parameters(model)
    order = {id(parameter): place for place, parameter in enumerate(model.parameters())}
    return dict(sorted(found.items(), key=lambda item: order[id(item[1])]))


def counterparts(degraded: Any, reference: Any, where: str) -> dict[str, Any]:
    """The reference's weights by the names of the degraded model's matrices, the head where that has its own.

    Raises UserError where the reference lacks one, or has it in another shape.
    """
    theirs = dict(reference.named_parameters(remove_duplicate=False))
    found = {}
    for name, weight in matrices(degraded, head=True).items():
        right = theirs.get(name if weight.dim() == 3 else f"{name}.weight")
        if right is None or right.shape != weight.shape:
            shape = "none there" if right is None else f"{tuple(right.shape)} there"
            raise UserError(
                where,
                f"{name} is {tuple(weight.shape)}, and the reference has {shape}",
                "give the reference of the same architecture: weights are compared, not only logits",
            )
        found[name] = right
    return found


def skeleton(path: str, revision: str | None) -> Any:
    """The model's modules without their weights (meta tensors). Raises UserError for an unknown architecture."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        place, arguments = pretrained(path, revision)
        config = AutoConfig.from_pretrained(place, **arguments)
        check_packing(path, config)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError) as error:
        first = first_line(error)
        raise UserError(path, f"not a causal language model that transformers knows ({first})", "give one") from error


def may_be_in_pieces(model: ModelInput) -> bool:
    """Whether ZeRO-3 may partition it while it is read: packed weights are unpacked whole, and of a block of experts
    that is gathered as a whole no part can be looked at by itself. Such models are partitioned afterwards."""
    bare = skeleton(model.path, model.revision)
    return not check_packing(model.path, bare.config) and not expert_parameters(bare)


def select(model: Any, patterns: Sequence[str], where: str, *, head: bool = False) -> list[str]:
    """Full names of the linear modules, and of experts' parameters, that match any pattern, in the model's order.

    patterns: last parts of names; kv, attention, attention_mlp, whatever the architecture calls them; all, which is
    every one but the head. head: as linear_modules. Raises UserError listing what there was for a pattern that matches
    nothing.
    """
    modules = matrices(model, head=head)
    wanted: set[str] = set()
    for pattern in patterns:
        if (pattern,) == ALL:
            wanted.update(matrices(model))
            continue
        for part in PLACEMENTS.get(pattern, (pattern,)):
            found = [name for name in modules if _matches(name, part)]
            if not found:
                missing = part if isinstance(part, str) else " or ".join(sorted(part))
                available = ", ".join(sorted({_last_part(name) for name in modules}))
                raise UserError(where, f"no linear module is named {missing}", f"this model has: {available}")
            wanted.update(found)
    return [name for name in modules if name in wanted]


def _matches(name: str, pattern: str | frozenset[str]) -> bool:
    if isinstance(pattern, frozenset):
        return _last_part(name) in pattern
    return name == pattern or name.endswith(f".{pattern}")


def _last_part(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def short_names(model: Any, names: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """What PEFT needs to find these modules again: the patterns, or last parts of names where they stand for more; the
    names themselves where that would find others too, such as those of a tower for images."""
    plain = [pattern for pattern in patterns if pattern not in PLACEMENTS and (pattern,) != ALL]
    short = {next((one for one in plain if _matches(name, one)), _last_part(name)) for name in names}
    own = set(names)
    others = (name for name, _ in model.named_modules() if name not in own)
    return own if any(_matches(name, one) for name in others for one in short) else short


def patterns_of(placement: Placement | tuple[str, ...]) -> tuple[str, ...]:
    return placement if isinstance(placement, tuple) else (placement,)


def check_inside_layers(model: Any, names: Sequence[str]) -> None:
    """Raise UserError for a module that a closed form cannot reach."""
    inside = {id(parameter) for layer in model.get_decoder().layers for parameter in layer.parameters()}
    weights = matrices(model, head=True)
    outside = [name for name in names if id(weights[name]) not in inside]
    if outside:
        raise UserError(
            "adapter.init",
            f"{', '.join(outside)} lies outside the decoder's layers, which a closed form repairs",
            "leave it out of adapter.placement, or set init: zero",
        )


def check_rank(model: Any, names: Sequence[str], rank: int) -> None:
    """Raise UserError when the rank exceeds the narrower side of an adapted module."""
    weights = matrices(model, head=True)
    sides = {name: min(shape_of(weights[name])[-2:]) for name in names}
    narrowest = min(sides, key=lambda name: sides[name])
    if rank > sides[narrowest]:
        raise UserError(
            "adapter.rank",
            f"{rank}, but {narrowest} has full rank {sides[narrowest]}",
            "lower it, or adapt others",
        )


def check_adapter(model: Any, adapter: Adapter) -> list[str]:
    """Full names of the modules that the adapter sits on; with placement auto, of those that it may sit on.

    Raises UserError where a placement names none or one that a closed form cannot reach, and for too high a rank.
    """
    if adapter.placement == "auto":
        parameter_budget(model, adapter)
        return list(matrices(model))
    names = select(model, patterns_of(adapter.placement), "adapter.placement", head=True)
    if adapter.init != "zero":
        check_inside_layers(model, names)
    check_rank(model, names, adapter.rank)
    return names


def parameter_budget(model: Any, adapter: Adapter) -> int:
    """Of placement auto. Raises UserError where it is not given and the model has no keys and values by known names."""
    if adapter.budget is not None:
        return adapter.budget
    weights = matrices(model)
    return adapter.rank * sum(sum(weights[name].shape) for name in select(model, ("kv",), "adapter.budget"))
