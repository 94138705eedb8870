"""Repair in closed form on tiny models: every architecture, any kill, several ranks, and training from there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import recovery.repair
import recovery.train
import recovery.walk
from recovery.adapters import load_adapter
from recovery.artifacts import read_manifest
from recovery.batches import collate
from recovery.calibration import calibration_rows
from recovery.closed_form import Factors, Metric
from recovery.config import ModelInput
from recovery.corpus import read_split
from recovery.errors import Unavailable, UserError
from recovery.layerwise import begin, end, layers_of, on_device, output_of
from recovery.models import check_training_path, final_hidden
from recovery.stage import build
from recovery.survey import differing
from tests.conftest import ARCHITECTURES, REPOSITORY
from tests.pipeline import job_of, make_benchmarks, measure, model_at, run_in_process, tiny_recipe, width_of

SEQUENTIAL = {"init": "closed_form_sequential", "rank": 8}
CPU = torch.device("cpu")


def repair_with(prepared: tuple[Path, Path, Path], runs: Path, adapter: dict[str, Any]) -> Path:
    model, data, source = prepared
    if not runs.exists():
        shutil.copytree(source, runs)
    job = job_of(tiny_recipe(model, data, adapter=adapter), runs, "repair")
    return build(job, recovery.repair.produce, resumable=True)


def kl_of(folder: Path) -> float:
    return json.loads((folder / "held_out.jsonl").read_text().splitlines()[-1])["kl"]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_layer_by_layer_is_the_models_own_forward(
    models: dict[str, Path], prepared: tuple[Path, Path, Path], kind: str
):
    model = model_at(models[kind])
    check_training_path(model, 250, kind)
    tokens = read_split(next((prepared[2] / "artifacts").glob("generate-*")), "train")
    batch = collate(tokens, (0, 1, 2))
    stream = begin(model, batch)
    for number, layer in enumerate(layers_of(model)):
        stream.states_1TH = output_of(layer, number, stream, CPU)
    torch.testing.assert_close(end(model, stream), final_hidden(model, batch), rtol=1e-6, atol=1e-6)


def test_frozen_weights_come_back_to_their_own_memory():
    """meta stands for a device here: nothing could be read back from it."""
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)).requires_grad_(False)
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in layer.state_dict().items()}
    with on_device(torch.device("meta"), layer):
        assert all(tensor.is_meta for tensor in layer.state_dict().values())
    for name, tensor in layer.state_dict().items():
        assert (tensor.data_ptr(), True) == (before[name][0], torch.equal(tensor, before[name][1])), name
    learning = torch.nn.Linear(4, 4)
    with on_device(CPU, learning), torch.no_grad():
        learning.weight.fill_(1.0)
    assert bool((learning.weight == 1.0).all())


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_held_out_kl_falls_by_half_without_training(models: dict[str, Path], tmp_path: Path, kind: str):
    data = make_benchmarks(tmp_path / "data")
    # Half of what keys and values have at most, so that ranks are really left out; Phi-3 has them in one with queries.
    rank = {"phi3": 32}.get(kind, 16)
    changes = {"adapter": {"init": "closed_form_sequential", "rank": rank}, "train": {"epochs": 0}}
    done = run_in_process(tiny_recipe(models[kind], data, **changes), tmp_path / "runs")
    summary = json.loads((done["report"] / "summary.json").read_text())
    assert "train" not in done
    assert summary["kl"]["degraded"] > 0.02
    assert summary["kl"]["recovery"] >= 0.5
    # What the stage measured layer by layer is what evaluation measures on whole models.
    assert summary["closed_form"]["kl"] == pytest.approx(summary["kl"]["recovered"], rel=1e-4)
    assert (
        summary["tokens"] == json.loads((done["repair"] / "manifest.json").read_text())["details"]["calibration_tokens"]
    )
    assert "closed form alone" in (done["report"] / "report.md").read_text()


def test_every_placement_and_both_forms(prepared: tuple[Path, Path, Path], tmp_path: Path):
    """All modules damaged: o_proj, gate and down see inputs that were repaired in the same layer."""
    model, data, _ = prepared
    damage = {"kind": "gaussian_noise", "relative_std": 0.3, "modules": ["k_proj", "o_proj", "up_proj", "down_proj"]}
    found = {}
    for init in ("closed_form", "closed_form_sequential"):
        adapter = {"init": init, "placement": "attention_mlp", "rank": 16}
        recipe = tiny_recipe(model, data, adapter=adapter, degrade=damage)
        done = run_in_process(recipe, tmp_path / "runs", until="repair")
        found[init] = kl_of(done["repair"])
        details = json.loads((done["repair"] / "manifest.json").read_text())["details"]
        assert all(0 < share <= 1 + 1e-9 for share in details["kept"].values())
    (before, _) = [json.loads(line)["kl"] for line in (done["repair"] / "held_out.jsonl").read_text().splitlines()]
    reference, degraded = model_at(model), model_at(done["degrade"])
    held_out = read_split(done["generate"], "held_out")
    assert measure(degraded, reference, held_out, width_of(model), 512, "").kl == pytest.approx(before, rel=1e-4)
    assert found["closed_form_sequential"] < found["closed_form"] < 0.5 * before


def test_svd_is_the_difference_of_the_weights_cut_to_the_rank(prepared: tuple[Path, Path, Path], tmp_path: Path):
    done = repair_with(prepared, tmp_path / "runs", {"init": "svd", "rank": 30})
    assert read_manifest(done)["details"]["calibration_tokens"] == 0  # it looks at no text
    weights = load_file(done / "adapter_model.safetensors")
    model, degraded = model_at(prepared[0]), model_at(next((prepared[2] / "artifacts").glob("degrade-*")))
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.v_proj"):
        difference = model.get_submodule(name).weight - degraded.get_submodule(name).weight
        u, s, v = torch.linalg.svd(difference, full_matrices=False)
        a, b = (weights[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        torch.testing.assert_close(b @ a, u[:, :30] * s[:30] @ v[:30], rtol=1e-3, atol=1e-5)


def test_adapters_without_damage_can_still_learn(prepared: tuple[Path, Path, Path], tmp_path: Path):
    """Only K and V are damaged: A and B both zero would have no gradient for ever."""
    done = repair_with(prepared, tmp_path / "runs", {"init": "closed_form", "placement": ["all"], "rank": 8})
    weights = load_file(done / "adapter_model.safetensors")
    config = json.loads((done / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {name.split(".")[-3] for name in weights}
    for name, tensor in weights.items():
        if "lora_A" in name:
            assert tensor.any(dim=1).all()
        else:
            assert bool(tensor.any()) == ("k_proj" in name or "v_proj" in name)
    base = model_at(next((prepared[2] / "artifacts").glob("degrade-*")))
    assert load_adapter(base, done) is not None


def test_a_head_is_refused_before_anything_starts(models: dict[str, Path], tmp_path: Path):
    data = make_benchmarks(tmp_path / "data")
    adapter = {"init": "closed_form", "placement": ["k_proj", "lm_head"]}
    with pytest.raises(UserError, match=r"lm_head lies outside the decoder's layers"):
        job_of(tiny_recipe(models["olmo"], data, adapter=adapter), tmp_path / "runs", "repair")


def test_a_killed_repair_ends_with_the_same_bytes(
    prepared: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    undisturbed = repair_with(prepared, tmp_path / "a", SEQUENTIAL)

    class Killed(BaseException):
        pass

    real = recovery.walk.Repair.solve

    def solve(repair: Any, number: int) -> Any:
        if number == 1:
            raise Killed
        return real(repair, number)

    with monkeypatch.context() as patch:
        patch.setattr(recovery.walk.Repair, "solve", solve)
        with pytest.raises(Killed):
            repair_with(prepared, tmp_path / "b", SEQUENTIAL)
    solved = []
    monkeypatch.setattr(recovery.walk.Repair, "solve", lambda r, number: (solved.append(number), real(r, number))[1])
    resumed = repair_with(prepared, tmp_path / "b", SEQUENTIAL)
    assert 0 not in solved
    for name in ("adapter_model.safetensors", "held_out.jsonl"):
        assert (resumed / name).read_bytes() == (undisturbed / name).read_bytes()


@pytest.mark.parametrize("placement", ["kv", "auto"])
def test_weights_that_overflowed_are_refused_before_anything_is_weighed(
    prepared: tuple[Path, Path, Path], tmp_path: Path, placement: str
):
    model, data, source = prepared
    shutil.copytree(source, tmp_path / "runs")
    adapter = {"init": "closed_form_sequential", "placement": placement, "rank": 2}
    job: Any = job_of(tiny_recipe(model, data, adapter=adapter), tmp_path / "runs", "repair")
    wrong = tmp_path / "overflowed"
    shutil.copytree(job.degraded.path, wrong)
    weights = load_file(wrong / "model.safetensors")
    weights["model.layers.1.self_attn.k_proj.weight"][0, 0] = torch.inf
    save_file(weights, wrong / "model.safetensors", metadata={"format": "pt"})
    (wrong / "manifest.json").unlink()  # a checkpoint from elsewhere
    job = job.model_copy(update={"degraded": ModelInput(path=str(wrong), digest="0")})
    with pytest.raises(UserError, match=r"models\.degraded: its logits are not all finite"):
        build(job, recovery.repair.produce, resumable=True)


def test_weights_that_overflowed_are_damage(tiny: Path):
    right, wrong = model_at(tiny), model_at(tiny)
    matrix = wrong.get_submodule("model.layers.1.self_attn.k_proj").weight
    with torch.no_grad():
        matrix[0, 0] = torch.inf
    assert differing(right, wrong) == ["model.layers.1.self_attn.k_proj"]


def test_two_ranks_find_what_one_finds(prepared: tuple[Path, Path, Path], tmp_path: Path):
    alone = repair_with(prepared, tmp_path / "a", SEQUENTIAL)
    model, data, source = prepared
    shutil.copytree(source, tmp_path / "b")
    job = job_of(tiny_recipe(model, data, adapter=SEQUENTIAL), tmp_path / "b", "repair")
    file = tmp_path / "job.json"
    file.write_text(job.to_json())
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, "--module", "recovery.repair", str(file)], check=True, cwd=REPOSITORY)
    together = job.runtime.output
    assert kl_of(together) == pytest.approx(kl_of(alone), rel=1e-3)
    weights, expected = (load_file(folder / "adapter_model.safetensors") for folder in (together, alone))
    for name in weights:
        if "lora_A" in name:
            other = name.replace("lora_A", "lora_B")
            change, wanted = (found[other] @ found[name] for found in (weights, expected))
            torch.testing.assert_close(change, wanted, rtol=1e-3, atol=1e-4)


def test_training_begins_where_the_closed_form_ended(prepared: tuple[Path, Path, Path], tmp_path: Path):
    model, data, source = prepared
    repaired = repair_with(prepared, tmp_path / "runs", SEQUENTIAL)
    recipe = tiny_recipe(model, data, adapter=SEQUENTIAL, train={"epochs": 4, "learning_rate": 1e-3})
    trained = build(job_of(recipe, tmp_path / "runs", "train"), recovery.train.produce, resumable=True)
    kls = [json.loads(line)["kl"] for line in (trained / "held_out.jsonl").read_text().splitlines()]
    assert kls[0] == pytest.approx(kl_of(repaired), rel=1e-4)
    assert kls[-2] < kls[0]  # the last but one is of the held-out text, the last of the contexts
    details = json.loads((trained / "manifest.json").read_text())["details"]
    assert details["calibration_tokens"] > 0
    assert load_adapter(model_at(next((source / "artifacts").glob("degrade-*"))), trained) is not None


def test_calibration_texts_are_nested(prepared: tuple[Path, Path, Path]):
    tokens = read_split(next((prepared[2] / "artifacts").glob("generate-*")), "train")
    few, many = calibration_rows(tokens, 100), calibration_rows(tokens, 300)
    assert few == many[: len(few)]
    assert 100 <= int(tokens.lengths[few].sum()) < 300
    assert len(calibration_rows(tokens, 10**9)) == len(tokens)


def test_the_text_behind_the_curvatures_counts_too(prepared: tuple[Path, Path, Path], tmp_path: Path):
    tokens = read_split(next((prepared[2] / "artifacts").glob("generate-*")), "train")
    counted = {}
    for curvature in (False, True):
        settings = {**SEQUENTIAL, "calibration_tokens": 200, "curvature": curvature}
        manifest = read_manifest(repair_with(prepared, tmp_path / "runs", settings))
        counted[curvature] = manifest["details"]["calibration_tokens"]
    assert counted[False] == int(tokens.lengths[calibration_rows(tokens, 200)].sum())
    assert counted[True] == 2 * counted[False]


def test_a_repair_that_makes_it_worse_is_not_delivered(
    prepared: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def wrong(_: Metric, __: Tensor, degraded: Tensor, rank: int, *___: Any) -> Factors:
        random = torch.randn(rank, degraded.shape[1], generator=torch.Generator().manual_seed(0)).double()
        return Factors(random, torch.ones(degraded.shape[0], rank).double(), 0.0)

    monkeypatch.setattr(recovery.walk.Metric, "factors", wrong)
    with pytest.raises(Unavailable, match=r"made held-out KL worse .* diagnose both models"):
        repair_with(prepared, tmp_path / "runs", SEQUENTIAL)
    assert not list((tmp_path / "runs" / "artifacts").glob("repair-*"))
