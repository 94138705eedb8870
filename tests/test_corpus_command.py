"""`recover-lora corpus`: show, stats, verify and merge, as a user types them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import datagen.generate
from datagen.config import Partition
from recovery.corpus import read_rows, shards_of
from recovery.stage import build
from tests.conftest import REPOSITORY
from tests.fake_servers import fake_servers
from tests.test_served import FAKE, make_job


def corpus(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.cli", "corpus", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)


@pytest.fixture(scope="module")
def folder(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "generate-0"
    with fake_servers(2, *FAKE) as (urls, _):
        return build(make_job(models["qwen2"], output, urls, samples=60), datagen.generate.produce, resumable=True)


def test_show_decodes_samples_by_index(folder: Path):
    result = corpus("show", folder, "--first", 7, "-n", 2, "--ids")
    rows = [row for shard in shards_of(folder, "train") for row in read_rows(shard)]
    assert result.returncode == 0, result.stderr
    assert [line[:4] for line in result.stdout.splitlines() if line.startswith("# ")] == ["# 7:", "# 8:"]
    assert str(rows[7]["tokens"]) in result.stdout
    beyond = corpus("show", folder, "--first", 999)
    assert beyond.returncode == 2
    assert "the corpus has no sample from there on" in beyond.stderr


def test_stats_agree_with_the_rows_and_are_drawn(folder: Path, tmp_path: Path):
    result = corpus("stats", folder, "--json", "--plot", tmp_path / "c.png")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    rows = [row for shard in shards_of(folder, "train") for row in read_rows(shard)]
    assert summary["samples"] == 60
    assert summary["tokens"] == sum(len(row["tokens"]) for row in rows)
    assert summary["end_of_text_rate"] == pytest.approx(sum(r["finish_reason"] == "stop" for r in rows) / 60, abs=1e-3)
    assert summary["start_tokens"] == len({row["start_token"] for row in rows})
    pairs = [pair for row in rows for pair in zip(row["tokens"][:-1], row["tokens"][1:], strict=True)]
    assert summary["distinct_2"] == pytest.approx(len(set(pairs)) / len(pairs), abs=1e-3)
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    text = corpus("stats", folder)
    assert f"samples             60, {summary['tokens']} tokens" in text.stdout


def test_verify_finds_one_changed_byte(folder: Path, tmp_path: Path):
    whole = corpus("verify", folder)
    assert whole.returncode == 0, whole.stderr
    assert "train: 60 samples" in whole.stdout
    copy = shutil.copytree(folder, tmp_path / "copy")
    shard = shards_of(copy, "train")[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    damaged = corpus("verify", copy)
    assert damaged.returncode == 2
    assert "its hash differs from the manifest's" in damaged.stderr


def test_merge_unites_parts_and_names_a_missing_one(models: dict[str, Path], tmp_path: Path):
    parts = []
    with fake_servers(1, *FAKE) as (urls, _):
        for part in range(2):
            job = make_job(models["qwen2"], tmp_path / f"p{part}", urls, partition=Partition(part=part, of=2))
            parts.append(build(job, datagen.generate.produce, resumable=True))
    missing = corpus("merge", parts[0], "--runs-dir", tmp_path / "runs")
    assert missing.returncode == 2
    assert "parts [0] of 2; [1] are missing; give every part once" in missing.stderr
    result = corpus("merge", *parts, "--runs-dir", tmp_path / "runs")
    assert result.returncode == 0, result.stderr
    assert corpus("verify", result.stdout.strip()).returncode == 0


def test_a_folder_that_is_no_corpus_is_told(tmp_path: Path):
    for command in ("show", "stats"):
        result = corpus(command, tmp_path)
        assert result.returncode == 2
        assert "no shards of split train in it" in result.stderr
    assert "no manifest.json in it" in corpus("verify", tmp_path).stderr
    assert "no such split" in corpus("show", tmp_path, "--split", "test").stderr
