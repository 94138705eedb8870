"""The client against 64 fake servers over loopback, with faults: rate, memory, and whether anything is lost.

    make bench-client          # 200k samples of 512 tokens; --samples 20000 for a short one

The client has one core and the fake servers another. A second run cuts the corpus into parts, each with a client of
its own, and merges them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np

from datagen.config import Generate, GenerateJob, GenerateRuntime, Partition, ServerAccess
from datagen.merge import merge_parts
from datagen.sampling import SamplingPlan, bos_id, eligible_ids
from recovery.artifacts import REPOSITORY
from recovery.config import ModelInput
from recovery.corpus import Split, read_table, shards_of
from tests.benchmarks.summary import append_row
from tests.fake_servers import expected_sample, fake_servers

MODEL = REPOSITORY / "assets" / "smollm2-135m-instruct"
WIDTH, STOP = 49152, 2  # of the model whose tokenizer is used


def make_job(folder: Path, urls: list[str], samples: int, length: int, partition: Partition | None) -> Path:
    """Write the job file of a corpus from these servers."""
    access = ServerAccess(urls=tuple(urls), requests_per_server=64, fingerprint="agreement", timeout_s=60)
    settings = Generate(engine="vllm", samples=samples, held_out_samples=64, max_length=length)
    model = ModelInput(path=str(MODEL), digest="bench")
    name = "corpus" if partition is None else f"part-{partition.part}"
    runtime = GenerateRuntime(output=folder / name, servers=access)
    job = GenerateJob(runtime=runtime, seed=0, dtype="float32", model=model, generate=settings, partition=partition)
    path = folder / f"{name}.json"
    path.write_text(job.to_json())
    return path


def resident(process: int) -> int:
    """Resident bytes now; 0 when it has ended."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ProcessLookupError, IndexError):
        return 0


class Client:
    """One client process; memory over time."""

    def __init__(self, job: Path, core: int | None) -> None:
        self.job, self._memory = job, [0]
        pin = [] if core is None else ["taskset", "-c", str(core)]
        self._log = job.with_suffix(".log")
        with self._log.open("w") as output:
            command = [*pin, sys.executable, "-m", "datagen.generate", str(job)]
            self._process = subprocess.Popen(command, stderr=output, cwd=REPOSITORY)

    def wait(self) -> None:
        while self._process.poll() is None:
            time.sleep(0.5)
            self._memory.append(resident(self._process.pid))
        if self._process.returncode:
            sys.exit(f"the client failed:\n{self._log.read_text()[-2000:]}")

    @property
    def peak(self) -> int:
        return max(self._memory)


def check(corpus: Path, samples: int, length: int, model: Path) -> int:
    """Compare every sample with what its servers must have said. Returns how many are missing, double or altered."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    bos = bos_id(tokenizer, "auto")
    plan = SamplingPlan(0, "train", eligible_ids(tokenizer, WIDTH))
    wrong = 0
    seen = []
    for shard in shards_of(corpus, "train"):
        table = read_table(shard)
        seen.append(table["index"].to_numpy())
        for index, tokens in zip(seen[-1].tolist(), table["tokens"], strict=True):
            start = plan.start(index)
            prompt = [start.token] if bos is None else [bos, start.token]
            expected = expected_sample(prompt, start.seed % (1 << 63), length, WIDTH, STOP, ends=False)
            wrong += not np.array_equal(tokens.values.to_numpy(), expected)
    return wrong + int(not np.array_equal(np.concatenate(seen), np.arange(samples)))


def rate_of(corpus: Path) -> float:
    """Samples a second while requests ran, from the manifest: without start-up, sorting and hashing."""
    return float(json.loads((corpus / "manifest.json").read_text())["details"]["throughput"]["requests_per_second"])


def generate(folder: Path, samples: int, given: argparse.Namespace, parts: int = 1) -> list[Client]:
    """Fill a corpus, or its parts by clients at the same time. One client has core 0, and the servers core 1."""
    folder.mkdir(parents=True)
    faults = ["--fault", str(given.fault), "--latency", "1.0", "--stops", str(STOP), "--never-end"]
    with fake_servers(given.servers, *faults, core=1 if parts == 1 else None) as (urls, _):
        cut: list[Partition | None] = [None] if parts == 1 else [Partition(part=n, of=parts) for n in range(parts)]
        jobs = [make_job(folder, urls, samples, given.length, part) for part in cut]
        clients = [Client(job, 0 if parts == 1 else None) for job in jobs]
        for client in clients:
            client.wait()
    return clients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--servers", type=int, default=64)
    parser.add_argument("--fault", type=float, default=0.002, help="chance that a request meets a fault")
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "runs" / "bench" / "client")
    given = parser.parse_args()
    shutil.rmtree(given.folder, ignore_errors=True)
    # Both hold more pieces than are ever in memory together, so what would grow with the samples shows.
    half = given.samples // 2
    (small,) = generate(given.folder / "small", half, given)
    (large,) = generate(given.folder / "large", given.samples, given)
    corpus = given.folder / "large" / "corpus"
    append_row("client: samples a second on one core", rate_of(corpus), "samples/s", goal=1500)
    append_row("client: peak memory", large.peak / 2**30, "GiB", better="lower", goal=1.0)
    append_row(
        f"client: peak memory at {given.samples} samples over that at {half}",
        *(large.peak / 2**20, "MiB"),
        peer=small.peak / 2**20,
        better="lower",
        goal=1.1,
    )
    wrong = check(corpus, given.samples, given.length, MODEL)
    append_row("client: samples missing, double or altered", wrong, "samples", better="lower", goal=0)

    generate(given.folder / "parts", half, given, parts=2)
    parts = [given.folder / "parts" / f"part-{number}" for number in range(2)]
    append_row("client: two parts at once on two cores, servers included", sum(map(rate_of, parts)), "samples/s")
    merged = merge_parts(parts, given.folder)
    different = sum(
        ours.read_bytes() != theirs.read_bytes()
        for split in get_args(Split)
        for ours, theirs in zip(
            shards_of(merged, split), shards_of(given.folder / "small" / "corpus", split), strict=True
        )
    )
    append_row(
        "client: shards that differ between two merged parts and one client",
        different,
        "shards",
        better="lower",
        goal=0,
    )
    shutil.rmtree(given.folder)


if __name__ == "__main__":
    main()
