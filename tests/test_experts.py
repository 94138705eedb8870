"""Experts kept as 3-D parameters: damaged, repaired in closed form, trained, merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AfmoeConfig, AfmoeForCausalLM

from recovery.adapters import adapted_modules, adapter_parameters, add_adapter, load_adapter, save_adapter
from recovery.config import Adapter
from recovery.corpus import read_split
from recovery.costs import weigh
from recovery.limits import adapted_names
from recovery.placement import check_adapter, expert_parameters, select
from tests.pipeline import make_benchmarks, measure, model_at, run_in_process, tiny_recipe, width_of
from tests.test_curvature import text_of
from tests.test_deliver import deliver

KINDS = ("mixtral", "deepseek_v3", "qwen2_moe")
DAMAGE = {"kind": "gaussian_noise", "relative_std": 0.5, "modules": ["experts.gate_up_proj", "experts.down_proj"]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_benchmarks(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A runs folder of each kind, where tests share what they have in common."""
    return {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}


def merged_as_scored(base: Any, reference: Any, done: dict[str, Path]) -> Any:
    """The base after plain PEFT has merged what was trained into it, which measures as the adapter was scored."""
    adapted: Any = PeftModel.from_pretrained(base, done["train"])
    merged = adapted.merge_and_unload()
    found = measure(merged, reference, read_split(done["generate"], "held_out"), width_of(done["degrade"]), 512, "")
    summary = json.loads((done["report"] / "summary.json").read_text())
    assert found.kl == pytest.approx(summary["kl"]["recovered"], rel=1e-3)
    return merged


@pytest.mark.parametrize("kind", KINDS)
def test_placements_know_experts(models: dict[str, Path], kind: str):
    model = model_at(models[kind])
    experts = expert_parameters(model)
    everywhere = check_adapter(model, Adapter(placement=("all",), rank=4))
    assert any("shared" in name for name in everywhere) == (kind != "mixtral")
    assert experts
    assert all(parameter.shape[0] == 4 for parameter in experts.values())
    chosen = select(model, ["attention_mlp"], "test")
    assert set(experts) <= set(chosen)
    assert set(select(model, ["all"], "test")) >= set(experts)


def test_a_router_that_is_a_linear_module_is_none_to_adapt():
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "vocab_size": 64}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    layers: dict[str, Any] = {"num_hidden_layers": 2, "num_dense_layers": 1, "num_experts": 4, "num_experts_per_tok": 2}
    with torch.device("meta"):
        model = AfmoeForCausalLM(AfmoeConfig(**sizes, **heads, **layers))
    assert "model.layers.1.mlp.router.gate" in dict(model.named_modules())
    names = check_adapter(model, Adapter(placement=("all",), rank=8))
    assert "model.layers.1.mlp.shared_experts.gate_proj" in names
    assert not any("router" in name for name in names)


@pytest.mark.parametrize("init", ["closed_form", "closed_form_sequential"])
@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_repaired_without_training(
    models: dict[str, Path], data: Path, runs: dict[str, Path], kind: str, init: str
):
    adapter = {"init": init, "placement": ["experts.gate_up_proj", "experts.down_proj"], "rank": 32}
    recipe = tiny_recipe(models[kind], data, degrade=DAMAGE, adapter=adapter, train={"epochs": 0})
    done = run_in_process(recipe, runs[kind], until="repair")
    before, after = [json.loads(line)["kl"] for line in (done["repair"] / "held_out.jsonl").read_text().splitlines()]
    assert after < 0.5 * before
    details = json.loads((done["repair"] / "manifest.json").read_text())["details"]
    assert any(".experts" in name for name in details["kept"])


