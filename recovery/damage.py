"""What each kind of damage does to one weight matrix (O outputs, I inputs), or to a whole model.

Everything is a function of (settings, seed, tensor name, shape) alone, not of order or device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recovery.damage_config import BitFlips, Bug, Cast, ConversionBug, Pruning
from recovery.errors import UserError

MX_BLOCK = 32
MINIFLOATS = {
    # (exponent bits, mantissa bits, largest value), OCP Microscaling v1.0 and OCP FP8
    "mxfp4": (2, 1, 6.0),
    "mxfp6_e2m3": (2, 3, 7.5),
    "mxfp6_e3m2": (3, 2, 28.0),
    "mxfp8_e4m3": (4, 3, 448.0),
    "mxfp8_e5m2": (5, 2, 57344.0),
    "fp8_e4m3": (4, 3, 448.0),
    "fp8_e5m2": (5, 2, 57344.0),
    "fp16": (5, 10, 65504.0),
}


def generator_of(seed: int, name: str) -> np.random.Generator:
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return np.random.Generator(np.random.Philox(key=[seed, key]))


def noise_like(weight: Tensor, seed: int, name: str) -> Tensor:
    """Standard normal float32 noise."""
    return torch.from_numpy(generator_of(seed, name).standard_normal(tuple(weight.shape), dtype=np.float32))


def rounded(weight_OI: Tensor, bits: int, group: int, *, symmetric: bool) -> Tensor:
    """Round to the nearest of 2^bits levels (one less where symmetric) between each group's extremes."""
    parts = []
    for part_OG in weight_OI.split(group, dim=1):
        if symmetric:
            most = 2 ** (bits - 1) - 1
            scale_O1 = part_OG.abs().amax(1, keepdim=True).clamp(min=1e-30) / most
            parts.append((part_OG / scale_O1).round().clamp(-most, most) * scale_O1)
            continue
        # The range holds zero, so that zero stays zero.
        low_O1, high_O1 = (f(part_OG, 1, keepdim=True) for f in (torch.amin, torch.amax))
        low_O1, high_O1 = low_O1.clamp(max=0.0), high_O1.clamp(min=0.0)
        scale_O1 = (high_O1 - low_O1).clamp(min=1e-30) / (2**bits - 1)
        zero_O1 = (-low_O1 / scale_O1).round()
        levels_OG = ((part_OG / scale_O1).round() + zero_O1).clamp(0, 2**bits - 1)
        parts.append((levels_OG - zero_O1) * scale_O1)
    return torch.cat(parts, dim=1)


def minifloat(x: Tensor, exponent_bits: int, mantissa_bits: int, largest: float) -> Tensor:
    """The nearest value (ties to even) of a small float format with subnormals; larger ones saturate."""
    least = 2 - 2 ** (exponent_bits - 1)  # exponent of the smallest normal number
    exponent = torch.frexp(x)[1] - 1
    step = torch.ldexp(torch.ones_like(x), exponent.clamp(min=least) - mantissa_bits)
    return ((x / step).round() * step).clamp(-largest, largest)


def cast(weight_OI: Tensor, damage: Cast) -> Tensor:
    if damage.format == "fp16":
        gain = 1 / damage.scale_error
        return minifloat(weight_OI * gain, *MINIFLOATS["fp16"]) / (1.0 if damage.forgotten else gain)
    if damage.format.startswith("fp8"):
        format = MINIFLOATS[damage.format]
        right = weight_OI.abs().amax().clamp(min=1e-30) / format[2]
        stored = right * damage.scale_error
        return minifloat(weight_OI / stored, *format) * (right if damage.forgotten else stored)
    parts = []
    for part_OG in weight_OI.split(MX_BLOCK, dim=1):
        most_O1 = part_OG.abs().amax(1, keepdim=True)
        exponent_O1 = torch.frexp(most_O1)[1] - 1
        if damage.format == "mxint8":  # two's complement with 6 fraction bits
            right_O1 = torch.ldexp(torch.ones_like(most_O1), exponent_O1)
            stored_O1 = right_O1 * damage.scale_error
            elements_OG = ((part_OG / stored_O1) * 64).round().clamp(-128, 127) / 64
        else:
            format = MINIFLOATS[damage.format]
            largest = int(np.floor(np.log2(format[2])))
            right_O1 = torch.ldexp(torch.ones_like(most_O1), exponent_O1 - largest)
            stored_O1 = right_O1 * damage.scale_error
            elements_OG = minifloat(part_OG / stored_O1, *format)
        parts.append(elements_OG * (right_O1 if damage.forgotten else stored_O1))
    return torch.cat(parts, dim=1)


