"""Diagnosis: every kind of damage is recognised by its traces, and the advice fits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from eval.heatmap import plot_tensors
from launch.cli import app
from recovery.advice import adapted_as, advise, summarize
from recovery.damage import cast, flipped, interleaved, noise_like, pruned, rounded
from recovery.damage_config import BitFlips, Cast, Pruning
from recovery.diagnosis import Finding, compare_tensors, examine
from recovery.errors import UserError
from recovery.weights import checkpoints
from tests.test_degrade import degrade

# As wide as a small real layer, so that statistics say something.
WEIGHT = torch.randn(192, 576, generator=torch.Generator().manual_seed(0)) * 0.05
SQUARE = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
NORM = torch.rand(576, generator=torch.Generator().manual_seed(2)) + 0.5
LOW_RANK = WEIGHT + torch.randn(192, 4) @ torch.randn(4, 576) * 0.01

SEEDED = torch.Generator().manual_seed(3)


def low_bits(weight: torch.Tensor) -> torch.Tensor:
    """The second lowest bit of ten values inverted."""
    stored = weight.clone().view(torch.int32)
    stored[:10, 0] ^= 2
    return stored.view(torch.float32)


CASES: Mapping[str, tuple[torch.Tensor, torch.Tensor, str, str]] = {
    "noise": (WEIGHT, WEIGHT + 0.5 * WEIGHT.std() * noise_like(WEIGHT, 0, "w"), "noise", "0.5 times"),
    "2 bits": (WEIGHT, rounded(WEIGHT, 2, 64, symmetric=False), "quantized", "4 values in a group of 64 (2 bits)"),
    "3 bits, whole rows": (WEIGHT, rounded(WEIGHT, 3, 576, symmetric=True), "quantized", "7 values in a group of 576"),
    "4 bits": (WEIGHT, rounded(WEIGHT, 4, 128, symmetric=False), "quantized", "(4 bits)"),
    "mxfp4": (WEIGHT, cast(WEIGHT, Cast(format="mxfp4")), "quantized", "values in a group of 32"),
    "fp8": (WEIGHT, cast(WEIGHT, Cast(format="fp8_e4m3")), "quantized", ""),
    "half pruned": (WEIGHT, pruned(WEIGHT, Pruning()), "pruned", "50.0% of the values are zero, the smallest ones"),
    "2:4": (WEIGHT, pruned(WEIGHT, Pruning(block=4)), "pruned", "2:4 pattern"),
    "bit flips": (WEIGHT, flipped(WEIGHT, BitFlips(rate=0.001), 0, "w"), "bit_flips", "by a single bit"),
    "transposed": (SQUARE, SQUARE.T.contiguous(), "transposed", "transpose"),
    "transposed, not square": (WEIGHT, WEIGHT.T.contiguous(), "transposed", "transpose"),
    "rotary": (WEIGHT, interleaved(WEIGHT, 3), "rotary_permuted", "3 heads"),
    "rotary, heads of 96": (WEIGHT, interleaved(WEIGHT, 2), "rotary_permuted", "2 heads"),
    "rotary in bf16": (WEIGHT, interleaved(WEIGHT, 3).bfloat16(), "rotary_permuted", "3 heads"),
    "off by a row": (WEIGHT, WEIGHT.roll(1, 0), "permuted", "moved by 1"),
    "rows in another order": (WEIGHT, WEIGHT.flip(0), "permuted", "another order (192 moved)"),
    "norm of another convention": (NORM, NORM - 1, "shifted", "multiplies by 1 + weight"),
    "scale": (WEIGHT, WEIGHT * 0.125, "scaled", "0.125 times"),
    "fp8 whose scale was forgotten": (
        WEIGHT,
        cast(WEIGHT, Cast(format="fp8_e4m3", scale_error=8.0, forgotten=True)),
        "scaled",
        "times the reference's, and rounded",
    ),
    "dropped": (NORM, torch.zeros_like(NORM), "zero", "dropped"),
    "overflow": (WEIGHT, torch.where(WEIGHT > 0.1, torch.inf, WEIGHT), "not_finite", "inf or nan"),
    "a norm with a little noise": (NORM, NORM + 0.01 * torch.randn(576, generator=SEEDED), "noise", "Gaussian"),
    "a norm of ones, moved": (torch.ones(64), torch.ones(64) + 0.01 * torch.rand(64, generator=SEEDED), "changed", ""),
    "a few low bits": (WEIGHT, low_bits(WEIGHT), "bit_flips", "by a single bit"),
    "a norm's entries in another order": (NORM, NORM.flip(0), "permuted", "another order"),
    "through bfloat16 and back": (WEIGHT, WEIGHT.bfloat16().float(), "rounded", "through bfloat16"),
    "fp16 that overflowed": (WEIGHT * 1e6, (WEIGHT * 1e6).half(), "not_finite", "inf or nan"),
    "float8 without a scale": (WEIGHT, WEIGHT.to(torch.float8_e4m3fn), "quantized", ""),
    "a scalar": (torch.tensor(1.0), torch.tensor(1.5), "scaled", "1.5 times"),
    "another shape": (WEIGHT, WEIGHT[:100], "misshapen", "another shape: (100, 576)"),
    "low rank": (WEIGHT, LOW_RANK, "low_rank", "rank 4 of 192"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_damage_is_recognised(case: str):
    right, wrong, kind, words = CASES[case]
    finding = compare_tensors("layer.weight", right, wrong)
    assert finding is not None
    assert (finding.kind, words in finding.detail) == (kind, True), finding.detail
    assert finding.relative_l2 > 0


def test_the_spectrum_of_a_change_says_what_rank_it_has():
    low = compare_tensors("w", WEIGHT, LOW_RANK)
    noise = compare_tensors("w", WEIGHT, WEIGHT + 0.01 * noise_like(WEIGHT, 0, "w"))
    assert low is not None
    assert low.spectrum is not None
    assert low.spectrum[2:] == (4, 192)
    assert noise is not None
    assert noise.spectrum is not None
    values = torch.linalg.svdvals((WEIGHT + 0.01 * noise_like(WEIGHT, 0, "w") - WEIGHT).double()).square()
    shares = values.cumsum(0) / values.sum()
    assert noise.spectrum == (*(int((shares < share).sum()) + 1 for share in (0.5, 0.9, 0.99)), 192)
    assert "4 hold half" not in summarize([noise])[0][1]
    assert f"of 192 singular values {noise.spectrum[0]} hold half" in summarize([noise])[0][1]
    large = torch.ones(1100, 8)
    beyond = compare_tensors("w", large, torch.cat([large[:-1], 2 * large[-1:]]))
    assert beyond is not None
    assert beyond.kind != "low_rank"  # the corner that is looked at says nothing
    assert beyond.spectrum is None
    swapped = compare_tensors("w", SQUARE, SQUARE.T.contiguous())
    assert swapped is not None
    assert swapped.spectrum is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_weights_in_another_dtype_are_no_damage(dtype: torch.dtype):
    assert compare_tensors("w", WEIGHT, WEIGHT.to(dtype)) is None


def found(reference: Path, degraded: Path) -> list[Finding]:
    return [finding for _, finding in examine(*checkpoints(reference, degraded)) if finding is not None]


@pytest.mark.parametrize(
    ("damage", "kind", "words"),
    [
        ({"kind": "conversion_bug", "bug": "swapped_gate_up"}, "other_tensor", "gate and up are swapped"),
        ({"kind": "conversion_bug", "bug": "stale_layer"}, "other_tensor", "a stale copy: layer 0's"),
        ({"kind": "conversion_bug", "bug": "untied_head"}, "permuted", "untied from the embedding: rows moved"),
        ({"kind": "conversion_bug", "bug": "norm_minus_one"}, "zero", "dropped"),
    ],
)
def test_bugs_in_checkpoints_are_named_and_advice_is_to_export(
    damage: dict[str, Any], kind: str, words: str, tiny: Path, tmp_path: Path
):
    findings = found(tiny, degrade(tiny, tmp_path, **damage))
    assert {finding.kind for finding in findings} == {kind}
    advice = advise(findings)
    assert advice.action == "export"
    assert any(words in reason and "relative L2" in reason for reason in advice.reasons)


def test_a_missing_tensor_is_found(tiny: Path, tmp_path: Path):
    weights = load_file(tiny / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors")
    (finding,) = found(tiny, tmp_path)
    assert (finding.tensor, finding.kind) == (name, "missing")


def test_what_needs_no_export_and_no_adapter(tiny: Path, tmp_path: Path):
    """Weights rounded on the way, a tied head written out, buffers of old checkpoints, a second copy beside them."""
    weights = load_file(tiny / "model.safetensors")
    more = {"lm_head.weight": weights["model.embed_tokens.weight"].clone(), "model.rotary_emb.inv_freq": torch.ones(8)}
    reference = tmp_path / "reference"
    reference.mkdir()
    save_file(weights | more, reference / "model.safetensors")
    save_file({"tok_embeddings.weight": torch.ones(2, 2)}, reference / "consolidated.safetensors")
    assert found(reference, tiny) == []
    assert found(tiny, reference) == []
    rounded_ = tmp_path / "rounded"
    rounded_.mkdir()
    save_file({name: tensor.bfloat16().float() for name, tensor in weights.items()}, rounded_ / "model.safetensors")
    findings = found(tiny, rounded_)
    assert {finding.kind for finding in findings} == {"rounded"}
    assert advise(findings).action == "nothing"


def test_advice_names_only_what_can_be_adapted():
    def finding(tensor: str, *shape: int) -> Finding:
        return Finding(tensor, shape, 0.5, "noise", "Gaussian")

    names = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight")
    advice = advise([finding(name, 8, 8) for name in names] + [finding("model.norm.weight", 8)])
    assert (advice.action, advice.modules) == ("adapters", ("up_proj",))
    assert "embed_tokens, norm get no adapter" in advice.reasons[-1]
    assert "0.000144 MB" in advice.reasons[-1]  # (64 + 8) values of 2 bytes
    # A closed form repairs the layers alone: a damaged head must not cost the others their repair.
    advice = advise([finding(name, 8, 8) for name in ("lm_head.weight", names[1])])
    assert (advice.action, advice.modules, advice.replaced) == ("adapters", ("up_proj",), ("lm_head.weight",))
    # Nor are routers and gates of one output among the matrices that placements know.
    routing = ("model.layers.0.mlp.gate.weight", "model.layers.0.mlp.shared_expert_gate.weight")
    advice = advise([finding(names[1], 8, 8), finding(routing[0], 4, 8), finding(routing[1], 1, 8)])
    assert (advice.modules, advice.replaced) == (("up_proj",), routing)


def test_what_the_reference_does_not_have_is_neither_replaced_nor_adapted(tiny: Path, tmp_path: Path):
    folder = tmp_path / "extra"
    shutil.copytree(tiny, folder)
    weights = load_file(folder / "model.safetensors")
    attention = "model.layers.0.self_attn"
    weights[f"{attention}.q_proj.bias"] = torch.zeros(64)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert found(tiny, folder) == []
    weights[f"{attention}.k_scale"] = torch.ones(4, 4)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    advice = advise(found(tiny, folder))
    assert advice.action == "export"
    assert (advice.modules, advice.replaced) == ((), ())
    assert "k_scale" in advice.reasons[0]
    assert "not in the reference" in advice.reasons[0]
    weights[f"{attention}.v_proj.weight"] += 0.1 * torch.randn(weights[f"{attention}.v_proj.weight"].shape)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    advice = advise(found(tiny, folder))
    assert (advice.action, advice.modules, advice.replaced) == ("adapters", ("v_proj",), ())
    assert "k_scale" in advice.reasons[-1]


def test_damage_outside_of_the_layers_matrices_is_replaced(tiny: Path, tmp_path: Path):
    degraded = tmp_path / "degraded"
    shutil.copytree(tiny, degraded)
    weights = load_file(tiny / "model.safetensors")
    norm = weights["model.norm.weight"]
    weights["model.norm.weight"] = norm + 0.3 * torch.randn(norm.shape, generator=torch.Generator().manual_seed(4))
    save_file(weights, degraded / "model.safetensors", metadata={"format": "pt"})
    result = CliRunner().invoke(app, ["diagnose", str(tiny), str(degraded), "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "replace them" in result.output
    assert "adapter." not in result.output
    content = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert content["advice"]["replaced"] == ["model.norm.weight"]
    assert content["costs"]["floor"] == content["costs"]["degraded"]["kl"] > 0


def test_the_command_says_what_where_and_what_to_do(tiny: Path, tmp_path: Path):
    degraded = degrade(tiny, tmp_path, kind="gaussian_noise", relative_std=0.5)
    result = CliRunner().invoke(app, ["diagnose", str(tiny), str(degraded), "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "k_proj in layers 0-1" in result.output
    assert 'adapter.placement: ["k_proj", "v_proj"]' in result.output
    content = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert len(content["findings"]) == 4
    assert (tmp_path / "out" / "damage.png").stat().st_size > 5000
    same = CliRunner().invoke(app, ["diagnose", str(tiny), str(tiny)])
    assert "tensors are equal" in same.output


def test_folders_that_are_no_models_are_the_users_mistake(tiny: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"no \.safetensors file"):
        found(tiny, tmp_path)
    assert summarize([]) == []
    (tmp_path / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        found(tiny, tmp_path)


def test_experts_are_named_as_placements_know_them():
    names = {
        "model.layers.1.block_sparse_moe.experts.3.w1.weight": "experts.gate_up_proj",
        "model.layers.1.mlp.experts.0.up_proj.weight": "experts.gate_up_proj",
        "model.layers.1.mlp.experts.0.down_proj.weight": "experts.down_proj",
        "model.layers.1.mlp.experts.gate_up_proj": "experts.gate_up_proj",
        "model.layers.1.mlp.shared_experts.up_proj.weight": "up_proj",
    }
    for tensor, placement in names.items():
        assert adapted_as(tensor) == placement


def test_values_that_are_no_numbers_can_be_drawn(tmp_path: Path):
    values = {"a.layers.0.k_proj.weight": float("inf"), "a.layers.1.k_proj.weight": float("nan"), "norm": 0.0}
    plot_tensors(values, "title", tmp_path / "a.png")
    plot_tensors({"norm.weight": 0.0}, "title", tmp_path / "b.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_what_cannot_be_run_is_still_compared(tiny: Path, tmp_path: Path):
    degraded = degrade(tiny, tmp_path, kind="gaussian_noise", relative_std=0.5)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(degraded / "model.safetensors", bare)
    result = CliRunner().invoke(app, ["diagnose", str(tiny), str(bare), "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "k_proj in layers 0-1" in result.output
    assert "not weighed on text" in result.output
    assert json.loads((tmp_path / "out" / "diagnosis.json").read_text())["findings"]
