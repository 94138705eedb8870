"""The teacher cache: equal to the online teacher, the same from any rank layout and after any kill, damage named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import recovery.cache
import recovery.teacher_cache
import recovery.train
import recovery.training_run
from recovery.config import HiddenStatesTeacher
from recovery.corpus import Sample, Tokens, read_split, write_shard
from recovery.errors import DamagedArtifact
from recovery.files import write_json
from recovery.stage import build
from recovery.teacher_cache import HIDDEN, Blocks, blocks_of, bytes_per_token, write_block
from recovery.teacher_signal import TopLogprobs, signal_path, write_signal
from tests.conftest import REPOSITORY
from tests.pipeline import job_of, tiny_recipe

SHORT = {"epochs": 2, "checkpoint_every": 5, "evaluate_every": 6}
HIDDEN_STATES = {"kind": "hidden_states", "dtype": "float32"}
SPARSE = {"kind": "sparse_logits", "top": 24, "tail": 8}


def runs_of(prepared: tuple[Path, Path, Path], runs: Path) -> Path:
    if not runs.exists():
        shutil.copytree(prepared[2], runs)
    return runs


def make_cache(prepared: tuple[Path, Path, Path], runs: Path, teacher: dict[str, Any]) -> Path:
    model, data, _ = prepared
    job = job_of(tiny_recipe(model, data, teacher=teacher, train=SHORT), runs_of(prepared, runs), "cache")
    return build(job, recovery.cache.produce, resumable=True)


def train_with(prepared: tuple[Path, Path, Path], runs: Path, teacher: dict[str, Any]) -> Path:
    model, data, _ = prepared
    job = job_of(tiny_recipe(model, data, teacher=teacher, train=SHORT), runs_of(prepared, runs), "train")
    return build(job, recovery.train.produce, resumable=True)


def history(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "history.jsonl").read_text().splitlines()]


def held_out(folder: Path) -> list[float]:
    return [json.loads(line)["kl"] for line in (folder / "held_out.jsonl").read_text().splitlines()]


def test_training_from_stored_states_equals_training_beside_the_reference(
    prepared: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    online = train_with(prepared, tmp_path / "a", {"kind": "online"})
    make_cache(prepared, tmp_path / "b", HIDDEN_STATES)
    loaded = []
    real = recovery.training_run.load_model
    monkeypatch.setattr(
        recovery.training_run, "load_model", lambda given, dtype: (loaded.append(given), real(given, dtype))[1]
    )
    cached = train_with(prepared, tmp_path / "b", HIDDEN_STATES)
    assert len(loaded) == 1  # the reference is not loaded
    assert history(cached) == pytest.approx(history(online), rel=1e-4)
    assert held_out(cached) == pytest.approx(held_out(online), rel=1e-4)


def test_bfloat16_states_change_the_loss_by_less_than_a_thousandth(prepared: tuple[Path, Path, Path], tmp_path: Path):
    online = train_with(prepared, tmp_path / "a", {"kind": "online"})
    make_cache(prepared, tmp_path / "b", {"kind": "hidden_states"})
    cached = train_with(prepared, tmp_path / "b", {"kind": "hidden_states"})
    assert held_out(cached)[0] == pytest.approx(held_out(online)[0], rel=1e-3)


def test_training_from_sparse_logits_recovers_as_much(prepared: tuple[Path, Path, Path], tmp_path: Path):
    online = train_with(prepared, tmp_path / "a", {"kind": "online"})
    make_cache(prepared, tmp_path / "b", SPARSE)
    sparse = train_with(prepared, tmp_path / "b", SPARSE)
    # What is measured on held-out text is exact before training, and near the online one's after it.
    assert held_out(sparse)[0] == pytest.approx(held_out(online)[0], rel=1e-3)
    assert held_out(sparse)[-2] == pytest.approx(held_out(online)[-2], rel=0.2)
    assert held_out(sparse)[-2] < 0.8 * held_out(sparse)[0]


@pytest.mark.parametrize("teacher", [HIDDEN_STATES, SPARSE], ids=["hidden_states", "sparse_logits"])
def test_ranks_and_kills_make_the_same_files(
    prepared: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: dict[str, Any]
):
    monkeypatch.setattr(recovery.teacher_cache, "BLOCK_BYTES", 20_000)  # many blocks
    whole = make_cache(prepared, tmp_path / "a", teacher)
    assert len(list((whole / "train").glob("block-*"))) > 3

    class Killed(BaseException):
        pass

    real, written = recovery.cache.write_block, []

    def write(path: Path, *rest: Any) -> None:
        if len(written) == 2:
            raise Killed
        written.append(path)
        real(path, *rest)

    monkeypatch.setattr(recovery.cache, "write_block", write)
    with pytest.raises(Killed):
        make_cache(prepared, tmp_path / "b", teacher)
    monkeypatch.setattr(recovery.cache, "write_block", real)
    # Two ranks, the second of which works first, take what is left.
    model, data, _ = prepared
    job = job_of(tiny_recipe(model, data, teacher=teacher, train=SHORT), tmp_path / "b", "cache")
    fill, kept = recovery.cache.fill, [path.stat().st_mtime_ns for path in written]

    missing: list[list[int]] = []
    monkeypatch.setattr(recovery.cache, "of_first_rank", lambda found, _: (missing.append(found), missing[0])[1])

    def as_two_ranks(folder: Path, tokens: Tokens, size: int, compute: Any, *rest: Any) -> None:
        missing.clear()
        for rank in (1, 0):
            fill(folder, tokens, size, compute, rank, 2, rest[-1])

    monkeypatch.setattr(recovery.cache, "fill", as_two_ranks)
    shared = build(job, recovery.cache.produce, resumable=True)
    for path in sorted(whole.rglob("*.safetensors")):
        assert (shared / path.relative_to(whole)).read_bytes() == path.read_bytes()
    assert [(shared / path.parent.name / path.name).stat().st_mtime_ns for path in written] == kept


def test_two_real_ranks_make_the_files_of_one(prepared: tuple[Path, Path, Path], tmp_path: Path):
    whole = make_cache(prepared, tmp_path / "a", SPARSE)
    model, data, _ = prepared
    job = job_of(tiny_recipe(model, data, teacher=SPARSE, train=SHORT), runs_of(prepared, tmp_path / "b"), "cache")
    file = tmp_path / "job.json"
    file.write_text(job.to_json())
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--module", "recovery.cache"]
    subprocess.run([sys.executable, *torchrun, str(file)], check=True, timeout=240, cwd=REPOSITORY)
    shared = job.runtime.output
    assert len(list((whole / "train").glob("block-*"))) > 10  # both ranks had work
    for path in sorted(whole.rglob("*.safetensors")):
        assert (shared / path.relative_to(whole)).read_bytes() == path.read_bytes()
    assert json.loads((shared / "manifest.json").read_text())["details"]["ranks"] == 2


def test_a_damaged_row_is_named_and_never_used(prepared: tuple[Path, Path, Path], tmp_path: Path):
    folder = make_cache(prepared, tmp_path / "a", HIDDEN_STATES)
    tokens = read_split(Path(json.loads((folder / "manifest.json").read_text())["inputs"]["corpus"]["path"]), "train")
    path = folder / "train" / "block-00000.safetensors"
    content = bytearray(path.read_bytes())
    header = int.from_bytes(content[:8], "little")
    begin, _ = json.loads(content[8 : 8 + header])["hidden"]["data_offsets"]
    content[8 + header + begin + 5] ^= 1  # a bit of the first row's states
    path.write_bytes(content)
    blocks, damaged = Blocks(folder / "train", tokens, HIDDEN), []
    for position in range(len(tokens)):
        try:
            blocks[position]
        except DamagedArtifact as error:
            damaged.append(str(error))
    assert len(damaged) == 1
    assert "the bytes of row 0 are not" in damaged[0]
    assert "block-00000" in damaged[0]
    # The whole artifact is refused as well.
    with pytest.raises(DamagedArtifact, match="block-00000"):
        train_with(prepared, tmp_path / "a", HIDDEN_STATES)


def test_rows_of_another_corpus_are_refused(tmp_path: Path):
    def tokens(last: int) -> Tokens:
        return Tokens(np.arange(2) + 5, np.array([0, 3, 6]), np.array([1, 2, 3, 4, 5, last], dtype=np.int32))

    write_block(tmp_path / "block-00000.safetensors", tokens(6), range(2), {"hidden": torch.randn(4, 8)})
    assert Blocks(tmp_path, tokens(6), HIDDEN)[1][0].shape == (2, 8)
    with pytest.raises(DamagedArtifact, match="row 6 was made from other tokens"):
        Blocks(tmp_path, tokens(7), HIDDEN)
    with pytest.raises(DamagedArtifact, match="row 6 is not where"):
        Blocks(tmp_path, tokens(6).head(1), HIDDEN)
    (tmp_path / "block-00000.safetensors").unlink()
    with pytest.raises(DamagedArtifact, match="0 of 2 rows"):
        Blocks(tmp_path, tokens(6), HIDDEN)


def test_captured_signals_count_draws_outside_the_top_and_mark_the_rest_as_biased():
    tokens = Tokens(np.array([9]), np.array([0, 5]), np.array([3, 10, 11, 12, 13], dtype=np.int32))
    signal = TopLogprobs(
        np.array([[10, 1], [7, 8], [12, 2], [5, 6]], dtype=np.int32),
        np.log(np.array([[0.5, 0.2]] * 4, dtype=np.float32)),
        np.log(np.array([0.5, 0.1, 0.5, 0.05], dtype=np.float32)),
        np.array([False, False, True, True]),  # greedy, greedy, drawn within the top, drawn from the tail
    )
    found = recovery.cache.captured({9: signal}, tokens, [0])
    assert found["tail_weight"].tolist() == [0, 0, 0, 1]
    assert found["tail_ids"][3].tolist() == [13]
    assert found["rest"].tolist() == pytest.approx([0.3] * 4, rel=1e-5)
    assert {tensor.shape[0] for tensor in found.values()} == {4}


def test_captured_signals_are_read_from_the_shards_of_their_corpus(tmp_path: Path):
    random, rows, samples = np.random.default_rng(0), {}, {}
    for shard, members in enumerate(([0, 1, 2], [3, 4])):
        for index in members:
            length = int(random.integers(3, 9))
            rows[index] = random.integers(0, 50, length).astype(np.int32)
            k_ids = np.argsort(random.random((length - 1, 50)), axis=1)[:, :4].astype(np.int32)
            logprobs = np.log(np.full((length - 1, 4), 0.2, dtype=np.float32))
            signal = TopLogprobs(
                k_ids, logprobs, np.full(length - 1, -3.0, dtype=np.float32), np.ones(length - 1, dtype=bool)
            )
            samples[index] = Sample(index, index, int(rows[index][0]), "stop", rows[index], signal)
        path = tmp_path / "train" / f"shard-{shard:05d}.parquet"
        own = [samples[index] for index in members]
        write_shard(path, own)
        signals = [sample.signal for sample in own if sample.signal is not None]
        write_signal(signal_path(path), members, [rows[index] for index in members], signals)
    write_json(tmp_path / "summary.json", {"skip": 0})
    tokens = read_split(tmp_path, "train")
    compute = recovery.cache.captured_compute(tmp_path)
    together = compute(tokens, [4, 0, 2])
    signals = {index: sample.signal for index, sample in samples.items() if sample.signal is not None}
    expected = recovery.cache.captured(signals, tokens, [4, 0, 2])
    assert all(torch.equal(together[name], expected[name]) for name in expected)
    # A corpus whose tokens changed after the capture is refused by row.
    write_shard(tmp_path / "train" / "shard-00001.parquet", [replace(samples[n], tokens=rows[n] + 1) for n in (3, 4)])
    with pytest.raises(DamagedArtifact, match="row 3 has other tokens"):
        recovery.cache.captured_compute(tmp_path)(read_split(tmp_path, "train"), [3])


def test_blocks_and_bytes():
    tokens = Tokens(np.arange(4), np.array([0, 10, 20, 30, 40]), np.zeros(40, dtype=np.int32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recovery.teacher_cache, "BLOCK_BYTES", 200)
        assert blocks_of(tokens, 10) == [range(2), range(2, 4)]
        assert blocks_of(tokens, 1000) == [range(n, n + 1) for n in range(4)]
    assert bytes_per_token(HiddenStatesTeacher(), 2048) == 4096
