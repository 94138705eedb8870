"""Helpers of the tests: tiny benchmark data, and a recipe's stages run in this process, one after the other."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from launch.cluster import Cluster
from launch.recipe import Recipe
from launch.resolve import check_models, resolve_names
from launch.stages import Stage, build_stages
from recovery.config import ModelInput
from recovery.corpus import Tokens
from recovery.files import HashMemory
from recovery.measure import Measurement, measure_on, remember
from recovery.models import load_model
from recovery.stage import build
from recovery.vocabulary import load_vocabulary, used_width

LOCAL = Cluster(name="test", device="cpu")


def make_benchmarks(folder: Path, items: int = 12) -> Path:
    """A data_dir with ARC-Easy and PIQA in the layout of the real one."""
    from datasets import Dataset

    words = ["red", "blue", "green", "old", "new", "warm"]
    questions = [f"What is {words[n % 6]} and {words[(n + 1) % 6]} ({n})?" for n in range(items)]
    arc = [
        {
            "id": str(n),
            "question": question,
            "choices": {"text": [f"{word} thing" for word in words[:4]], "label": ["A", "B", "C", "D"]},
            "answerKey": "ABCD"[n % 4],
        }
        for n, question in enumerate(questions)
    ]
    piqa = [
        {"goal": q, "sol1": "take the red", "sol2": "take the blue", "label": n % 2} for n, q in enumerate(questions)
    ]
    Dataset.from_list(arc).save_to_disk(folder / "ai2_arc" / "ARC-Easy" / "validation")
    Dataset.from_list(piqa).save_to_disk(folder / "piqa" / "plain_text" / "validation")
    return folder


def tiny_recipe(reference: Path, data_dir: Path, **changes: Any) -> Recipe:
    """A recipe that runs in seconds; changes: sections to update, as {"train": {...}}."""
    content: dict[str, Any] = {
        "name": "tiny",
        "models": {"reference": str(reference), "dtype": "float32"},
        "degrade": {"kind": "gaussian_noise", "relative_std": 0.5},
        "generate": {"samples": 48, "held_out_samples": 16, "max_length": 40, "batch_samples": 16},
        "adapter": {"placement": "kv", "rank": 32},
        "train": {
            "learning_rate": 1e-2,
            "epochs": 10,
            "warmup_steps": 5,
            "batch_tokens": 160,
            "micro_batch_tokens": 160,
            "evaluate_every": 60,
            "checkpoint_every": 50,
        },
        "evaluate": {
            "tasks": ["arc_easy", "piqa"],
            "limit": 8,
            "data_dir": str(data_dir),
            "contexts": 6,
            "bootstrap": 200,
        },
    }
    for section, fields in changes.items():
        if isinstance(fields, dict) and section != "degrade":
            content[section] = {**content.get(section, {}), **fields}
        else:
            content[section] = fields
    return Recipe.model_validate({key: value for key, value in content.items() if value is not None})


def model_at(folder: Path) -> Any:
    return load_model(ModelInput(path=str(folder), digest=""), "float32")


def width_of(folder: Path) -> int:
    vocabulary = load_vocabulary(str(folder))
    return used_width(vocabulary, vocabulary)


def measure(
    student: Any, reference: Any, tokens: Tokens, width: int, micro_batch_tokens: int, description: str
) -> Measurement:
    """Compare two models that are both at hand."""
    return measure_on(remember(reference, tokens, width, micro_batch_tokens, description), student, width, description)


def stages_of(recipe: Recipe, runs_dir: Path) -> dict[str, Stage]:
    names = resolve_names(recipe, HashMemory(None))
    check_models(recipe, names)
    return {stage.label: stage for stage in build_stages(recipe, names, LOCAL, runs_dir)}


def job_of(recipe: Recipe, runs_dir: Path, label: str) -> Any:
    """One stage's job; its class is the stage's own."""
    return stages_of(recipe, runs_dir)[label].job


RESUMABLE = {"generate", "train", "evaluate"}


def run_in_process(recipe: Recipe, runs_dir: Path, until: str = "report") -> dict[str, Path]:
    """Build every stage up to `until`; {label: artifact folder}."""
    folders: dict[str, Path] = {}
    for label, stage in stages_of(recipe, runs_dir).items():
        produce = importlib.import_module(stage.module).produce
        folders[label] = build(stage.job, produce, resumable=stage.command in RESUMABLE)
        if label == until:
            break
    return folders