@pytest.mark.parametrize("init", ["svd", "closed_form", "closed_form_sequential"])
@pytest.mark.parametrize("kind", KINDS)
def test_full_rank_restores_every_expert(
    models: dict[str, Path], data: Path, runs: dict[str, Path], kind: str, init: str
):
    adapter = {"init": init, "placement": ["gate_up_proj"], "rank": 64}
    damage = {**DAMAGE, "modules": ["gate_up_proj"]}
    recipe = tiny_recipe(models[kind], data, degrade=damage, adapter=adapter, train={"epochs": 0})
    done = run_in_process(recipe, runs[kind], until="repair")
    before, after = [json.loads(line)["kl"] for line in (done["repair"] / "held_out.jsonl").read_text().splitlines()]
    assert before > 0.02
    assert after < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_auto_places_adapters_on_damaged_experts(models: dict[str, Path], data: Path, runs: dict[str, Path], kind: str):
    """By what they cost, no worse than one rank everywhere; training goes on from there, and what came out is delivered
    and merged."""
    rank, sides = 10, [weights.shape for weights in expert_parameters(model_at(models[kind])).values()]
    budget = rank * sum(experts * (outputs + inputs) for experts, outputs, inputs in sides)
    adapter = {"placement": "auto", "budget": budget, "init": "closed_form_sequential"}
    recipe = tiny_recipe(models[kind], data, degrade=DAMAGE, adapter=adapter, train={"epochs": 1})
    done = run_in_process(recipe, runs[kind])
    details = json.loads((done["repair"] / "manifest.json").read_text())["details"]
    ranks = details["allocated"]
    assert {name.rsplit(".", 1)[-1] for name in ranks} == {"gate_up_proj", "down_proj"}
    assert 0.8 * budget < details["trainable_parameters"] <= budget
    before, after = [json.loads(line)["kl"] for line in (done["repair"] / "held_out.jsonl").read_text().splitlines()]
    assert after < 0.7 * before
    uniform = {"placement": DAMAGE["modules"], "rank": rank, "init": "closed_form_sequential"}
    other = tiny_recipe(models[kind], data, degrade=DAMAGE, adapter=uniform, train={"epochs": 0})
    beside = run_in_process(other, runs[kind], until="repair")
    assert after < 1.05 * json.loads((beside["repair"] / "held_out.jsonl").read_text().splitlines()[-1])["kl"]
    weighed = weigh(
        model_at(models[kind]),
        model_at(done["degrade"]),
        text_of((models[kind], data, runs[kind])),
        width_of(models[kind]),
        seed=0,
    )
    assert set(ranks) <= set(weighed.costs.nats)
    assert weighed.costs.floor == pytest.approx(0, abs=1e-5)
    dearest = weighed.costs.restored[0]
    assert dearest.measured == pytest.approx(dearest.predicted, abs=0.35 * weighed.costs.degraded.kl)
    delivered = deliver(recipe, runs[kind], merged=True)
    assert [one["form"] for one in json.loads((delivered / "checks.json").read_text())] == ["adapter", "merged"]
    assert "vLLM takes no adapters of experts, or of what PEFT takes for them" in (delivered / "README.md").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_trained_experts_merge_into_the_weights(models: dict[str, Path], data: Path, runs: dict[str, Path], kind: str):
    """The whole pipeline; then plain PEFT merges what was trained, and the merged model measures the same."""
    adapter = {"placement": "attention_mlp", "rank": 24}
    train = {"epochs": 8, "learning_rate": 1e-2}
    recipe = tiny_recipe(models[kind], data, degrade=DAMAGE, adapter=adapter, train=train)
    done = run_in_process(recipe, runs[kind])
    summary = json.loads((done["report"] / "summary.json").read_text())
    assert summary["kl"]["recovery"] >= 0.25  # from zero on 2000 tokens, which the closed form does not need
    base = model_at(done["degrade"])
    before = {name: parameter.clone() for name, parameter in expert_parameters(base).items()}
    merged = merged_as_scored(base, model_at(models[kind]), done)
    changed = expert_parameters(merged)
    assert set(changed) == set(before)
    assert all(not torch.equal(changed[name], before[name]) for name in before)
    assert any("experts" in name for name in load_file(done["train"] / "adapter_model.safetensors"))


@pytest.mark.parametrize("placement", ["auto", ["gate_proj", "up_proj", "down_proj"]])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mixtral"])
def test_shared_experts_and_dense_layers_are_repaired_trained_and_merged(
    models: dict[str, Path], data: Path, runs: dict[str, Path], kind: str, placement: str | list[str]
):
    """PEFT takes DeepSeek's names for the routed experts', as older checkpoints have them."""
    damage = {"kind": "gaussian_noise", "relative_std": 1.0, "modules": ["gate_proj", "up_proj", "down_proj"]}
    reference = model_at(models[kind])
    damaged = set(select(reference, damage["modules"], "test")) - {*expert_parameters(reference)}
    budget = 24 * sum(sum(reference.get_submodule(name).weight.shape) for name in damaged)
    adapter = {"placement": placement, "rank": 24, "init": "closed_form_sequential"}
    adapter |= {"budget": budget} if placement == "auto" else {}
    recipe = tiny_recipe(models[kind], data, degrade=damage, adapter=adapter, train={"epochs": 1})
    done = run_in_process(recipe, runs[kind])
    assert damaged <= adapted_modules(done["train"])
    before, after = [json.loads(line)["kl"] for line in (done["repair"] / "held_out.jsonl").read_text().splitlines()]
    assert after < 0.5 * before
    merged_as_scored(model_at(done["degrade"]), reference, done)


def test_adapters_of_one_layer_are_not_read_into_others(models: dict[str, Path], tmp_path: Path):
    """The file names parameters by the ends of their names only where these stand for no others."""
    names = ("model.layers.1.mlp.shared_experts.up_proj", "model.layers.1.mlp.experts.down_proj")
    adapted = add_adapter(model_at(models["deepseek_v3"]), Adapter(placement=names, rank=4), 0)
    save_adapter(adapted, tmp_path, {name: one.detach() for name, one in adapter_parameters(adapted).items()}, "base")
    read = load_adapter(model_at(models["deepseek_v3"]), tmp_path)
    assert set(adapted_names(read)) == set(adapted_names(adapted)) == set(names)
    assert adapted_modules(tmp_path) == {names[0], names[1].rpartition(".")[0]}
