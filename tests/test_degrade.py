"""Damage: seeded, as strong as told, listed tensor by tensor, and nothing else changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import recovery.degrade
from recovery.damage import MINIFLOATS, cast, flipped, minifloat, pruned, rounded
from recovery.damage_config import BitFlips, Cast, Pruning
from recovery.errors import UserError
from recovery.placement import select, skeleton
from recovery.stage import build
from tests.conftest import ARCHITECTURES
from tests.pipeline import job_of, make_benchmarks, tiny_recipe

FIRST = "model.layers.0.self_attn.k_proj.weight"


def degrade(model: Path, folder: Path, seed: int = 0, **damage: Any) -> Path:
    data = make_benchmarks(folder / "data")
    recipe = tiny_recipe(model, data, degrade=damage, seed=seed)
    return build(job_of(recipe, folder / "runs", "degrade"), recovery.degrade.produce, resumable=False)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_only_the_named_weights_change_and_by_what_the_manifest_says(
    kind: str, models: dict[str, Path], tmp_path: Path
):
    folder = degrade(models[kind], tmp_path, kind="gaussian_noise", relative_std=0.5)
    before, after = load_file(models[kind] / "model.safetensors"), load_file(folder / "model.safetensors")
    listed = json.loads((folder / "manifest.json").read_text())["details"]["tensors"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(listed)
    assert changed == {f"{name}.weight" for name in select(skeleton(str(models[kind]), None), ["kv"], "test")}
    for name, entry in listed.items():
        assert entry["l2"] == pytest.approx(float((after[name] - before[name]).norm()), rel=1e-4)
        expected = 0.5 * float(before[name].std()) * before[name].numel() ** 0.5
        assert entry["l2"] == pytest.approx(expected, rel=0.1)


def test_target_l2_is_met_by_the_first_k_projection(tiny: Path, tmp_path: Path):
    folder = degrade(tiny, tmp_path, kind="gaussian_noise", target_l2=7.5)
    listed = json.loads((folder / "manifest.json").read_text())["details"]["tensors"]
    assert listed[FIRST]["l2"] == pytest.approx(7.5, rel=1e-4)
    assert all(entry["l2"] == pytest.approx(7.5, rel=0.1) for entry in listed.values())


def test_the_same_seed_gives_the_same_bytes(tiny: Path, tmp_path: Path):
    noise: dict[str, Any] = {"kind": "gaussian_noise", "relative_std": 0.5}
    folders = [degrade(tiny, tmp_path / name, seed, **noise) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    weights = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


# ---- the other kinds, one matrix at a time ---------------------------------------------------------------

WEIGHT = torch.randn(24, 160, generator=torch.Generator().manual_seed(0)) * 0.1


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_rounding_has_its_levels_and_is_as_near_as_they_allow(bits: int, symmetric: bool):
    found = rounded(WEIGHT, bits, 64, symmetric=symmetric)
    for before, after in zip(WEIGHT.split(64, dim=1), found.split(64, dim=1), strict=True):
        assert max(len(row.unique()) for row in after) <= 2**bits - symmetric
        span = 2 * before.abs().amax(1) if symmetric else before.amax(1).clamp(min=0) - before.amin(1).clamp(max=0)
        step = span / (2**bits - 1 - symmetric)
        # The zero point is a level, so that the extremes may be half a step off.
        assert ((after - before).abs().amax(1) <= 1.01 * step).all()
    assert torch.equal(rounded(torch.zeros(2, 8), bits, 4, symmetric=symmetric), torch.zeros(2, 8))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2), ("fp16", torch.float16)],
)
def test_minifloats_round_as_torch_casts(name: str, dtype: torch.dtype):
    exponents = torch.linspace(-30, 8, 5000)
    values = torch.cat([2**exponents, -(2**exponents), torch.tensor([0.0])])
    format = MINIFLOATS[name]
    assert torch.equal(minifloat(values, *format), values.to(dtype).float())


def test_minifloats_hold_their_whole_grid():
    assert set(minifloat(torch.linspace(0, 7, 10_001), *MINIFLOATS["mxfp4"]).tolist()) == {0, 0.5, 1, 1.5, 2, 3, 4, 6}
    for name, count in (("mxfp6_e2m3", 32), ("mxfp6_e3m2", 32)):
        largest = MINIFLOATS[name][2]
        assert len(minifloat(torch.linspace(0, largest, 100_001), *MINIFLOATS[name]).unique()) == count


def test_finer_formats_lose_less():
    def loss(name: Any) -> float:
        return float((cast(WEIGHT, Cast(format=name)) - WEIGHT).norm() / WEIGHT.norm())

    order = ["mxfp4", "mxfp6_e2m3", "mxint8", "fp16"]
    losses = [loss(name) for name in order]
    assert losses == sorted(losses, reverse=True)
    assert 0.05 < losses[0] < 0.2
    assert loss("fp8_e4m3") < 0.04
    assert losses[-1] < 5e-4


def test_wrong_scales_and_overflow():
    saturated = cast(WEIGHT, Cast(format="fp8_e4m3", scale_error=0.25))
    assert float(saturated.abs().max()) == pytest.approx(0.25 * float(WEIGHT.abs().max()), rel=1e-3)
    forgotten = cast(WEIGHT, Cast(format="fp8_e4m3", scale_error=2.0, forgotten=True))
    torch.testing.assert_close(forgotten * 2, cast(WEIGHT, Cast(format="fp8_e4m3", scale_error=2.0)))
    overflown = cast(WEIGHT, Cast(format="fp16", scale_error=1e-6))
    assert float(overflown.abs().max()) == pytest.approx(65504e-6, rel=1e-3)


def test_pruning_zeroes_the_smallest():
    found = pruned(WEIGHT, Pruning(sparsity=0.5))
    assert int((found == 0).sum()) == WEIGHT.numel() // 2
    assert WEIGHT[found == 0].abs().max() <= found[found != 0].abs().min()
    blocks = pruned(WEIGHT, Pruning(sparsity=0.5, block=4)).view(24, -1, 4)
    assert ((blocks == 0).sum(-1) == 2).all()
    with pytest.raises(UserError, match="160 inputs"):
        pruned(WEIGHT, Pruning(block=7))
    with pytest.raises(UserError, match="takes 4 of every 4"):
        pruned(WEIGHT, Pruning(sparsity=0.9, block=4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flips_invert_one_bit_of_their_share(dtype: torch.dtype):
    weight = WEIGHT.to(dtype)
    found = flipped(weight, BitFlips(rate=0.05), 0, "w")
    assert torch.isfinite(found).all()
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    different = (weight.view(integer) ^ found.view(integer)).flatten().tolist()
    changed = [value & (2 ** (8 * dtype.itemsize) - 1) for value in different if value]
    assert all(value.bit_count() == 1 for value in changed)
    assert len(changed) == pytest.approx(0.05 * weight.numel(), rel=0.3)
    assert torch.equal(found, flipped(weight, BitFlips(rate=0.05), 0, "w"))


# ---- the other kinds, as checkpoints ---------------------------------------------------------------------


def degraded_as(model: Path, folder: Path, **damage: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State before and after; the checkpoint must load as any other."""
    out = degrade(model, folder, **damage)
    states = []
    for path in (model, out):
        loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        states.append({name: tensor.clone() for name, tensor in loaded.state_dict().items()})
    listed = json.loads((out / "manifest.json").read_text())["details"]["tensors"]
    before, after = states
    assert set(listed) == {name for name in before if not torch.equal(before[name], after[name])}
    return before, after


