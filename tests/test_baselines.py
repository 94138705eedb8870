"""The baselines that a recovery is compared with: all parameters (LLM-QAT) and supervised fine-tuning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import recovery.train
from datagen.labelled import ids_of, turns_of
from recovery.corpus import read_split
from recovery.errors import UserError
from recovery.stage import build
from tests.pipeline import job_of, make_benchmarks, measure, model_at, run_in_process, tiny_recipe

WHOLE = {"parameters": "all", "learning_rate": 2e-3, "epochs": 6}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_benchmarks(tmp_path_factory.mktemp("data"))


def labelled_set(folder: Path, corpus: Path, model: Path) -> Path:
    """Questions and answers in the language of the model, cut out of what it wrote itself."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer, tokens = AutoTokenizer.from_pretrained(model), read_split(corpus, "train")
    rows = [tokens.row(row).tolist() for row in range(len(tokens))]
    made = [{"question": tokenizer.decode(row[:4]), "answer": tokenizer.decode(row[4:])} for row in rows]
    Dataset.from_list([row for row in made if row["question"] and row["answer"]]).save_to_disk(folder)
    return folder


@pytest.mark.parametrize("kind", ["llama", "olmo", "mixtral"])  # a tied head, one of its own, and experts
def test_all_parameters_learn_and_a_whole_model_comes_out(
    models: dict[str, Path], data: Path, tmp_path: Path, kind: str
):
    folders = run_in_process(tiny_recipe(models[kind], data, train=WHOLE), tmp_path)
    train, summary = folders["train"], json.loads((folders["report"] / "summary.json").read_text())
    reference, degraded, recovered = (model_at(path) for path in (models[kind], folders["degrade"], train))
    assert summary["trainable_parameters"] == sum(parameter.numel() for parameter in recovered.parameters())
    assert summary["kl"]["recovered"] < 0.7 * summary["kl"]["degraded"]
    # What was scored is what lies there, for plain transformers.
    held_out = read_split(folders["generate"], "held_out")
    found = measure(recovered, reference, held_out, reference.config.vocab_size, 256, "")
    assert found.kl == pytest.approx(summary["kl"]["recovered"], rel=1e-4)
    moved = [
        name
        for (name, one), other in zip(recovered.named_parameters(), degraded.parameters(), strict=True)
        if not torch.equal(one, other)
    ]
    assert any("embed" in name for name in moved)
    assert any("norm" in name for name in moved) or kind == "olmo"  # whose norms have no parameters
    assert not list(train.glob("adapter*"))


