"""The vllm engine against fake servers over loopback: complete, unaltered, resumable; the wrong servers refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import datagen.collector
import datagen.generate
from datagen.config import Generate, GenerateJob, GenerateRuntime, Mode, Partition, ServerAccess
from datagen.integrity import check_corpus
from datagen.merge import merge_parts
from datagen.pieces import Pieces, locate
from datagen.sampling import SamplingPlan, eligible_ids
from recovery.artifacts import read_manifest
from recovery.config import ModelInput
from recovery.corpus import Split, read_rows, shards_of
from recovery.errors import Unavailable, UserError
from recovery.stage import build
from tests.conftest import REPOSITORY
from tests.fake_servers import expected_sample, fake_servers, logprobs_of

WIDTH, STOP = 259, 1  # of the tests' byte tokenizer
LENGTH = 24
FAKE = ("--width", str(WIDTH), "--max-model-len", str(LENGTH), "--stops", str(STOP))


def make_job(
    model: Path, output: Path, urls: list[str], *, partition: Partition | None = None, **changes: Any
) -> GenerateJob:
    """A job of 300 samples; changes: of the access where it has such a field, else of the settings."""
    access = {"urls": tuple(urls), "fingerprint": "agreement", "requests_per_server": 8, "patience_s": 2.0}
    settings: dict[str, Any] = {"engine": "vllm", "samples": 300, "held_out_samples": 20, "max_length": LENGTH}
    for name, value in changes.items():
        (access if name in ServerAccess.model_fields else settings)[name] = value
    return GenerateJob(
        runtime=GenerateRuntime(output=output, servers=ServerAccess.model_validate(access)),
        seed=5,
        dtype="float32",
        model=ModelInput(path=str(model), digest="fake"),
        generate=Generate.model_validate(settings),
        partition=partition,
    )


def run(job: GenerateJob) -> Path:
    return build(job, datagen.generate.produce, resumable=True)


def rows_of(corpus: Path, split: Split = "train") -> list[dict[str, Any]]:
    return [row for shard in shards_of(corpus, split) for row in read_rows(shard)]


def bytes_of(corpus: Path) -> dict[str, bytes]:
    return {str(path.relative_to(corpus)): path.read_bytes() for path in sorted(corpus.rglob("shard-*"))}


@pytest.fixture
def model(models: dict[str, Path]) -> Path:
    return models["qwen2"]  # no beginning-of-text id


def expected_rows(model: Path, split: Split, count: int) -> list[list[int]]:
    from transformers import AutoTokenizer

    plan = SamplingPlan(5, split, eligible_ids(AutoTokenizer.from_pretrained(model), WIDTH))
    starts = [plan.start(index) for index in range(count)]
    return [expected_sample([start.token], start.seed, LENGTH, WIDTH, STOP) for start in starts]


def test_complete_and_unaltered_through_every_fault(model: Path, tmp_path: Path):
    with fake_servers(5, *FAKE, "--fault", "0.25", "--latency", "0.01") as (urls, _):
        corpus = run(make_job(model, tmp_path / "corpus", urls))
    assert [row["tokens"] for row in rows_of(corpus)] == expected_rows(model, "train", 300)
    assert [row["tokens"] for row in rows_of(corpus, "held_out")] == expected_rows(model, "held_out", 20)
    counts = check_corpus(corpus)
    assert {split: samples for split, (samples, _) in counts.items()} == {"train": 300, "held_out": 20}
    assert 0.1 < np.mean([row["finish_reason"] == "stop" for row in rows_of(corpus)]) < 0.5
    details = read_manifest(corpus)["details"]
    assert details["mode"] == "one_request"
    assert details["throughput"]["retries"] > 30
    shares = [server["samples"] for server in details["throughput"]["servers"].values()]
    assert sum(shares) == 320
    assert min(shares) > 20
    metrics = [json.loads(line) for line in (corpus / "metrics.jsonl").read_text().splitlines()]
    assert {"perf/tokens_per_second", "perf/share_of_server_4"} <= set(metrics[0])
    assert metrics[-1]["data/start_token_coverage"] > 0.9


def test_killed_and_gone_on_with_by_another_number_of_servers(model: Path, tmp_path: Path):
    count = 6000
    with fake_servers(3, *FAKE) as (urls, _):
        undisturbed = run(make_job(model, tmp_path / "undisturbed", urls, samples=count, requests_per_server=64))
    pieces = tmp_path / ".corpus.partial" / ".pieces" / "train"
    with fake_servers(4, *FAKE, "--latency", "0.15") as (urls, _):
        there = 0
        for servers in (2, 1):
            job = make_job(model, tmp_path / "corpus", urls[:servers], samples=count, requests_per_server=32)
            (tmp_path / "job.json").write_text(job.to_json())
            command = [sys.executable, "-m", "datagen.generate", str(tmp_path / "job.json")]
            environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
            before = there
            with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
                while process.poll() is None and there == before:
                    time.sleep(0.1)
                    there = len(locate(sorted(pieces.glob("piece-*"))).index)
                process.send_signal(signal.SIGKILL)
            assert process.returncode == -signal.SIGKILL
            assert there > before
        asked = locate(sorted(pieces.glob("piece-*"))).missing(range(count))
        assert 0 < len(asked) < count - 1000
        corpus = run(make_job(model, tmp_path / "corpus", urls, samples=count, requests_per_server=64))
    assert bytes_of(corpus) == bytes_of(undisturbed)
    # Only what was missing was asked for.
    served = read_manifest(corpus)["details"]["throughput"]["servers"].values()
    assert sum(server["samples"] for server in served) == len(asked)


def test_interrupted_it_keeps_what_it_has(model: Path, tmp_path: Path):
    with fake_servers(1, *FAKE, "--latency", "0.05") as (urls, _):
        (tmp_path / "job.json").write_text(make_job(model, tmp_path / "corpus", urls, samples=5000).to_json())
        command = [sys.executable, "-m", "datagen.generate", str(tmp_path / "job.json")]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            pieces = tmp_path / ".corpus.partial" / ".pieces" / "train"
            while not list(pieces.glob("piece-*")):
                time.sleep(0.1)
            time.sleep(1.0)
            process.send_signal(signal.SIGTERM)
            said = process.stderr.read()
    assert process.returncode == 130
    assert "the same command goes on" in said
    assert len(list(pieces.glob("piece-*"))) >= 2  # the last second's too


def test_a_corpus_grows_from_a_finished_one(model: Path, tmp_path: Path):
    with fake_servers(2, *FAKE) as (urls, _):
        alone = run(make_job(model, tmp_path / "alone" / "generate-all", urls))
        run(make_job(model, tmp_path / "generate-small", urls, samples=120))
        grown = run(make_job(model, tmp_path / "generate-large", urls))
    assert bytes_of(grown) == bytes_of(alone)
    servers = read_manifest(grown)["details"]["throughput"]["servers"].values()
    assert sum(server["samples"] for server in servers) == 180
    # Nobody is asked for what is there.
    middle = run(make_job(model, tmp_path / "generate-middle", ["http://127.0.0.1:9"], samples=200))
    assert rows_of(middle) == rows_of(alone)[:200]
    for name in ("mode", "fingerprint"):
        assert read_manifest(middle)["details"][name] == read_manifest(alone)["details"][name]


def test_parts_of_several_clients_make_the_same_corpus(model: Path, tmp_path: Path):
    with fake_servers(2, *FAKE, "--latency", "0.01") as (urls, _):
        whole = run(make_job(model, tmp_path / "whole", urls))
        parts = []
        for part in (2, 0, 1):
            job = make_job(model, tmp_path / f"part-{part}", urls, partition=Partition(part=part, of=3))
            parts.append(run(job))
    assert {len(rows_of(part)) for part in parts} == {100}
    with pytest.raises(UserError, match=r"parts \[0, 2\] of 3; \[1\] are missing"):
        merge_parts(parts[:2], tmp_path / "artifacts")
    with pytest.raises(UserError, match="not a part of a corpus"):
        merge_parts([whole], tmp_path / "artifacts")
    merged = merge_parts(parts, tmp_path / "artifacts")
    assert bytes_of(merged) == bytes_of(whole)
    assert merged.name == make_job(model, tmp_path, urls).artifact_name
    assert merge_parts(parts, tmp_path / "artifacts") == merged  # a second time there is nothing to do


@pytest.mark.parametrize(("mode", "loaded"), [("two_requests", True), ("auto", False)])
def test_two_requests_where_the_processor_is_missing_or_unwanted(mode: Mode, loaded: bool, model: Path, tmp_path: Path):
    arguments = [] if loaded else ["--no-processor"]
    with fake_servers(2, *FAKE, *arguments) as (urls, _):
        corpus = run(make_job(model, tmp_path / "corpus", urls, mode=mode))
    assert read_manifest(corpus)["details"]["mode"] == "two_requests"
    check_corpus(corpus)
    # The fake's tokens are a function of prompt and seed: five of the prompt with seed 0, then the rest.
    for row in rows_of(corpus)[:50]:
        greedy = expected_sample(row["tokens"][:1], 0, 6, WIDTH, STOP)
        whole = greedy if greedy[-1] == STOP else expected_sample(greedy, row["seed"], LENGTH, WIDTH, STOP)
        assert row["tokens"] == whole


def test_a_token_beyond_the_vocabulary_is_drawn_again_from_the_next_seed(model: Path, tmp_path: Path):
    with fake_servers(1, *FAKE, "--width", str(WIDTH + 3), "--no-processor") as (urls, _):
        corpus = run(make_job(model, tmp_path / "corpus", urls, greedy_tokens=0))
    assert check_corpus(corpus)["train"][0] == 300
    redrawn = 0
    for row, first in zip(rows_of(corpus), seeds(model, 300), strict=True):
        seed = first
        while max(drawn := expected_sample(row["tokens"][:1], seed, LENGTH, WIDTH + 3, STOP)) >= WIDTH:
            seed = SamplingPlan.next_seed(seed)
        redrawn += seed != first
        assert (row["tokens"], row["seed"]) == (drawn, seed)
    assert 20 < redrawn < 150


def seeds(model: Path, count: int) -> list[int]:
    from transformers import AutoTokenizer

    plan = SamplingPlan(5, "train", eligible_ids(AutoTokenizer.from_pretrained(model), WIDTH))
    return [plan.start(index).seed for index in range(count)]


def test_a_corpus_goes_on_in_the_mode_it_was_begun_in(model: Path, tmp_path: Path):
    with fake_servers(1, *FAKE, "--latency", "0.2") as (urls, process):
        job = make_job(model, tmp_path / "corpus", urls, samples=2000)
        threading.Timer(8.0, process.kill).start()
        with pytest.raises(Unavailable, match="no server is left"):
            run(job)
    with (
        fake_servers(1, *FAKE, "--no-processor") as (urls, _),
        pytest.raises(UserError, match="has not loaded our logits processor, which this corpus was begun with"),
    ):
        run(make_job(model, tmp_path / "corpus", urls, samples=2000))


def test_servers_that_are_not_the_recipes_are_refused(model: Path, tmp_path: Path):
    with fake_servers(1, *FAKE) as (good, _), fake_servers(1, *FAKE, "--weights", "1") as (other, _):
        corpus = run(make_job(model, tmp_path / "corpus", [*good, *other]))
        served = read_manifest(corpus)["details"]["throughput"]["servers"]
        # Whichever answered first set the fingerprint; the other was not used.
        assert sorted(server["samples"] for server in served.values()) == [0, 320]
        with pytest.raises(UserError, match="it serves another model than"):
            run(make_job(model, tmp_path / "reference", good, fingerprint="reference"))
        with pytest.raises(UserError, match=f"its context holds {LENGTH} tokens, generate.max_length is 25"):
            run(make_job(model, tmp_path / "longer", good, max_length=25))
    with (
        fake_servers(1, *FAKE, "--no-processor") as (plain, _),
        pytest.raises(UserError, match="it has not loaded our logits processor"),
    ):
        run(make_job(model, tmp_path / "mode", plain, mode="one_request"))
    with pytest.raises(Unavailable, match="no server is left"):
        run(make_job(model, tmp_path / "gone", good, patience_s=0.5))


def test_the_key_is_sent_and_written_nowhere(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    key = "very-secret-key"
    with fake_servers(1, *FAKE, "--key", key) as (urls, _):
        with pytest.raises(UserError, match="it wants a key"):
            run(make_job(model, tmp_path / "corpus", urls))
        with pytest.raises(UserError, match=r"servers\.api_key_env: POOL_KEY is not set"):
            run(make_job(model, tmp_path / "corpus", urls, api_key_env="POOL_KEY"))
        monkeypatch.setenv("POOL_KEY", "wrong")
        with pytest.raises(UserError, match="it wants a key") as told:
            run(make_job(model, tmp_path / "corpus", urls, api_key_env="POOL_KEY"))
        assert "wrong" not in str(told.value)
        monkeypatch.setenv("POOL_KEY", key)
        job = make_job(model, tmp_path / "corpus", urls, api_key_env="POOL_KEY")
        run(job)
    assert key not in job.to_json()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not [path for path in files if key.encode() in path.read_bytes()]


def test_captured_logprobs_are_the_servers(model: Path, tmp_path: Path):
    from safetensors.numpy import load_file

    with fake_servers(2, *FAKE) as (urls, _):
        corpus = run(make_job(model, tmp_path / "corpus", urls, capture_logprobs=3, samples=40))
    check_corpus(corpus)
    tensors = load_file(corpus / "signal" / "train" / "shard-00000.safetensors")
    assert tensors["top_ids"].shape == (sum(row["length"] - 1 for row in rows_of(corpus)), 3)
    place = 0
    for row in rows_of(corpus):
        for position, token in enumerate(row["tokens"][1:]):
            entries = logprobs_of(token, 3)
            largest = sorted(entries.values(), reverse=True)[:3]
            assert np.allclose(tensors["top_logprobs"][place], largest)
            ids = tensors["top_ids"][place].tolist()
            assert all(np.isclose(entries[f"token_id:{i}"], value) for i, value in zip(ids, largest, strict=True))
            assert np.isclose(tensors["emitted"][place], entries[f"token_id:{token}"])
            assert np.isclose(tensors["rest"][place], 1 - np.exp(largest).sum(), atol=1e-6)
            assert tensors["drawn"][place] == (position >= 5)
            place += 1


def test_a_signal_goes_with_its_rows_through_a_merge(model: Path, tmp_path: Path):
    with fake_servers(2, *FAKE) as (urls, _):
        whole = run(make_job(model, tmp_path / "whole", urls, capture_logprobs=3, samples=90))
        parts = []
        for part in range(2):
            job = make_job(
                model,
                tmp_path / f"part-{part}",
                urls,
                capture_logprobs=3,
                samples=90,
                partition=Partition(part=part, of=2),
            )
            parts.append(run(job))
    merged = merge_parts(parts, tmp_path / "artifacts")
    check_corpus(merged)
    assert bytes_of(merged) == bytes_of(whole)
    assert any("signal" in name for name in bytes_of(merged))


def test_parts_of_different_models_are_not_merged(model: Path, tmp_path: Path):
    parts = []
    for part in range(2):
        with fake_servers(1, *FAKE, "--weights", str(part)) as (urls, _):
            job = make_job(model, tmp_path / f"part-{part}", urls, partition=Partition(part=part, of=2))
            parts.append(run(job))
    with pytest.raises(UserError, match="made by another model than"):
        merge_parts(parts, tmp_path / "artifacts")


def test_a_disk_that_fails_once_loses_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    original = Pieces.write
    calls: list[int] = []

    def write(self: Pieces, samples: Any) -> None:
        calls.append(len(samples))
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        original(self, samples)

    monkeypatch.setattr(Pieces, "write", write)
    monkeypatch.setattr(datagen.collector, "FLUSH_SECONDS", 0.2)
    with fake_servers(1, *FAKE, "--latency", "0.1") as (urls, _):
        job = make_job(model, tmp_path / "corpus", urls, samples=2000)
        with pytest.raises(OSError, match="No space left"):
            run(job)
        # What could not be written was written at the end, with what came since.
        kept = len(locate(Pieces(tmp_path / ".corpus.partial" / ".pieces" / "train").paths()).index)
        assert kept + 20 >= calls[0]
        assert len(rows_of(run(job))) == 2000


def test_overloaded_servers_at_the_start_are_waited_for(model: Path, tmp_path: Path):
    """Answers of a gateway whose servers are still loading are no verdict on the servers."""
    with fake_servers(1, *FAKE, "--loading", "2.0") as (urls, _):
        corpus = run(make_job(model, tmp_path / "corpus", urls, samples=40, patience_s=30))
    assert read_manifest(corpus)["details"]["mode"] == "one_request"


def test_a_changed_row_is_found(model: Path, tmp_path: Path):
    from recovery.corpus import Sample, write_shard

    with fake_servers(1, *FAKE) as (urls, _):
        corpus = run(make_job(model, tmp_path / "corpus", urls, samples=30))
    shard = corpus / "train" / "shard-00000.parquet"
    rows = read_rows(shard)

    def rewrite(place: int, **changes: Any) -> None:
        changed = [{**row, **(changes if number == place else {})} for number, row in enumerate(rows)]
        write_shard(
            shard,
            [Sample(r["index"], r["seed"], r["start_token"], r["finish_reason"], r["tokens"]) for r in changed],
        )

    for changes, fault in (
        ({"index": 99}, "sample 99: where 4 should stand"),
        ({"seed": 5}, "sample 4: seed 5, the plan has"),
        ({"tokens": [*rows[4]["tokens"], 9]}, "sample 4:"),
        ({"tokens": [7, *rows[4]["tokens"][1:]], "start_token": 7}, "sample 4: starts with"),
        ({"tokens": rows[4]["tokens"][:-1]}, "sample 4: finish reason"),
        ({"tokens": [*rows[4]["tokens"][:-1], WIDTH]}, "sample 4: token id 259, the vocabulary has 259"),
    ):
        rewrite(4, **changes)
        with pytest.raises(UserError, match=fault):
            check_corpus(corpus)
