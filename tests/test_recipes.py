"""Recipes: the shipped ones load, a user's faults are told at once, --set works, config imports no torch."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from launch.cluster import load_cluster
from launch.recipe import load_recipe, read_yaml
from recovery.damage_config import GaussianNoise
from recovery.deepspeed_config import FOLDER, complete, read_deepspeed
from recovery.errors import UserError, UserErrors
from tests.conftest import REPOSITORY

RECIPES = sorted((REPOSITORY / "launch" / "recipes").rglob("*.yaml"))
PAPER = {
    "amd/AMD-OLMo-1B-SFT": (44.06, "kv", 90_000),
    "meta-llama/Llama-3.2-1B": (52.97, "attention_mlp", 120_000),
    "google/gemma-2-2b": (35.94, "attention_mlp", 120_000),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": (40.69, "kv", 120_000),
}
MINIMAL = {"name": "x", "models": {"reference": "r", "degraded": "d"}}


def write(folder: Path, content: object) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_load(path: Path):
    recipe = load_recipe(path)
    read_deepspeed(recipe.train.deepspeed)
    assert f"recover-lora run {path.relative_to(REPOSITORY)}" in path.read_text()


def test_paper_recipes_have_the_papers_numbers():
    recipes = [load_recipe(path) for path in RECIPES if path.parent.name == "paper"]
    found = {}
    for recipe in recipes:
        assert isinstance(recipe.degrade, GaussianNoise)
        found[recipe.models.reference] = (recipe.degrade.target_l2, recipe.adapter.placement, recipe.generate.samples)
        train = recipe.train
        assert (train.learning_rate, train.epochs, train.warmup_steps) == (5e-4, 3, 80)
        assert train.batch_tokens == 32 * 2048
        assert (recipe.adapter.rank, recipe.adapter.effective_alpha) == (64, 64)
        assert (recipe.generate.greedy_tokens, recipe.generate.max_length) == (5, 2048)
    assert found == PAPER


def test_clusters_load():
    assert load_cluster("local").processes == 1
    with pytest.raises(UserError, match=r"one of: .*local"):
        load_cluster("nowhere")


def test_every_fault_in_one_message(tmp_path: Path):
    content = {
        "name": "x",
        "models": {"reference": "r", "degraded": "d", "dtpye": "auto"},
        "train": {"learning_rate": "fast", "epochs": -1},
        "evaluate": {"tasks": ["helaswag"]},
    }
    with pytest.raises(UserErrors) as caught:
        load_recipe(write(tmp_path, content))
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert any(line.startswith("models.dtpye: unknown field; did you mean dtype?") for line in lines)
    assert any(line.startswith("train.learning_rate: found 'fast'") for line in lines)
    assert any(line.startswith("train.epochs: found -1") for line in lines)
    assert any("helaswag" in line and "known: hellaswag" in line for line in lines)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"name": "x"}, "models: missing"),
        ({"name": "x", "models": {"reference": "r"}}, "exactly one of models.degraded"),
        (MINIMAL | {"degrade": {"relative_std": 0.5}}, "exactly one of models.degraded"),
        (MINIMAL | {"name": "../x"}, "name: found '../x'"),
        (MINIMAL | {"adapter": {"placement": "everything"}}, "adapter.placement"),
        (MINIMAL | {"teacher": {"kind": "guess"}}, "teacher.kind"),
        ("- a list", "not a mapping"),
        ("name: [", "not YAML"),
        ("name: a\nname: b", "given twice"),
        ("name: !!python/object/apply:os.getcwd []", "not YAML"),
    ],
)
def test_faults_are_one_clear_line(tmp_path: Path, content: object, message: str):
    with pytest.raises(UserError) as caught:
        load_recipe(write(tmp_path, content))
    assert message in str(caught.value)


def test_overrides_are_read_as_yaml_and_checked(tmp_path: Path):
    path = write(tmp_path, MINIMAL)
    recipe = load_recipe(path, ["train.learning_rate=1e-3", "evaluate.tasks=[piqa, boolq]", "seed=7"])
    assert (recipe.train.learning_rate, recipe.evaluate.task_names, recipe.seed) == (1e-3, ("piqa", "boolq"), 7)
    for wrong in ("train.rate=1", "train", "=1", "name.x=1", "train.epochs=[", "train.epochs=many"):
        with pytest.raises(UserError):
            load_recipe(path, [wrong])


def test_deepspeed_files_own_what_the_recipe_does_not(tmp_path: Path):
    for path in FOLDER.glob("*.json"):
        content = read_deepspeed(path.stem)
        narrow, wide = complete(content, "bfloat16", 1.0), complete(content, "float32", 1.0)
        assert (narrow["bf16"]["enabled"], wide["bf16"]["enabled"]) == (True, False)
        assert (narrow["communication_data_type"], narrow["data_types"]["grad_accum_dtype"]) == ("fp32", "fp32")
    bad = tmp_path / "bad.json"
    bad.write_text('{"gradient_clipping": 1.0}')
    with pytest.raises(UserError, match=r"train\.max_grad_norm of the recipe"):
        read_deepspeed(str(bad))
    for content, told in (
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage 0"),
        ({"bf16": {"enabled": True}}, "zero_optimization.stage None"),
        ({"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}}, "it sets fp16"),
    ):
        bad.write_text(json.dumps(content))
        with pytest.raises(UserError, match=told):
            read_deepspeed(str(bad))


@pytest.mark.parametrize("module", ["launch.recipe", "launch.cluster", "launch.cli", "eval.config", "datagen.config"])
def test_config_modules_import_no_torch(module: str):
    heavy = "{'torch', 'vllm', 'deepspeed', 'transformers'}"
    code = f"import sys, {module}; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


def test_rooms_know_only_whom_they_may():
    allowed = {"recovery": {"recovery"}, "datagen": {"datagen", "recovery"}, "eval": {"eval", "recovery"}}
    rooms = {"recovery", "datagen", "eval", "launch"}
    for room, may in allowed.items():
        for path in (REPOSITORY / room).rglob("*.py"):
            for line in path.read_text().splitlines():
                words = line.split()
                if len(words) > 1 and words[0] in ("import", "from") and (other := words[1].split(".")[0]) in rooms:
                    assert other in may, f"{path}: {line}"


def test_a_yaml_error_leaves_out_passwords(tmp_path: Path):
    path = tmp_path / "cluster.yaml"
    path.write_text("servers: {kind: external, urls: [http://me:s3@cret@host:8000}")
    with pytest.raises(UserError) as caught:
        read_yaml(path)
    assert "host:8000" in str(caught.value)
    assert "cret" not in str(caught.value)


def test_many_keys_are_read_in_no_time(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text("".join(f"k{number}: 1\n" for number in range(20_000)))
    began = time.process_time()
    assert len(read_yaml(path)) == 20_000
    assert time.process_time() - began < 30  # comparing all with all took minutes
