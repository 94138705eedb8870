"""Damage: seeded, as strong as told, listed tensor by tensor, and nothing else changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import recovery.degrade
from recovery.stage import build
from tests.conftest import ARCHITECTURES
from tests.pipeline import job_of, make_benchmarks, tiny_recipe

FIRST = "model.layers.0.self_attn.k_proj.weight"


def degrade(model: Path, folder: Path, seed: int = 0, **strength: object) -> Path:
    data = make_benchmarks(folder / "data")
    recipe = tiny_recipe(model, data, degrade={"relative_std": None, **strength}, seed=seed)
    return build(job_of(recipe, folder / "runs", "degrade"), recovery.degrade.produce, resumable=False)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_only_the_named_weights_change_and_by_what_the_manifest_says(
    kind: str, models: dict[str, Path], tmp_path: Path
):
    folder = degrade(models[kind], tmp_path, relative_std=0.5)
    before, after = load_file(models[kind] / "model.safetensors"), load_file(folder / "model.safetensors")
    listed = json.loads((folder / "manifest.json").read_text())["details"]["tensors"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(listed)
    assert changed == {name for name in before if name.endswith(("k_proj.weight", "v_proj.weight"))}
    for name, entry in listed.items():
        assert entry["l2"] == pytest.approx(float((after[name] - before[name]).norm()), rel=1e-4)
        expected = 0.5 * float(before[name].std()) * before[name].numel() ** 0.5
        assert entry["l2"] == pytest.approx(expected, rel=0.1)


def test_target_l2_is_met_by_the_first_k_projection(tiny: Path, tmp_path: Path):
    folder = degrade(tiny, tmp_path, target_l2=7.5)
    listed = json.loads((folder / "manifest.json").read_text())["details"]["tensors"]
    assert listed[FIRST]["l2"] == pytest.approx(7.5, rel=1e-4)
    assert all(entry["l2"] == pytest.approx(7.5, rel=0.1) for entry in listed.values())


def test_the_same_seed_gives_the_same_bytes(tiny: Path, tmp_path: Path):
    weights = [
        (degrade(tiny, tmp_path / name, seed, relative_std=0.5) / "model.safetensors").read_bytes()
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]
