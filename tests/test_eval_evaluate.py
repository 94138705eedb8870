"""The stages contexts and evaluate on tiny models: against lm-eval, after a kill, and against themselves."""

from __future__ import annotations

import gc
import json
import logging
import weakref
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import recovery.models
from eval import contexts, evaluate
from eval.config import BenchmarkData, ContextsJob, Divergence, EvaluateJob
from eval.tasks import benchmark_data, load_items
from recovery.artifacts import read_manifest
from recovery.config import ArtifactInput, Job, ModelInput, Runtime
from recovery.corpus import read_split
from recovery.errors import UserError
from recovery.files import HashMemory, read_json
from recovery.stage import build
from tests.conftest import make_model
from tests.test_eval_tasks import make_all

TASKS = ("winogrande", "arc_easy", "boolq")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> BenchmarkData:
    return benchmark_data(make_all(tmp_path_factory.mktemp("data")), TASKS, HashMemory(None))


def model_input(folder: Path) -> ModelInput:
    return ModelInput(path=str(folder), digest=folder.name)


def job_for(output: Path, model: Path, data: BenchmarkData | None, **changes: Any) -> EvaluateJob:
    settings: dict[str, Any] = {
        "runtime": Runtime(output=output),
        "seed": 3,
        "dtype": "float32",
        "model": model_input(model),
        "tasks": TASKS,
        "limit": 6,
        "data": data,
    }
    return EvaluateJob(**{**settings, **changes})


def contexts_job(output: Path, tokenizer: Path, data: BenchmarkData, **changes: Any) -> ContextsJob:
    settings: dict[str, Any] = {
        "runtime": Runtime(output=output),
        "seed": 3,
        "tokenizer": model_input(tokenizer),
        "tasks": TASKS,
        "count": 7,
        "context_tokens": 20,
        "data": data,
    }
    return ContextsJob(**{**settings, **changes})


def payload(folder: Path) -> dict[str, Any]:
    return read_manifest(folder)["files"]


def run(job: EvaluateJob) -> Path:
    return build(job, evaluate.produce, resumable=True)


def test_scores_equal_lm_evals_evaluate(models: dict[str, Path], data: BenchmarkData, tmp_path: Path):
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    import lm_eval
    from lm_eval.models import huggingface
    from transformers import AutoTokenizer

    from recovery.models import load_model

    folder = run(job_for(tmp_path / "scores", models["llama"], data))
    scores = read_json(folder / "scores.json")
    tokenizer = AutoTokenizer.from_pretrained(models["llama"])
    harness = cast(Any, huggingface).HFLM(
        pretrained=load_model(model_input(models["llama"]), "float32"), tokenizer=tokenizer, softmax_dtype="float32"
    )
    tasks = {name: load_items(name, 3, 6, data.path).task for name in TASKS}
    wanted = cast(Any, lm_eval).evaluate(harness, {"tasks": tasks}, bootstrap_iters=0, verbosity="ERROR")
    for name in TASKS:
        result = wanted["results"][name]
        assert scores[name]["acc"] == result["acc,none"]
        assert scores[name]["acc_norm"] == result.get("acc_norm,none")
        assert scores[name]["n"] == 6
        items = read_json(folder / "items" / f"{name}.json")
        samples = sorted(wanted["samples"][name], key=lambda sample: sample["doc_id"])
        assert [item["doc_hash"] for item in items] == [sample["doc_hash"] for sample in samples]
        assert [item["acc"] for item in items] == [int(sample["acc"]) for sample in samples]
        error = np.std([item["acc"] for item in items], ddof=1) / np.sqrt(6)
        assert scores[name]["acc_stderr"] == pytest.approx(error)
    paper = (scores["winogrande"]["acc"] + scores["boolq"]["acc"]) / 2  # ARC-Easy is not one of the paper's
    assert scores["average"] == pytest.approx(paper)


