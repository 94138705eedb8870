"""LoRA adapters in PEFT's own format: made, saved, loaded. alpha equals rank, so that B A is applied at scale 1."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from recovery.config import Adapter
from recovery.errors import UserError
from recovery.files import read_json, write_atomic, write_json
from recovery.placement import check_adapter, expert_parameters, patterns_of, short_names

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
WEIGHT = ".weight"


def add_adapter(model: Any, adapter: Adapter, seed: int, ranks: Mapping[str, int] | None = None) -> Any:
    """A PeftModel around `model`, with float32 or model-dtype A and B; only they require a gradient.

    A is Kaiming-uniform by PEFT's default, drawn from `seed`; B is zero, so the adapted model starts as the degraded.
    ranks: of each module by full name, for placement auto.
    """
    from peft import LoraConfig, get_peft_model

    names = list(ranks) if ranks is not None else check_adapter(model, adapter)
    parameters = _parameters_of(model, names)
    modules = [name for name in names if name not in parameters]
    pattern = {parameters.get(name, name): rank for name, rank in (ranks or {}).items()}
    # The same short patterns in the file as in the recipe: 60 full names would say no more and load no better.
    short = short_names(model, modules, patterns_of(adapter.placement)) if ranks is None else set(modules)
    short_parameters = _short_parameters(model, parameters.values()) if ranks is None else set(parameters.values())
    config = LoraConfig(
        r=max(pattern.values(), default=adapter.rank),
        lora_alpha=max(pattern.values(), default=adapter.effective_alpha),
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=modules,
        target_parameters=list(parameters.values()) or None,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted: Any = get_peft_model(model, config, autocast_adapter_dtype=False)
    own = adapted.peft_config["default"]
    own.target_modules, own.target_parameters = short, sorted(short_parameters) or None
    return adapted


def _parameters_of(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Of the matrices that PEFT must be given as parameters: the parameter's name, by the matrix'.

    These are experts, and in families whose older checkpoints had a module for each expert (DeepSeek, OLMoE) all linear
    modules of such a name, a shared expert's or a dense layer's: as modules PEFT would take them for the experts' own.
    """
    experts = expert_parameters(model)
    linear = [name for name in names if name not in experts]
    taken = {last for last in {name.rpartition(".")[2] for name in linear} if _is_taken_for_experts(model, last)}
    found = {name: name for name in names if name in experts}
    return found | {name: name + WEIGHT for name in linear if name.rpartition(".")[2] in taken}


def _is_taken_for_experts(model: Any, last: str) -> bool:
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=[last])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # it stands for a part of a parameter, and the others are missing
        return True
    return last not in set(config.target_modules or ())


def _short_parameters(model: Any, names: Collection[str]) -> set[str]:
    """What PEFT needs to find these parameters again: last parts of their names, or the whole names where that would
    find others too."""
    short = {".".join(name.split(".")[-3 if name.endswith(WEIGHT) else -2 :]) for name in names}
    others = {name for name, _ in model.named_parameters()} - {*names}
    return {*names} if any(name.endswith(f".{one}") for name in others for one in short) else short


def ranks_in(folder: Path) -> dict[str, int] | None:
    """The matrices' ranks of a saved adapter that has one for each; None for one rank everywhere."""
    pattern = read_json(folder / CONFIG)["rank_pattern"]
    return {name.removesuffix(WEIGHT): rank for name, rank in pattern.items()} or None


def write_uniform(folder: Path, into: Path) -> int:
    """The same adapter with one rank everywhere, as vLLM wants it: A and B padded with zeros to the largest, scales
    taken into B. Returns that rank.

    Raises UserError for adapters of parameters, experts' for the most part.
    """
    from safetensors.torch import save_file

    config = read_json(folder / CONFIG)
    if config.get("target_parameters"):
        raise UserError(
            str(folder), "it adapts experts, or what PEFT takes for them", "deliver --merged: vLLM has no such adapters"
        )
    weights = load_file(folder / WEIGHTS)
    ranks = {name: tensor.shape[0] for name, tensor in weights.items() if ".lora_A." in name}
    rank = max(ranks.values())
    padded: dict[str, Tensor] = {}
    for name, own in ranks.items():
        other = name.replace(".lora_A.", ".lora_B.")
        module = name.partition(".lora_A.")[0]
        scale = _pattern_value(config["alpha_pattern"], module, config["lora_alpha"]) / own
        padded[name] = nn.functional.pad(weights[name], (0, 0, 0, rank - own))
        padded[other] = nn.functional.pad(weights[other] * scale, (0, rank - own))
    into.mkdir(parents=True, exist_ok=True)
    save_file(padded, into / WEIGHTS, metadata={"format": "pt"})
    uniform = {**config, "r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}}
    write_json(into / CONFIG, uniform)
    return rank


def _pattern_value(pattern: Mapping[str, int], module: str, otherwise: int) -> int:
    """As PEFT reads such a pattern: the entry that the module's name ends with."""
    found = [value for key, value in pattern.items() if module == key or module.endswith(f".{key}")]
    return found[0] if found else otherwise


def adapter_parameters(model: Any) -> dict[str, nn.Parameter]:
    """The trainable parameters by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_adapter(model: Any, folder: Path, weights: dict[str, Tensor], base: str) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`, as PEFT, vLLM and the hub read them.

    weights: whole tensors by parameter name (under ZeRO the module's own may be partitioned). base: recorded as
    base_model_name_or_path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder, state_dict=weights, safe_serialization=True)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card template
    path = folder / CONFIG
    config = read_json(path)
    # Sets have no order of their own: sorted, equal adapters have equal files.
    config["target_modules"] = sorted(config["target_modules"])
    config["target_parameters"] = sorted(config.get("target_parameters") or ()) or None
    write_atomic(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def set_adapter(adapted: Any, folder: Path) -> None:
    """Give the adapters the values in `folder`, cast to their own dtype; they must be the same modules and ranks."""
    from peft import set_peft_model_state_dict

    found = set_peft_model_state_dict(adapted, load_file(folder / WEIGHTS))
    own = [name for name in found.missing_keys if "lora_" in name]
    assert not own, f"no values for {own[:3]} in {folder}"
    assert not found.unexpected_keys, f"{found.unexpected_keys[:3]} of {folder} are not adapted"


def adapted_modules(folder: Path) -> set[str]:
    """Names of the base model's modules that the adapter in `folder` changes, from its file's header alone."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        names: list[str] = list(file.keys())
    return {name.removeprefix("base_model.model.").partition(".lora_A.")[0] for name in names if ".lora_A." in name}


def load_adapter(model: Any, folder: Path) -> Any:
    """`model` with the adapter in `folder`, for inference. Raises UserError when there is none."""
    from peft import PeftModel

    if not (folder / WEIGHTS).is_file():
        raise UserError(str(folder), f"no {WEIGHTS} in it", "give the folder of a trained adapter")
    adapted: Any = PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False)
    return adapted.eval().requires_grad_(False)
