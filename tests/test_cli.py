"""The front door: exit codes, one clear line for a user's mistake, nothing written; dry run; a full disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch.cli import main
from recovery.artifacts import alone
from recovery.errors import UserError
from recovery.files import write_atomic
from tests.conftest import REPOSITORY, make_model
from tests.pipeline import make_benchmarks, model_at, run_in_process, tiny_recipe


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_benchmarks(tmp_path / "data")


def invoke(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["recover-lora", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def write_recipe(folder: Path, content: dict[str, object]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def recipe_for(model: Path, data: Path) -> dict[str, object]:
    return tiny_recipe(model, data).model_dump(mode="json", exclude_none=True)


MISTAKES = {
    "a value that YAML cannot make": (["--set", "name=2024-02-30"], "its value is not YAML"),
    "unknown key": (["--set", "train.learning_rat=1"], "train.learning_rat: unknown field; did you mean learning_rate"),
    "wrong type": (["--set", "train.epochs=many"], "train.epochs: found 'many'"),
    "out of range": (["--set", "generate.temperature=0"], "generate.temperature: found 0"),
    "missing model folder": (["--set", "models.reference=./nowhere"], "models.reference: no folder ./nowhere"),
    "missing folder that looks like a hub id": (
        ["--set", "models.reference=assets/nowhere"],
        "models.reference: no folder assets/nowhere here, and the model hub cannot be reached",
    ),
    "no such module": (
        ["--set", "adapter.placement=[qkv_proj]"],
        "no linear module is named qkv_proj; this model has:",
    ),
    "no such damaged module": (
        ["--set", "degrade.modules=[c_attn]"],
        "degrade.modules: no linear module is named c_attn",
    ),
    "rank too high": (
        ["--set", "adapter.rank=33"],
        "adapter.rank: 33, but model.layers.0.self_attn.k_proj has full rank 32",
    ),
    "unknown task": (["--set", "evaluate.tasks=[hellaswig]"], "unknown task hellaswig; known: hellaswag"),
    "missing data": (["--set", "evaluate.tasks=[boolq]"], "evaluate.data_dir: no data of boolq"),
    "no such cluster": (["--cluster", "moon"], "--cluster: no file"),
    "no such DeepSpeed file": (["--set", "train.deepspeed=zero9"], "one of: zero1, zero2, zero3"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_exit_2_and_nothing_written(
    mistake: str,
    tiny: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    arguments, message = MISTAKES[mistake]
    recipe = write_recipe(tmp_path, recipe_for(tiny, data))
    runs = tmp_path / "runs"
    assert invoke(monkeypatch, "run", str(recipe), "--runs-dir", str(runs), *arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not runs.exists()


def test_several_mistakes_are_told_together(
    tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    recipe = write_recipe(tmp_path, recipe_for(tiny, data))
    wrong = ["--set", "models.reference=./gone", "--set", "train.deepspeed=zero9", "--set", "evaluate.data_dir=./gone"]
    assert invoke(monkeypatch, "run", str(recipe), "--runs-dir", str(tmp_path / "runs"), *wrong) == 2
    message = capsys.readouterr().err
    for where in ("models.reference", "train.deepspeed", "evaluate.data_dir"):
        assert where in message


@pytest.mark.parametrize("kind", ["pickle", "truncated", "no config"])
def test_unsafe_or_broken_models_are_refused(
    kind: str,
    tiny: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    model = shutil.copytree(tiny, tmp_path / "model")
    weights = model / "model.safetensors"
    if kind == "pickle":
        weights.rename(model / "pytorch_model.bin")
        expected = "only pickled weights"
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
        expected = "not a whole safetensors file"
    else:
        (model / "config.json").unlink()
        expected = "no config.json"
    recipe = write_recipe(tmp_path, recipe_for(model, data))
    assert invoke(monkeypatch, "run", str(recipe), "--runs-dir", str(tmp_path / "runs")) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_another_vocabulary_is_refused_with_the_first_tokens(
    tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    other = make_model(tmp_path / "other", "llama", extra=("<one>", "<two>"))
    content = recipe_for(tiny, data)
    content["models"] = {"reference": str(tiny), "degraded": str(other)}
    del content["degrade"]
    recipe = write_recipe(tmp_path, content)
    assert invoke(monkeypatch, "run", str(recipe), "--runs-dir", str(tmp_path / "runs")) == 2
    message = capsys.readouterr().err
    assert "models.degraded: its vocabulary differs from the reference's in 2 tokens" in message
    assert "'<one>' missing against 259, '<two>' missing against 260" in message
    assert not (tmp_path / "runs").exists()


def test_dry_run_prints_every_job_and_writes_nothing(
    tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    recipe = write_recipe(tmp_path, recipe_for(tiny, data))
    assert invoke(monkeypatch, "run", str(recipe), "--runs-dir", str(tmp_path / "runs"), "--dry-run") == 0
    out = capsys.readouterr().out
    for module in (
        "recovery.degrade",
        "datagen.generate",
        "eval.contexts",
        "recovery.train",
        "eval.evaluate",
        "eval.report",
    ):
        assert f"-m {module} " in out
    assert not (tmp_path / "runs").exists()


def test_a_stage_alone_names_what_it_needs(
    tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    recipe = write_recipe(tmp_path, recipe_for(tiny, data))
    assert invoke(monkeypatch, "train", str(recipe), "--runs-dir", str(tmp_path / "runs")) == 2
    assert "train: needs degrade, generate, contexts, not finished" in capsys.readouterr().err


def test_two_commands_of_one_name_do_not_work_at_once(
    tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("recovery.artifacts.LOCK_SECONDS", 0.3)
    recipe, runs = write_recipe(tmp_path, recipe_for(tiny, data)), tmp_path / "runs"
    with alone(runs / "tiny" / ".run.lock", UserError("the test", "it is held", "wait")):
        assert invoke(monkeypatch, "degrade", str(recipe), "--runs-dir", str(runs)) == 2
        assert "tiny: another command is at work in" in capsys.readouterr().err
        assert [path.name for path in (runs / "tiny").iterdir()] == [".run.lock"]
    assert invoke(monkeypatch, "degrade", str(recipe), "--runs-dir", str(runs)) == 0


def test_a_changed_recipe_leaves_no_link_to_what_the_former_one_made(
    tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe, runs = write_recipe(tmp_path, recipe_for(tiny, data)), tmp_path / "runs"
    assert invoke(monkeypatch, "degrade", str(recipe), "--runs-dir", str(runs)) == 0
    made = (runs / "tiny" / "degraded").resolve()
    assert made.is_dir()
    (runs / "tiny" / "delivery").symlink_to("../artifacts/deliver-of-a-former-recipe")
    changes = ["--set", "degrade.relative_std=0.25", "--set", "generate.samples=4"]
    assert invoke(monkeypatch, "generate", str(recipe), "--runs-dir", str(runs), *changes) == 0
    assert (runs / "tiny" / "corpus").is_dir()
    assert not (runs / "tiny" / "degraded").is_symlink()
    assert not (runs / "tiny" / "delivery").is_symlink()
    assert made.is_dir()


def test_the_folder_of_runs_may_be_a_link_to_another_disk(
    tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    disk, runs = tmp_path / "mnt" / "disk" / "runs", tmp_path / "here" / "runs"
    disk.mkdir(parents=True)
    runs.parent.mkdir()
    runs.symlink_to(disk)
    recipe = write_recipe(tmp_path, recipe_for(tiny, data))
    assert invoke(monkeypatch, "degrade", str(recipe), "--runs-dir", str(runs)) == 0
    assert (runs / "tiny" / "degraded" / "config.json").is_file()


def test_damaged_and_empty_corpora_are_refused_by_name(
    tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    runs = tmp_path / "runs"
    folders = run_in_process(tiny_recipe(tiny, data), runs, until="contexts")
    recipe = write_recipe(tmp_path, recipe_for(tiny, data))
    shard = folders["generate"] / "train" / "shard-00001.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    assert invoke(monkeypatch, "run", str(recipe), "--runs-dir", str(runs)) == 2
    message = capsys.readouterr().err
    assert f"{shard}: {len(whole) - 10} bytes, the manifest says {len(whole)}; remove {folders['generate']}" in message
    assert not list((runs / "artifacts").glob("train-*"))


def test_a_full_disk_is_one_line_exit_1_and_no_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from recovery.stage import exit_code_of

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomic(tmp_path / "x.json", json.dumps({"a": 1}))
    assert not list(tmp_path.iterdir())
    assert exit_code_of(caught.value) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
@pytest.mark.parametrize("size", ["64k", "1200k"])
def test_a_really_full_disk(size: str, tiny: Path, data: Path, tmp_path: Path):
    """64k: full at the first file; 1200k: full while the degraded weights are written."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], check=True)
    try:
        recipe = write_recipe(tmp_path, recipe_for(tiny, data))
        command = [sys.executable, "-m", "launch.cli", "run", str(recipe), "--runs-dir", str(disk / "runs")]
        ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert ended.returncode == 1
        assert len([line for line in ended.stderr.splitlines() if "no space left on the disk" in line]) == 1
        assert "Traceback" not in ended.stderr
        artifacts = disk / "runs" / "artifacts"
        assert not artifacts.exists() or not [path for path in artifacts.iterdir() if path.is_dir()]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_missing_tensors_are_not_replaced_by_random_ones(tiny: Path, tmp_path: Path):
    """A package that lost a tensor is what this program is for: it must say so, not repair random weights."""
    from safetensors.torch import load_file, save_file

    from recovery.errors import UserError

    model = shutil.copytree(tiny, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    name = "model.layers.1.self_attn.v_proj.weight"
    del weights[name]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"1 tensors are missing or misshapen, first: {name}"):
        model_at(model)


