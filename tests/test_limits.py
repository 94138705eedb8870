"""`diagnose --run`: what limits a finished recovery."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from eval.causes import accuracy_notes, want_of_text
from eval.evidence import Evidence, learned_kl
from launch.cli import app
from launch.limits import render
from launch.pipeline import job_file_of
from launch.recipe import Recipe
from recovery.config import ForwardKL
from recovery.corpus import read_split
from recovery.errors import Unavailable
from recovery.limits import Limits, limits_of, put_right
from recovery.stage import LAST_WORDS
from tests.pipeline import job_of, make_benchmarks, measure, model_at, run_in_process, tiny_recipe, width_of


def written(recipe: Recipe, folder: Path) -> tuple[Path, Recipe]:
    """The recipe as a file, beside itself."""
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    return file, recipe


def test_the_remaining_kl_is_split_by_what_would_remove_it(models: dict[str, Path], tmp_path: Path):
    """K, V and O are damaged, only K is adapted, at a low rank: most of what is left is a matter of placement."""
    data = make_benchmarks(tmp_path / "data")
    recipe = tiny_recipe(
        models["llama"],
        data,
        degrade={"kind": "gaussian_noise", "relative_std": 0.5, "modules": ["k_proj", "v_proj", "o_proj"]},
        adapter={"placement": ["k_proj"], "rank": 4, "init": "closed_form_sequential", "blend": 0.5},
        train={"epochs": 0},
    )
    done = run_in_process(recipe, tmp_path / "runs")
    texts = read_split(done["generate"], "train"), read_split(done["generate"], "held_out")
    found = limits_of(
        model_at(models["llama"]), model_at(done["degrade"]), done["repair"], *texts, width_of(models["llama"])
    )
    summary = json.loads((done["report"] / "summary.json").read_text())
    assert found.degraded == pytest.approx(summary["kl"]["degraded"], rel=1e-4)
    assert found.recovered == pytest.approx(summary["kl"]["recovered"], rel=1e-4)
    assert found.matrices < 1e-6
    assert 0 < found.modules < found.degraded
    assert found.placement > 0.5 * found.recovered
    half_right = model_at(done["degrade"])
    put_right(half_right, model_at(models["llama"]), [f"model.layers.{number}.self_attn.k_proj" for number in (0, 1)])
    expected = measure(half_right, model_at(models["llama"]), texts[1], width_of(models["llama"]), 512, "").kl
    assert found.modules == pytest.approx(expected, rel=1e-4)
    assert any("adapter.placement: auto" in line for line in render(found))
    page = (done["report"] / "report.md").read_text()
    assert "## What limits it" in page
    assert "- 4 of 6 damaged tensors have no adapter (o_proj, v_proj; changed by 0.5" in page

    file, _ = written(recipe, tmp_path)
    arguments = [
        "diagnose",
        "--run",
        str(file),
        "--runs-dir",
        str(tmp_path / "runs"),
        "--output",
        str(tmp_path / "out"),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "what is left:" in result.output
    assert json.loads((tmp_path / "out" / "limits.json").read_text())["modules"] == pytest.approx(
        found.modules, rel=1e-3
    )


def test_the_largest_cause_is_named_first():
    lines = render(Limits(degraded=4.0, recovered=1.0, learned=0.2, modules=0.05, matrices=0.04))
    advice = [line for line in lines if line.startswith("  - ")]
    assert "more text" in advice[0]
    assert not any("norms" in line and line.startswith("  - ") for line in lines)


def test_adapters_that_make_good_damage_elsewhere_leave_no_negative_share():
    found = Limits(degraded=4.0, recovered=0.5, learned=None, modules=0.9, matrices=0.1)
    assert (found.rank, found.placement, found.data) == (0.0, pytest.approx(0.4), None)
    assert found.rank + found.placement + found.matrices == pytest.approx(found.recovered)
    page = "\n".join(render(found))
    assert "make good 0.4000 of the damage in other matrices" in page
    assert "data" not in page
    # Trained adapters may make good some of what no adapter undoes by itself.
    found = Limits(degraded=4.0, recovered=0.015, learned=None, modules=0.02, matrices=0.02)
    assert (found.rank, found.placement, found.beyond) == (0.0, 0.0, 0.015)
    assert "adapter.placement: auto" in page


def evidence_of(best_step: int, **training: object) -> Evidence:
    """Of two epochs of two steps each, of 10 and 30 tokens."""
    losses = [4.0, 3.0, 2.0, 1.0]
    history = [{"step": i + 1, "loss": loss, "loss_tokens": 10 + 20 * (i % 2)} for i, loss in enumerate(losses)]
    job = {
        "train": {"epochs": 2, "loss": ForwardKL().model_dump(), **training},
        "labelled": None,
        "teacher": {"kind": "online"},
    }
    details = {"steps": 4, "steps_taken": 4, "best_step": best_step}
    manifests = {"train": {"job": job, "details": details}}
    return Evidence(manifests, {}, {}, {}, {}, history, [], 0)


def test_the_want_of_text_is_told_from_the_last_epoch():
    assert learned_kl(evidence_of(4)) == pytest.approx(1.25)
    [told] = want_of_text({"kl": {"recovered": 2.5, "learned": 1.25}})
    assert "1.250 on the text learned from, and is 2.500 on held-out text: 50% of what is left" in told
    [told] = want_of_text({"kl": {"recovered": 1.3, "learned": 1.25}})
    assert "nothing was learned by heart" in told
    for other in (
        evidence_of(2),  # what was delivered had learned from the first epoch alone
        evidence_of(4, epochs=1),
        evidence_of(4, loss={**ForwardKL().model_dump(), "cross_entropy": 0.5}),
    ):
        assert learned_kl(other) is None
    assert want_of_text({"kl": {"recovered": 2.5, "learned": None}}) == []


def test_negative_and_silent_accuracy_is_explained():
    def task(measurable: bool, value: float | None) -> dict[str, object]:
        return {"ar_percent": {"measurable": measurable, "value": value}}

    summary = {"tasks": {"piqa": task(False, None), "sciq": task(True, -20.0)}, "kl": {"recovered": 1.5}}
    notes = "\n".join(accuracy_notes(summary))
    assert "says nothing on piqa" in notes
    assert "sciq -20%" in notes
    assert "below a KL of about 1" in notes


def test_a_model_whose_parameters_all_learned_is_explained(models: dict[str, Path], tmp_path: Path):
    data = make_benchmarks(tmp_path / "data")
    train = {"parameters": "all", "epochs": 6, "learning_rate": 1e-3}
    file, recipe = written(tiny_recipe(models["llama"], data, train=train), tmp_path)
    done = run_in_process(recipe, tmp_path / "runs")
    result = CliRunner().invoke(app, ["diagnose", "--run", str(file), "--runs-dir", str(tmp_path / "runs")])
    assert result.exit_code == 0, result.output
    kl = json.loads((done["report"] / "summary.json").read_text())["kl"]
    assert f"held-out KL {kl['degraded']:.4f} -> {kl['recovered']:.4f}" in result.output
    assert "gone if all parameters were the reference's" in result.output
    assert not any(word in result.output for word in ("placement", "beyond adapters", "adapter.rank"))


def test_a_run_that_delivered_nothing_is_told_why(models: dict[str, Path], tmp_path: Path):
    """Steps far too large make the model worse from the first measurement on."""
    train = {"epochs": 1, "learning_rate": 1e3, "warmup_steps": 0, "evaluate_every": 2}
    file, recipe = written(tiny_recipe(models["llama"], make_benchmarks(tmp_path / "data"), train=train), tmp_path)
    with pytest.raises(Unavailable) as ended:
        run_in_process(recipe, tmp_path / "runs", until="train")
    # As the launcher starts the stage, and the stage has it in its log.
    job, begun = job_of(recipe, tmp_path / "runs", "train"), job_file_of("train", tmp_path / "runs" / "tiny")
    for path, text in ((begun, job.to_json()), (job.runtime.log, f"2026-11-28 DEBUG {LAST_WORDS}{ended.value}\n")):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    where = ["diagnose", "--run", str(file), "--runs-dir", str(tmp_path / "runs")]
    result = CliRunner().invoke(app, where)
    assert result.exit_code == 0, result.output
    assert "not finished: train ended with\n  held-out KL was never below the degraded model's" in result.output
    assert "lower train.learning_rate" in result.output
    assert "held-out KL, as it was measured: " in result.output
    # What ended the former recipe of this name is not told of the next one, nor an interrupt as a bad end.
    other = CliRunner().invoke(app, [*where, "--set", "train.learning_rate=1e-3"])
    assert "not finished; run it first" in str(other.exception)
    job.runtime.log.write_text(f"2026-11-28 DEBUG {LAST_WORDS}KeyboardInterrupt\n")
    assert "not finished; run it first" in str(CliRunner().invoke(app, where).exception)


def test_a_run_that_is_not_finished_is_the_users_mistake(models: dict[str, Path], tmp_path: Path):
    file, _ = written(tiny_recipe(models["llama"], make_benchmarks(tmp_path / "data")), tmp_path)
    result = CliRunner().invoke(app, ["diagnose", "--run", str(file), "--runs-dir", str(tmp_path / "runs")])
    assert result.exception is not None
    assert "not finished" in str(result.exception)