def test_two_bits_over_a_rest_of_four(tiny: Path, tmp_path: Path):
    kind: dict[str, Any] = {
        "kind": "rounding",
        "modules": ["gate_proj", "up_proj"],
        "bits": 2,
        "rest_bits": 4,
        "group": 16,
    }
    before, after = degraded_as(tiny, tmp_path, **kind)
    for name, weight in after.items():
        if weight.ndim < 2 or "embed" in name or "lm_head" in name:
            assert torch.equal(weight, before[name])
            continue
        levels = max(len(row.unique()) for part in weight.split(16, dim=1) for row in part)
        assert levels <= (4 if "gate" in name or "up_proj" in name else 16)


def test_rotary_order_is_another_one(tiny: Path, tmp_path: Path):
    before, after = degraded_as(tiny, tmp_path, kind="conversion_bug", bug="rotary_permuted")
    name = "model.layers.0.self_attn.q_proj.weight"
    head = before[name].shape[0] // 4
    assert torch.equal(after[name][1], before[name][head // 2])
    assert torch.equal(after[name].sort(dim=0).values, before[name].sort(dim=0).values)


def test_swapped_stale_and_shifted(tiny: Path, tmp_path: Path):
    before, after = degraded_as(tiny, tmp_path / "a", kind="conversion_bug", bug="swapped_gate_up", layers=[1])
    assert torch.equal(after["model.layers.1.mlp.gate_proj.weight"], before["model.layers.1.mlp.up_proj.weight"])
    assert torch.equal(after["model.layers.0.mlp.gate_proj.weight"], before["model.layers.0.mlp.gate_proj.weight"])
    before, after = degraded_as(tiny, tmp_path / "b", kind="conversion_bug", bug="stale_layer")
    assert torch.equal(after["model.layers.1.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])
    before, after = degraded_as(tiny, tmp_path / "c", kind="conversion_bug", bug="norm_minus_one")
    norm = "model.layers.0.input_layernorm.weight"
    torch.testing.assert_close(after[norm], before[norm] - 1)


def test_a_dropped_bias_and_a_head_of_its_own(models: dict[str, Path], tmp_path: Path):
    _, after = degraded_as(models["qwen2"], tmp_path / "a", kind="conversion_bug", bug="dropped_bias")
    assert not after["model.layers.0.self_attn.q_proj.bias"].any()
    before, after = degraded_as(models["llama"], tmp_path / "b", kind="conversion_bug", bug="untied_head")
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"].roll(1, dims=0))


def test_a_bug_that_the_architecture_cannot_have_is_the_users_mistake(
    tiny: Path, models: dict[str, Path], tmp_path: Path
):
    with pytest.raises(UserError, match="layer 0 has none before it"):
        degrade(tiny, tmp_path, kind="conversion_bug", bug="stale_layer", layers=[0])
    with pytest.raises(UserError, match="layer 1 is of another kind than the one before it"):  # dense, then experts
        degrade(models["deepseek_v3"], tmp_path / "b", kind="conversion_bug", bug="stale_layer", layers=[1])
    with pytest.raises(UserError, match="dropped_bias changes no tensor"):
        degrade(tiny, tmp_path, kind="conversion_bug", bug="dropped_bias")
    with pytest.raises(UserError, match="there are 2 layers"):
        degrade(tiny, tmp_path, kind="conversion_bug", bug="transposed", layers=[9])