def pruned(weight_OI: Tensor, damage: Pruning) -> Tensor:
    """The smallest magnitudes of the matrix, or of each block, set to zero."""
    if damage.block is None:
        gone = int(damage.sparsity * weight_OI.numel())
        flat = weight_OI.flatten().clone()
        flat[flat.abs().argsort(stable=True)[:gone]] = 0.0
        return flat.view_as(weight_OI)
    outputs, inputs = weight_OI.shape
    if inputs % damage.block:
        raise UserError("degrade.block", f"{damage.block}, but a matrix has {inputs} inputs", "give a divisor of it")
    blocks = weight_OI.reshape(outputs, -1, damage.block).clone()
    gone = round(damage.sparsity * damage.block)
    if not 0 < gone < damage.block:
        found = f"{damage.sparsity}, which takes {gone} of every {damage.block}"
        raise UserError("degrade.sparsity", found, "give a share between them")
    blocks.scatter_(2, blocks.abs().argsort(dim=2, stable=True)[..., :gone], 0.0)
    return blocks.view_as(weight_OI)


def flipped(weight_OI: Tensor, damage: BitFlips, seed: int, name: str) -> Tensor:
    """One bit of some weights inverted, in the dtype in which they are stored."""
    integer = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}[weight_OI.dtype]
    bits = 8 * weight_OI.element_size()
    random = generator_of(seed, name)
    count = int(random.binomial(weight_OI.numel(), damage.rate))
    places = torch.from_numpy(random.choice(weight_OI.numel(), size=count, replace=False))
    masks = torch.from_numpy(np.left_shift(np.int64(1), random.integers(0, bits, size=count)))
    flat = weight_OI.flatten().clone()
    stored = flat[places].view(integer)
    changed = (stored.to(torch.int64) ^ masks).to(integer).view(weight_OI.dtype)
    flat[places] = torch.where(torch.isfinite(changed), changed, flat[places])
    return flat.view_as(weight_OI)


# ---- conversion bugs -------------------------------------------------------------------------------------


def interleaved(weight_OI: Tensor, heads: int) -> Tensor:
    """Rows of a Q or K projection from the order of halves (Llama in transformers) to pairs (its first release)."""
    outputs, inputs = weight_OI.shape
    halves = weight_OI.view(heads, 2, outputs // heads // 2, inputs)
    return halves.transpose(1, 2).reshape(outputs, inputs)


def _permute(layer: Any, config: Any, _: int, __: Any) -> None:
    attention = layer.self_attn
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    for module, heads in ((attention.q_proj, config.num_attention_heads), (attention.k_proj, kv_heads)):
        module.weight.copy_(interleaved(module.weight, heads))
        if module.bias is not None:
            module.bias.copy_(interleaved(module.bias[:, None], heads)[:, 0])


def _transpose(layer: Any, _: Any, __: int, ___: Any) -> None:
    for module in layer.modules():
        if isinstance(module, nn.Linear) and module.in_features == module.out_features:
            module.weight.copy_(module.weight.T.clone())


def _swap(layer: Any, _: Any, __: int, ___: Any) -> None:
    gate, up = layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight
    kept = gate.clone()
    gate.copy_(up)
    up.copy_(kept)


def _drop_bias(layer: Any, _: Any, __: int, ___: Any) -> None:
    for module in layer.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.zero_()


def _stale(layer: Any, _: Any, number: int, layers: Any) -> None:
    if number == 0:
        raise UserError("degrade.layers", "layer 0 has none before it", "name a later one")
    own, former = (
        {name: one.shape for name, one in some.state_dict().items()} for some in layers[number - 1 : number + 1]
    )
    if own != former:
        raise UserError("degrade.layers", f"layer {number} is of another kind than the one before it", "name another")
    layer.load_state_dict(layers[number - 1].state_dict())


def _shift_norms(layer: Any, _: Any, __: int, ___: Any) -> None:
    for name, parameter in layer.named_parameters():
        if "norm" in name:
            parameter.sub_(1.0)


BUGS: dict[Bug, Callable[[Any, Any, int, Any], None]] = {
    "rotary_permuted": _permute,
    "transposed": _transpose,
    "swapped_gate_up": _swap,
    "dropped_bias": _drop_bias,
    "stale_layer": _stale,
    "norm_minus_one": _shift_norms,
}


@torch.no_grad()
def convert_badly(model: Any, damage: ConversionBug) -> None:
    """Put the bug into the model, in place. Raises UserError where the model has nothing that it could hit."""
    config = model.config.get_text_config()
    if damage.bug == "untied_head":
        output = model.get_output_embeddings()
        weight_VH = model.get_input_embeddings().weight if output.weight is None else output.weight
        output.weight = nn.Parameter(weight_VH.detach().roll(1, dims=0).clone(), requires_grad=False)
        config.tie_word_embeddings = model.config.tie_word_embeddings = False
        return
    layers = model.get_decoder().layers
    default = (len(layers) // 2,) if damage.bug == "stale_layer" else tuple(range(len(layers)))
    chosen = default if damage.layers is None else damage.layers
    if beyond := [number for number in chosen if number >= len(layers)]:
        raise UserError("degrade.layers", f"{beyond}, but there are {len(layers)} layers", "count them from 0")
    try:
        for number in chosen:
            BUGS[damage.bug](layers[number], config, number, layers)
    except AttributeError as error:
        raise UserError(
            "degrade.bug", f"{damage.bug}: this architecture has no such part ({error})", "choose another"
        ) from error