def test_a_killed_training_of_all_parameters_goes_on_with_the_same_result(
    models: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = tiny_recipe(models["llama"], data, train={**WHOLE, "epochs": 2, "checkpoint_every": 3})
    undisturbed = run_in_process(recipe, tmp_path / "a", until="train")["train"]
    run_in_process(recipe, tmp_path / "b", until="contexts")
    job, real = job_of(recipe, tmp_path / "b", "train"), recovery.train.train_step

    def step(run: Any, number: int, feed: Any) -> None:
        if number == 5:
            raise KeyboardInterrupt
        real(run, number, feed)

    with monkeypatch.context() as patch:
        patch.setattr(recovery.train, "train_step", step)
        with pytest.raises(KeyboardInterrupt):
            build(job, recovery.train.produce, resumable=True)
    resumed = build(job, recovery.train.produce, resumable=True)
    name = "model.safetensors"
    assert (resumed / name).read_bytes() == (undisturbed / name).read_bytes()


def test_fine_tuning_learns_labelled_text_and_is_measured_on_synthetic_text(
    models: dict[str, Path], data: Path, tmp_path: Path
):
    text = {"samples": 400}
    plain = run_in_process(tiny_recipe(models["llama"], data, generate=text), tmp_path / "runs", until="contexts")
    folder = labelled_set(tmp_path / "set", plain["generate"], models["llama"])
    recipe = tiny_recipe(
        models["llama"],
        data,
        generate=text,
        labelled={"sets": [str(folder)], "samples": 300, "max_length": 44},
        train={
            "loss": {"kind": "forward_kl", "cross_entropy": 1.0},
            "learning_rate": 1e-3,
            "epochs": 2,
            "evaluate_every": 10,
        },
    )
    folders = run_in_process(recipe, tmp_path / "runs", until="train")
    learned = read_split(folders["labelled"], "train")
    assert len(learned) == 300
    assert int(learned.lengths.max()) <= 44
    lines = [json.loads(line) for line in (folders["train"] / "history.jsonl").read_text().splitlines()]
    assert sum(line["loss_tokens"] for line in lines) == 2 * sum(
        length - 1 - learned.skip for length in learned.lengths
    )
    assert lines[-1]["loss"] < lines[0]["loss"]
    measured = [json.loads(line) for line in (folders["train"] / "held_out.jsonl").read_text().splitlines()]
    held_out = read_split(folders["generate"], "held_out")
    assert min(line["kl"] for line in measured if line["split"] == "held_out") < measured[0]["kl"]
    both = (model_at(at) for at in (folders["degrade"], models["llama"]))
    degraded, reference = both
    expected = measure(degraded, reference, held_out, reference.config.vocab_size, 256, "")
    assert measured[0]["kl"] == pytest.approx(expected.kl, rel=1e-4)


def test_rows_are_known_by_their_columns():
    said = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    assert turns_of({"messages": said, "id": 1}, "x") == said
    shared = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]
    assert turns_of({"conversations": shared}, "x") == said
    assert turns_of({"question": "2 + 2?", "answer": "4"}, "x") == said
    assert turns_of({"instruction": "2 + 2?", "input": "", "output": "4"}, "x") == said
    chosen = turns_of({"question": "2 + 2?", "choices": ["3", "4"], "answer": 1}, "x")
    assert [turn["content"] for turn in chosen] == ["2 + 2?\nA. 3\nB. 4", "B. 4"]
    assert turns_of({"question": "q", "choices": ["3", "4"], "answer": "B"}, "x")[1]["content"] == "B. 4"
    for answer in ("4", "B", 1):
        made = turns_of({"question": "q", "choices": {"text": ["3", "4"], "label": ["A", "B"]}, "answer": answer}, "x")
        assert made[1]["content"] == "B. 4"
    with pytest.raises(UserError, match="name the right choice by number"):
        turns_of({"question": "q", "choices": ["3", "4"], "answer": ""}, "x")
    with pytest.raises(UserError, match="a row with text"):
        turns_of({"text": "no answer"}, "labelled.sets (a)")


def test_a_chat_template_is_used_where_there_is_one(models: dict[str, Path]):
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(models["llama"])
    turns = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}]
    plain = ids_of(turns, tokenizer, 99)
    assert plain[-1] == tokenizer.eos_token_id
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    assert ids_of(turns, tokenizer, 99) == tokenizer("red blue ", add_special_tokens=False).input_ids
    assert ids_of(turns, tokenizer, 2) == ids_of(turns, tokenizer, 99)[:2]
    system = [{"role": "system", "content": "be kind"}]
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    )
    merged = tokenizer("be kind\n\nred blue ", add_special_tokens=False).input_ids
    assert ids_of(system + turns, tokenizer, 99) == merged


def test_what_does_not_go_together_is_refused(models: dict[str, Path], data: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="has no adapters"):
        tiny_recipe(models["llama"], data, train=WHOLE, adapter={"init": "closed_form"})
    with pytest.raises(ValueError, match="no cached teacher"):
        tiny_recipe(models["llama"], data, labelled={"sets": ["a/b"]}, teacher={"kind": "hidden_states"})
    with pytest.raises(ValueError, match="learns the head too"):
        tiny_recipe(models["llama"], data, train=WHOLE, teacher={"kind": "sparse_logits"})
    with pytest.raises(ValueError, match="labelled text is for training"):
        tiny_recipe(
            models["llama"], data, labelled={"sets": ["a/b"]}, adapter={"init": "closed_form"}, train={"epochs": 0}
        )
    with pytest.raises(UserError, match="no data-"):
        job_of(tiny_recipe(models["llama"], data, labelled={"sets": [str(tmp_path)]}), tmp_path, "train")