def test_the_kinds_of_teacher_are_compared_before_anything_is_made(
    tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    recipe = write_recipe(tmp_path, recipe_for(tiny, data))
    runs = tmp_path / "runs"
    assert invoke(monkeypatch, "cache", str(recipe), "--runs-dir", str(runs), "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "1,920 tokens (at most: samples x max_length)" in lines[2]
    rows = {line.split(",")[1].split()[0]: line.split() for line in lines if line.startswith("zero")}
    assert list(rows) == ["online", "hidden_states", "sparse_logits"]
    assert {row.split(",")[0] for row in lines if row.startswith("zero")} == {"zero1"}
    assert not runs.exists()
    assert invoke(monkeypatch, "cache", str(recipe), "--runs-dir", str(runs)) == 2
    assert "its teacher is online" in capsys.readouterr().err


def test_profile_names_where_the_time_goes(
    tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    path = write_recipe(tmp_path, recipe_for(tiny, data))
    runs = tmp_path / "runs"
    assert invoke(monkeypatch, "train", str(path), "--runs-dir", str(runs), "--profile") == 2
    assert "--profile: needs degrade, generate, contexts, not finished" in capfd.readouterr().err
    for stage in ("degrade", "generate"):
        assert invoke(monkeypatch, stage, str(path), "--runs-dir", str(runs)) == 0
    assert invoke(monkeypatch, "train", str(path), "--runs-dir", str(runs), "--profile") == 0
    table = (runs / "tiny" / "profile" / "profile.txt").read_text()
    for phase in ("data", "teacher", "student", "loss", "backward", "optimizer", "aten::"):
        assert phase in table
    assert json.loads((runs / "tiny" / "profile" / "trace.json").read_text())["traceEvents"]
    assert not list((runs / "artifacts").glob("train-*"))
