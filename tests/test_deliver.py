"""Delivery: what others load is what was scored, and nothing is delivered that is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import eval.deliver
from eval.card import license_of
from eval.deliver import Check, compare_greedy
from launch.deliver import deliver_stage
from launch.execution import Plan
from launch.recipe import Recipe
from launch.resolve import Stage
from launch.tracking import register, store_uri
from recovery.adapters import CONFIG, WEIGHTS
from recovery.errors import Unavailable, UserError
from recovery.files import HashMemory, read_json
from recovery.stage import build
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


def stage_of(recipe: Recipe, runs: Path, *, merged: bool) -> Stage:
    return deliver_stage(Plan.of(recipe, LOCAL, runs, HashMemory(None)), merged=merged)


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
