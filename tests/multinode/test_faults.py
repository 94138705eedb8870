"""What goes wrong on several ranks of one host: a user's mistake, a full disk, a loss that is not a number."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.cluster import Cluster
from launch.pipeline import run_stage_process
from launch.resolve import resolve_names
from launch.stages import Stage, build_stages
from recovery.errors import EXIT_DONE, EXIT_FAILED, EXIT_USER
from recovery.files import HashMemory
from tests.corrupted import BAD_STEP
from tests.pipeline import tiny_recipe

TWO = Cluster(name="two-ranks", device="cpu", processes=2, heartbeat_s=10)
SHORT = {"epochs": 1, "batch_tokens": 320, "micro_batch_tokens": 160, "checkpoint_every": 2, "deepspeed": "zero2"}


def training(prepared: tuple[Path, Path, Path], runs: Path, **changes: Any) -> Stage:
    model, data, source = prepared
    if not (runs / "artifacts").exists():
        shutil.copytree(source, runs, dirs_exist_ok=True, symlinks=True)
    changes.setdefault("train", {})
    recipe = tiny_recipe(model, data, **{**changes, "train": {**SHORT, **changes["train"]}})
    stages = build_stages(recipe, resolve_names(recipe, HashMemory(None)), TWO, runs)
    return next(stage for stage in stages if stage.label == "train")


def start(stage: Stage, runs: Path, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """(exit code, what was said)"""
    capfd.readouterr()
    code = run_stage_process(stage, runs / "tiny", TWO)
    return code, capfd.readouterr().err


def test_a_users_mistake_on_all_ranks_keeps_its_exit_code(
    prepared: tuple[Path, Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    adapter = {"placement": ["lm_head"], "rank": 4}
    stage = training(prepared, tmp_path, adapter=adapter, train={"deepspeed": "zero3"})
    code, said = start(stage, tmp_path, capfd)
    assert code == EXIT_USER, said
    assert not stage.job.runtime.output.exists()
    assert not list((tmp_path / "tiny" / "jobs").glob("*.exit"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_disk_that_fills_up_costs_no_more_than_the_steps_behind_the_checkpoint(
    prepared: tuple[Path, Path, Path], tmp_path: Path, small_disk: Path, capfd: pytest.CaptureFixture[str]
):
    undisturbed = training(prepared, tmp_path / "undisturbed")
    assert start(undisturbed, tmp_path / "undisturbed", capfd)[0] == EXIT_DONE
    stage = training(prepared, small_disk)
    (small_disk / "tiny" / "jobs").mkdir(parents=True, exist_ok=True)
    filler = small_disk / "filler"
    left = shutil.disk_usage(small_disk).free
    filler.write_bytes(b"x" * (left - 96 * 1024))
    code, said = start(stage, small_disk, capfd)
    assert code == EXIT_FAILED
    assert "no space left on the disk" in said, said
    assert not stage.job.runtime.output.exists()
    filler.unlink()
    assert start(stage, small_disk, capfd)[0] == EXIT_DONE
    one, other = (folder.job.runtime.output / "adapter_model.safetensors" for folder in (stage, undisturbed))
    assert one.read_bytes() == other.read_bytes()


def test_a_loss_that_is_not_a_number_stops_all_ranks_and_costs_no_checkpoint(
    prepared: tuple[Path, Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    settings = {"epochs": 4, "checkpoint_every": 4}
    undisturbed = training(prepared, tmp_path / "undisturbed", train=settings)
    assert start(undisturbed, tmp_path / "undisturbed", capfd)[0] == EXIT_DONE
    stage = training(prepared, tmp_path / "disturbed", train=settings)
    code, said = start(replace(stage, module="tests.corrupted"), tmp_path / "disturbed", capfd)
    assert code == EXIT_FAILED
    found = re.search(rf"loss nan.* at step {BAD_STEP + 1}, samples \[([0-9, ]+)\]; nothing was saved over", said)
    assert "[rank0]: Traceback" not in said  # nor of the rank that torchrun ends in the meantime
    assert "[rank1]: Traceback" not in said
    assert found is not None, said
    assert 0 < len(found.group(1).split(",")) < 48
    assert not stage.job.runtime.output.exists()
    (checkpoints,) = (tmp_path / "disturbed" / "artifacts").glob(".train-*/.checkpoints")
    assert {json.loads(note.read_text())["step"] for note in checkpoints.glob("step-*.json")} == {4, 8}
    code, said = start(stage, tmp_path / "disturbed", capfd)
    assert code == EXIT_DONE, said
    assert "going on after step 8" in said
    one, other = (folder.job.runtime.output / "adapter_model.safetensors" for folder in (stage, undisturbed))
    assert one.read_bytes() == other.read_bytes()
