"""Artifacts: whole or not at all, reused, refused when damaged or stale; vocabularies compared."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from recovery.artifacts import Workspace, turn, verify
from recovery.config import ArtifactInput, DegradeJob, ModelInput, Runtime
from recovery.damage_config import GaussianNoise
from recovery.errors import DamagedArtifact, UserError
from recovery.files import HashMemory
from recovery.stage import build
from recovery.vocabulary import Vocabulary, used_width

Produce = Callable[[DegradeJob, Workspace], dict[str, Any]]


def job_in(folder: Path, reference: str = "r", seed: int = 0) -> DegradeJob:
    job = DegradeJob(
        runtime=Runtime(output=folder),
        seed=seed,
        reference=ModelInput(path=reference, digest=Path(reference).name),
        damage=GaussianNoise(relative_std=1.0),
    )
    return job.model_copy(update={"runtime": Runtime(output=folder / job.artifact_name)})


def writing(text: str) -> Produce:
    def produce(_: DegradeJob, workspace: Workspace) -> dict[str, Any]:
        (workspace.path / "payload.txt").write_text(text)
        return {"note": 1}

    return produce


def never(job: DegradeJob, _: Workspace) -> dict[str, Any]:
    raise AssertionError(f"{job.stage} should have been reused")


def test_identity_is_of_settings_and_inputs_not_of_places(tmp_path: Path):
    job = job_in(tmp_path)
    moved = job.model_copy(update={"runtime": Runtime(output=Path("/elsewhere"))})
    renamed = job.model_copy(update={"reference": ModelInput(path="other/r", digest="r")})
    assert job.identity == moved.identity == renamed.identity
    assert len({job.identity, job_in(tmp_path, seed=1).identity, job_in(tmp_path, reference="s").identity}) == 3
    path = tmp_path / "job.json"
    path.write_text(job.to_json())
    assert DegradeJob.from_file(path) == job


def test_finished_is_reused_and_damaged_refused_by_name(tmp_path: Path):
    job = job_in(tmp_path)
    folder = build(job, writing("hello"), resumable=False)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["details"] == {"note": 1}
    assert manifest["files"]["payload.txt"]["bytes"] == 5
    assert {"job", "inputs", "versions", "git", "started", "finished"} <= set(manifest)
    assert build(job, never, resumable=False) == folder
    (folder / "payload.txt").write_text("hellO")
    with pytest.raises(DamagedArtifact, match=r"payload\.txt: its hash differs from the manifest's; remove"):
        build(job, never, resumable=False)
    (folder / "payload.txt").unlink()
    with pytest.raises(DamagedArtifact, match="the file is missing"):
        verify(folder)


def test_a_failed_short_stage_leaves_nothing_a_long_one_its_work(tmp_path: Path):
    def failing(job: DegradeJob, workspace: Workspace) -> dict[str, Any]:
        writing("half")(job, workspace)
        raise RuntimeError("broken")

    for resumable in (False, True):
        job = job_in(tmp_path, seed=int(resumable))
        with pytest.raises(RuntimeError):
            build(job, failing, resumable=resumable)
        assert not job.runtime.output.exists()
        assert list(tmp_path.glob(f".{job.artifact_name}.partial")) == (
            [tmp_path / f".{job.artifact_name}.partial"] if resumable else []
        )


def test_two_processes_do_not_build_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("recovery.artifacts.LOCK_SECONDS", 0.3)
    job = job_in(tmp_path)
    with Workspace(job, resumable=True), pytest.raises(UserError, match="another process is building it"):
        build(job, never, resumable=True)


def test_a_file_that_the_manifest_does_not_name_is_refused(tmp_path: Path):
    folder = build(job_in(tmp_path), writing("one"), resumable=False)
    (folder / ".note").write_text("hidden: a working file")
    verify(folder)
    (folder / "train").mkdir()
    (folder / "train" / "shard-00099.parquet").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedArtifact, match=r"shard-00099\.parquet: the manifest does not name it"):
        verify(folder)


def test_a_turn_is_waited_for(tmp_path: Path):
    begun, waited, order = threading.Event(), list[int](), list[str]()

    def first() -> None:
        with turn(tmp_path / "artifacts" / ".x.turn", lambda: waited.append(1)):
            begun.set()
            time.sleep(0.4)
            order.append("first")

    def second() -> None:
        with turn(tmp_path / "artifacts" / ".x.turn", lambda: waited.append(2)):
            order.append("second")

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(first)
        assert begun.wait(5)
        pool.submit(second).result()
        one.result()
    assert (order, waited) == (["first", "second"], [2])


def test_an_artifact_of_an_input_that_has_changed_is_refused(tmp_path: Path):
    first = build(job_in(tmp_path), writing("one"), resumable=False)
    job = job_in(tmp_path, seed=5)
    reading = job.model_copy(update={"reference": ModelInput(path=str(first), digest="d")})
    reading = reading.model_copy(update={"runtime": Runtime(output=tmp_path / reading.artifact_name)})
    build(reading, writing("two"), resumable=False)
    assert build(reading, never, resumable=False)
    for path in first.iterdir():
        path.unlink()
    first.rmdir()
    build(job_in(tmp_path), writing("uno"), resumable=False)
    with pytest.raises(DamagedArtifact, match="made from another content of its input reference"):
        build(reading, never, resumable=False)


def test_hashes_are_remembered_until_the_file_changes(tmp_path: Path):
    path = tmp_path / "weights"
    path.write_text("a" * 100)
    memory = HashMemory(tmp_path / "memory.json")
    first = memory.sha256(path)
    memory.save()
    assert HashMemory(tmp_path / "memory.json").sha256(path) == first
    path.write_text("b" * 101)
    assert HashMemory(tmp_path / "memory.json").sha256(path) != first


def vocabulary(size: int, head: int, **changes: int) -> Vocabulary:
    tokens = {f"t{index}": index for index in range(size)} | changes
    return Vocabulary(tokens, {"bos_token_id": 0, "eos_token_id": 1, "unk_token_id": None}, head)


def test_padded_heads_agree_on_the_tokens_they_have():
    assert used_width(vocabulary(151_646, 151_936), vocabulary(151_646, 151_646)) == 151_646
    assert used_width(vocabulary(10, 16), vocabulary(10, 12)) == 10
    assert used_width(vocabulary(10, 8), vocabulary(10, 8)) == 8
    with pytest.raises(UserError, match="10 tokens, but heads of 16 and 8 rows"):
        used_width(vocabulary(10, 16), vocabulary(10, 8))


def test_a_mismatch_names_the_first_tokens():
    with pytest.raises(UserError, match="differs from the reference's in 2 tokens, first: 't3' 3 against 7, 'new'"):
        used_width(vocabulary(5, 9), vocabulary(5, 9, t3=7, new=8))
    other = vocabulary(5, 9)
    other.special["eos_token_id"] = 2
    with pytest.raises(UserError, match="its eos_token_id is 2, the reference's 1"):
        used_width(vocabulary(5, 9), other)


def test_an_input_that_is_not_there_is_named(tmp_path: Path):
    from recovery.config import Adapter, OnlineTeacher, Train, TrainJob

    model = ModelInput(path="m", digest="m")
    job = TrainJob(
        runtime=Runtime(output=tmp_path / "train"),
        seed=0,
        dtype="float32",
        reference=model,
        degraded=model,
        corpus=ArtifactInput(path=tmp_path / "generate-0", digest="0"),
        adapter=Adapter(),
        teacher=OnlineTeacher(),
        train=Train(),
        deepspeed={},
    )
    with pytest.raises(UserError, match="train needs corpus: no artifact"):
        build(job, never, resumable=True)  # pyright: ignore[reportArgumentType] - never called