def test_a_killed_evaluation_goes_on_and_ends_the_same(
    models: dict[str, Path], data: BenchmarkData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    undisturbed = run(job_for(tmp_path / "one" / "scores", models["olmo"], data))
    job = job_for(tmp_path / "two" / "scores", models["olmo"], data)
    score_items = evaluate.score_items
    scored: list[str] = []

    def interrupted(items: Any, *arguments: Any) -> Any:
        name = str(items.task.config.task)
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.append(name)
        return score_items(items, *arguments)

    monkeypatch.setattr(evaluate, "score_items", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(job)
    assert not job.runtime.output.exists()
    assert len(list((tmp_path / "two").rglob("items/*.json"))) == 2
    scored.clear()
    resumed = run(job)
    assert scored == [TASKS[2]]
    assert payload(resumed) == payload(undisturbed)


def test_a_lost_task_is_scored_again_to_the_same_bits(models: dict[str, Path], data: BenchmarkData, tmp_path: Path):
    """What a kill leaves: some tasks' items in the partial folder, nothing else."""
    whole = run(job_for(tmp_path / "one" / "scores", models["gemma2"], data))
    job = job_for(tmp_path / "two" / "scores", models["gemma2"], data)
    partial = tmp_path / "two" / ".scores.partial" / "items"
    partial.mkdir(parents=True)
    for name in TASKS[:2]:
        (partial / f"{name}.json").write_bytes((whole / "items" / f"{name}.json").read_bytes())
    assert payload(run(job)) == payload(whole)


def test_items_do_not_depend_on_the_order_or_company_of_tasks(
    models: dict[str, Path], data: BenchmarkData, tmp_path: Path
):
    forward = run(job_for(tmp_path / "one", models["olmo"], data))
    backward = run(job_for(tmp_path / "two", models["olmo"], data, tasks=("boolq", "arc_easy")))
    for name in ("boolq", "arc_easy"):
        assert read_json(forward / "items" / f"{name}.json") == read_json(backward / "items" / f"{name}.json")


def test_contexts_are_a_corpus_that_cannot_be_trained_on(models: dict[str, Path], data: BenchmarkData, tmp_path: Path):
    folder = build(contexts_job(tmp_path / "llama", models["llama"], data), contexts.produce, resumable=False)
    tokens = read_split(folder, "held_out")
    assert len(tokens) == 7
    assert tokens.skip == 1
    assert all(tokens.row(row)[0] == 0 for row in range(7))
    assert max(tokens.lengths) == 20
    assert read_json(folder / "summary.json")["tasks"] == {"winogrande": 3, "arc_easy": 2, "boolq": 2}
    with pytest.raises(UserError, match="no samples"):
        read_split(folder, "train")
    again = build(contexts_job(tmp_path / "again", models["llama"], data), contexts.produce, resumable=False)
    assert payload(again) == payload(folder)
    without = build(contexts_job(tmp_path / "olmo", models["olmo"], data), contexts.produce, resumable=False)
    assert read_split(without, "held_out").skip == 0


def test_divergence_from_itself_is_nothing_and_from_another_model_is_not(
    models: dict[str, Path], data: BenchmarkData, tmp_path: Path
):
    text = build(contexts_job(tmp_path / "text", models["llama"], data), contexts.produce, resumable=False)
    given = ArtifactInput(path=text, digest=read_manifest(text)["identity"])
    divergence = Divergence(reference=model_input(models["llama"]), corpus=given)
    other = make_model(tmp_path / "other", "llama", seed=1)
    same = run(job_for(tmp_path / "a", models["llama"], data, tasks=("boolq",), divergence=divergence))
    found = read_json(same / "divergence.json")
    assert found["held_out"]["kl"] == pytest.approx(0, abs=1e-6)
    assert found["held_out"]["top1"] == 1
    assert found["contexts"] is None
    both = divergence.model_copy(update={"contexts": given})
    apart = run(job_for(tmp_path / "b", other, data, tasks=("boolq",), divergence=both))
    found = read_json(apart / "divergence.json")
    assert found["held_out"]["kl"] > 0.05
    assert found["contexts"] == found["held_out"]


def test_one_model_is_held_at_a_time(
    models: dict[str, Path], data: BenchmarkData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    text = build(contexts_job(tmp_path / "text", models["llama"], data), contexts.produce, resumable=False)
    given = ArtifactInput(path=text, digest=read_manifest(text)["identity"])
    real, loaded, alive = recovery.models.load_model, list[weakref.ref[Any]](), list[int]()

    def load(*arguments: Any, **named: Any) -> Any:
        gc.collect()
        alive.append(sum(one() is not None for one in loaded))
        model = real(*arguments, **named)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(recovery.models, "load_model", load)
    divergence = Divergence(reference=model_input(models["llama"]), corpus=given, contexts=given)
    run(job_for(tmp_path / "a", models["llama"], data, tasks=("boolq",), divergence=divergence))
    assert alive == [0, 0]


def test_the_reference_is_scored_once_for_every_recipe(models: dict[str, Path], data: BenchmarkData, tmp_path: Path):
    one = job_for(tmp_path / "one", models["llama"], data)
    moved = data.model_copy(update={"path": tmp_path / "moved"})
    assert one.identity == job_for(tmp_path / "two", models["llama"], moved).identity
    assert one.identity != job_for(tmp_path / "one", models["llama"], data, limit=7).identity
    assert one.identity != job_for(tmp_path / "one", models["olmo"], data).identity


@pytest.mark.parametrize("stage", [EvaluateJob, ContextsJob])
def test_jobs_survive_their_file(models: dict[str, Path], data: BenchmarkData, tmp_path: Path, stage: type[Job]):
    make: Any = job_for if stage is EvaluateJob else contexts_job
    job = make(tmp_path / "out", models["llama"], data)
    (tmp_path / "job.json").write_text(job.to_json())
    read = stage.from_file(tmp_path / "job.json")
    assert read == job
    assert read.identity == job.identity
    assert json.loads(job.to_json())["stage"] == stage.stage
