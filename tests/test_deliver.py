"""Delivery: what others load is what was scored, and nothing is delivered that is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import eval.deliver
from eval.card import license_of, method_of, model_card
from eval.deliver import Check, compare_greedy
from eval.served import compare_served
from launch.deliver import Forms, deliver_stage, push
from launch.execution import Plan
from launch.recipe import Recipe
from launch.stages import Stage
from launch.store import store_uri
from launch.tracking import register
from recovery.adapters import CONFIG, WEIGHTS, write_uniform
from recovery.artifacts import read_manifest
from recovery.errors import Unavailable, UserError
from recovery.files import HashMemory, read_json
from recovery.stage import build
from tests.fake_hub import FakeHub
from tests.packed import write_nf4
from tests.pipeline import LOCAL, make_benchmarks, run_in_process, tiny_recipe


@pytest.fixture(scope="module")
def recipe(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    data = make_benchmarks(tmp_path_factory.mktemp("data"))
    return tiny_recipe(models["llama"], data, train={"epochs": 2})


@pytest.fixture(scope="module")
def runs(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    run_in_process(recipe, folder)
    return folder


def stage_of(recipe: Recipe, runs: Path, *, merged: bool, dense: bool = False) -> Stage:
    return deliver_stage(Plan.of(recipe, LOCAL, runs, HashMemory(None)), Forms(merged=merged, dense=dense))


def deliver(recipe: Recipe, runs: Path, *, merged: bool) -> Path:
    job: Any = stage_of(recipe, runs, merged=merged).job
    build(job, eval.deliver.produce, resumable=False)
    return job.runtime.output


def test_what_is_delivered_is_what_was_scored(recipe: Recipe, runs: Path):
    folder = deliver(recipe, runs, merged=True)
    job: Any = stage_of(recipe, runs, merged=True).job
    assert (folder / WEIGHTS).read_bytes() == (job.adapter.path / WEIGHTS).read_bytes()
    # As somebody else loads them, without us.
    text = torch.arange(3, 23)[None]
    degraded = AutoModelForCausalLM.from_pretrained(job.degraded.path, dtype=torch.float32)
    before = degraded(text).logits
    adapted = PeftModel.from_pretrained(degraded, folder)(text).logits
    whole = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)(text).logits
    assert not torch.allclose(adapted, before, atol=1e-2)
    torch.testing.assert_close(whole, adapted, atol=1e-4, rtol=1e-4)
    assert read_json(folder / CONFIG)["base_model_name_or_path"] == Path(job.degraded.path).name
    checks = [Check(**one) for one in json.loads((folder / "checks.json").read_text())]
    assert [one.form for one in checks] == ["adapter", "merged"]
    scored = read_json(job.scores.path / "divergence.json")["held_out"]["kl"]
    for one in checks:
        assert one.holds
        assert one.scored_kl == scored
        assert one.kl == pytest.approx(scored, rel=1e-3)
        assert one.tokens_compared > 100


def test_the_card_says_what_it_is_for_and_what_came_back(recipe: Recipe, runs: Path):
    folder = deliver(recipe, runs, merged=False)
    assert not (folder / "merged").exists()
    card = (folder / "README.md").read_text()
    about = yaml.safe_load(card.split("---")[1])
    assert about["library_name"] == "peft"
    assert about["base_model"] in card.partition("## Use")[2]
    summary = read_json(folder / "summary.json")
    assert f"{summary['kl']['recovered']:.3f}" in card
    assert f"{summary['trainable_parameters']:,}" in card
    assert str(runs) not in card
    assert str(runs) not in (folder / CONFIG).read_text()


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ({}, "closed form from the reference's activations, without training"),
        ({"train": {"loss": {"kind": "forward_kl", "cross_entropy": 0.0}}}, "logit distillation: KL(reference ||"),
        (
            {"start": {"path": "p"}, "train": {"loss": {"kind": "reverse_kl", "cross_entropy": 0.25}}},
            "closed form, then logit distillation: 0.75 x KL(degraded + adapter || reference) + 0.25 x cross-entropy",
        ),
        ({"train": {"loss": {"kind": "forward_kl", "cross_entropy": 1.0}}}, "supervised fine-tuning: cross-entropy"),
    ],
)
def test_the_card_names_the_method_that_was_used(made: dict[str, Any], expected: str):
    assert method_of(made).startswith(expected)


def test_the_card_names_the_text_that_was_learned_from(recipe: Recipe, runs: Path):
    job: Any = stage_of(recipe, runs, merged=False).job
    summary = read_json(job.report.path / "summary.json")
    manifest = read_manifest(job.adapter.path)
    larger = job.reference.model_copy(update={"path": "models/larger", "digest": "1" * 64})
    assert "sampled from larger" in model_card(job, summary, manifest, larger, [])
    manifest["job"]["labelled"] = {"path": "labelled-1"}
    card = model_card(job, summary, manifest, job.reference, [])
    assert "labelled, written by people; held out: sampled from the reference" in card
    assert "can only bring back what the reference knows" not in card


def test_the_card_says_which_weights_it_is_for(recipe: Recipe, runs: Path):
    job: Any = stage_of(recipe, runs, merged=False).job
    summary, manifest = read_json(job.report.path / "summary.json"), read_manifest(job.adapter.path)

    def card(**degraded: Any) -> str:
        given = job.model_copy(update={"degraded": job.degraded.model_copy(update=degraded)})
        return model_card(given, summary, manifest, job.reference, [])

    assert f"manifest.json: {read_manifest(Path(job.degraded.path))['content']})" in card()
    gguf = card(path="models/base.gguf", digest=f"gguf:{'2' * 64}")
    assert f"(sha256 {'2' * 64})" in gguf
    assert 'from_pretrained("path/to", gguf_file="base.gguf")' in gguf
    hub = card(path="org/base", revision="3" * 40, digest=f"hub:org/base@{'3' * 40}")
    assert f"(commit {'3' * 40})" in hub
    assert f'from_pretrained("org/base", revision="{"3" * 40}")' in hub


def test_a_form_that_is_not_what_was_scored_is_not_delivered(
    recipe: Recipe, runs: Path, monkeypatch: pytest.MonkeyPatch
):
    """Merged by a fault of ours: the degraded model without its adapter."""

    def unmerged(job: Any, recovered: Any, folder: Path) -> None:
        recovered.unload().save_pretrained(folder)
        eval.deliver.load_tokenizer(job.degraded.path, None).save_pretrained(folder)

    monkeypatch.setattr(eval.deliver, "write_merged", unmerged)
    changed = recipe.model_copy(update={"name": "another"})
    run_in_process(changed, runs)
    job: Any = stage_of(changed, runs, merged=True).job
    with pytest.raises(Unavailable, match=r"merged, loaded again: KL .* nothing is delivered"):
        build(job, eval.deliver.produce, resumable=False)
    left = [path.name for path in runs.glob(f"artifacts/*{job.runtime.output.name}*")]
    assert [name for name in left if not name.endswith(".lock")] == []


def test_what_cannot_be_delivered_is_said_at_once(recipe: Recipe, runs: Path, tmp_path: Path, models: dict[str, Path]):
    with pytest.raises(UserError, match=r"deliver: needs .*report, not finished; `recover-lora run`"):
        stage_of(recipe, tmp_path, merged=False)
    train = recipe.train.model_copy(update={"parameters": "all"})
    with pytest.raises(UserError, match="there is no adapter"):
        stage_of(recipe.model_copy(update={"train": train}), runs, merged=False)
    write_nf4(models["llama"], tmp_path / "packed")
    given = recipe.models.model_copy(update={"degraded": str(tmp_path / "packed")})
    with pytest.raises(UserError, match=r"--merged: the degraded model is packed \(bitsandbytes\)"):
        stage_of(recipe.model_copy(update={"models": given, "degrade": None}), runs, merged=True)


@pytest.mark.parametrize("kind", ["sparse", "packed"])
def test_merging_into_what_it_would_undo_must_be_asked_for_twice(models: dict[str, Path], tmp_path: Path, kind: str):
    changes: dict[str, Any] = {"degrade": {"kind": "pruning", "modules": ["all"]}}
    if kind == "packed":
        write_nf4(models["llama"], tmp_path / "packed")
        changes = {"degrade": None, "models": {"reference": str(models["llama"]), "degraded": str(tmp_path / "packed")}}
    recipe = tiny_recipe(models["llama"], make_benchmarks(tmp_path / "data"), train={"epochs": 2}, **changes)
    runs = tmp_path / "runs"
    run_in_process(recipe, runs)
    with pytest.raises(UserError, match=rf"--merged: the degraded model is {kind} .*add --dense"):
        stage_of(recipe, runs, merged=True)
    job: Any = stage_of(recipe, runs, merged=True, dense=True).job
    build(job, eval.deliver.produce, resumable=False)
    config = read_json(job.runtime.output / "merged" / "config.json")
    assert "quantization_config" not in config
    weights = load_file(job.runtime.output / "merged" / "model.safetensors")
    value = weights["model.layers.0.self_attn.v_proj.weight"]
    assert value.is_floating_point()
    assert float((value == 0).float().mean()) < 0.05


def test_greedy_tokens_may_change_places_within_rounding():
    one = torch.tensor([[1.0, 0.9, 0.0], [3.0, 1.0, 0.0], [0.0, 0.0, 5.0]])
    other = torch.tensor([[0.9, 1.0, 0.0], [1.0, 3.0, 0.0], [0.0, 0.0, 5.0]])
    assert compare_greedy([one], [other], 0.5) == (3, 2, 1)
    assert compare_greedy([one], [one.clone()], 0.5) == (3, 0, 0)
    fine = Check("merged", 0.101, 0.1, 3, 1, 0)
    assert fine.holds
    assert not Check("merged", 0.11, 0.1, 3, 1, 0).holds
    assert not Check("merged", 0.1, 0.1, 3, 2, 1).holds


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# Model\n", "apache-2.0"),
        ("# Model without a head\n", "unknown"),
        ("---\nlicense: [unclosed\n---\n", "unknown"),
        ("---\njust words\n---\n", "unknown"),
        (None, "unknown"),
    ],
)
def test_the_licence_is_the_bases_own(tmp_path: Path, card: str | None, expected: str):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert license_of(str(tmp_path)) == expected


def test_weights_are_the_same_whichever_forms_are_asked_for(recipe: Recipe, runs: Path):
    one, other = (load_file(deliver(recipe, runs, merged=merged) / WEIGHTS) for merged in (False, True))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_delivered_is_a_registered_model(recipe: Recipe, runs: Path, monkeypatch: pytest.MonkeyPatch):
    from mlflow.artifacts import download_artifacts
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = deliver(recipe, runs, merged=False)
    address = register(recipe, runs, folder)
    assert address == f"models:/{recipe.name}/1"
    assert register(recipe, runs, folder) == address
    uri = store_uri(runs)
    (version,) = MlflowClient(uri, uri).search_model_versions(f"name = '{recipe.name}'")
    assert json.loads(version.tags["recover-lora.kl"]) == read_json(folder / "summary.json")["kl"]
    assert {f"recover-lora.{name}" for name in ("reference", "degraded", "corpus", "adapter")} <= set(version.tags)
    assert MlflowClient(uri).get_run(str(version.run_id)).info.status == "FINISHED"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # as those who download it have it
    loaded = Path(download_artifacts(address))
    assert (loaded / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_a_delivery_needs_no_tracking_server(recipe: Recipe, runs: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert register(recipe, runs, deliver(recipe, runs, merged=False)) is None


def test_one_rank_everywhere_says_the_same(tiny: Path, tmp_path: Path):
    """vLLM takes no rank of each module: padded, scales taken into B, the adapter is the same function."""
    data = make_benchmarks(tmp_path / "data")
    adapter = {"placement": "auto", "budget": 3000, "init": "closed_form_sequential"}
    recipe = tiny_recipe(tiny, data, train={"epochs": 1}, adapter=adapter)
    run_in_process(recipe, tmp_path / "runs")
    folder = deliver(recipe, tmp_path / "runs", merged=False)
    assert len(set(read_json(folder / CONFIG)["rank_pattern"].values())) > 1
    config = read_json(folder / "uniform" / CONFIG)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert {t.shape[0] for name, t in load_file(folder / "uniform" / WEIGHTS).items() if "lora_A" in name} == {
        config["r"]
    }
    job: Any = stage_of(recipe, tmp_path / "runs", merged=False).job
    text = torch.arange(3, 23)[None]
    found = []
    for place in (folder, folder / "uniform"):
        base = AutoModelForCausalLM.from_pretrained(job.degraded.path, dtype=torch.float32)
        found.append(PeftModel.from_pretrained(base, place)(text).logits)
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)
    checks = [Check(**one) for one in json.loads((folder / "checks.json").read_text())]
    assert [(one.form, one.holds) for one in checks] == [("adapter", True), ("uniform", True)]
    assert "path/to/this/folder/uniform" in (folder / "README.md").read_text()


def test_scales_of_any_size_go_into_the_weights(tiny: Path, tmp_path: Path):
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    pattern = {"layers.0.self_attn.k_proj": 2}
    patterns: dict[str, Any] = {"rank_pattern": pattern, "alpha_pattern": {"k_proj": 3}}
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["k_proj", "v_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        **patterns,
    )
    adapted: Any = get_peft_model(base, config)
    adapted.save_pretrained(tmp_path / "given")
    text = torch.arange(3, 23)[None]
    wanted = adapted(text).logits
    assert write_uniform(tmp_path / "given", tmp_path / "uniform") == 4
    again = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    found = PeftModel.from_pretrained(again, tmp_path / "uniform")(text).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_a_servers_few_log_probabilities_tell_its_kl():
    draw = torch.Generator().manual_seed(0)
    reference = 4 * torch.randn(60, 200, generator=draw)
    adapted = reference + 0.5 * torch.randn(60, 200, generator=draw)
    served = adapted + 0.1 * torch.randn(60, 200, generator=draw)

    def kl(logits: torch.Tensor) -> float:
        ours, theirs = torch.log_softmax(logits, -1), torch.log_softmax(reference, -1)
        return float((theirs.exp() * (theirs - ours)).sum(-1).mean())

    def answer(logits: torch.Tensor) -> list[dict[int, float]]:
        values, tokens = torch.log_softmax(logits, -1).topk(20)
        return [dict(zip(t.tolist(), v.tolist(), strict=True)) for t, v in zip(tokens, values, strict=True)]

    extra, places, different, beyond = compare_served(answer(served), adapted, reference, 0.5)
    assert places == 60
    assert extra == pytest.approx(kl(served) - kl(adapted), abs=2e-3)
    assert different == int((served.argmax(-1) != adapted.argmax(-1)).sum())
    assert beyond == 0
    # Another model than the one that was scored.
    assert compare_served(answer(4 * torch.randn(60, 200, generator=draw)), adapted, reference, 0.5)[3] > 30
    same = compare_served(answer(adapted), adapted, reference, 0.0)
    assert same[0] == pytest.approx(0.0, abs=1e-6)
    assert same[2:] == (0, 0)


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as running:
        yield running


def test_a_push_takes_a_token_and_leaves_the_manifest_here(
    recipe: Recipe, runs: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
):
    """A stand-in for the hub, which cannot be reached from here: it takes the client's real requests."""
    folder = deliver(recipe, runs, merged=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(UserError, match="HF_TOKEN is not set"):
        push(folder, "me/recovered")
    hub.older = ["merged/model.safetensors", "README.md", "notes/mine.txt"]
    assert pushed(folder, "me/recovered", hub) == f"{hub.url}/me/recovered"
    assert hub.deleted == {"merged/model.safetensors"}  # an earlier delivery's, of another adapter
    assert (hub.made["name"], hub.made["organization"]) == ("recovered", "me")
    assert hub.made.get("visibility") == "private" or hub.made.get("private") is True
    assert hub.tokens == {"Bearer hf_secret"}
    delivered = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert set(hub.files) == set(delivered) - {"manifest.json"}
    assert all(content == delivered[name] for name, content in hub.files.items())
    assert pushed(folder, "not a name", hub).startswith("UserError: --push not a name")
    hub.private = False
    assert "that repository is public" in pushed(folder, "me/recovered", hub)
    hub.private, hub.refuses = True, True
    refused = pushed(folder, "me/recovered", hub)
    assert refused.startswith("Unavailable: the hub did not take it")
    assert "hf_secret" not in refused


def pushed(folder: Path, repository: str, hub: FakeHub) -> str:
    """What `push` returns, or its error, in a process that is not kept from the hub as these tests are."""
    script = """
import sys
from pathlib import Path
from launch.deliver import push
from recovery.artifacts import read_manifest
from recovery.errors import Unavailable, UserError
try:
    print(push(Path(sys.argv[1]), sys.argv[2]))
except (Unavailable, UserError) as error:
    print(f"{type(error).__name__}: {error}")
"""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret"}
    command = [sys.executable, "-c", script, str(folder), repository]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
