"""Bulk generation on a real vLLM server: our client beside vLLM's own benchmark, hybrid beside plain sampling, and
other ways to sample the same model.

    make bench-generate          # about 12 minutes on two cores; --turns 1 for a short one

All on the same server, lengths and concurrency, in turns; the fastest turn counts for each, since a busy machine only
ever makes one slower. vLLM's benchmark sends a seed with every request, as ours does: a server may sample seeded rows
one by one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from datagen.config import Generate, GenerateJob, GenerateRuntime, Mode
from datagen.generate import load_sampling_vocabulary
from datagen.pieces import Pieces
from datagen.protocol import Sampling
from datagen.served import ServedEngine, Vocabulary
from launch.cluster import Cluster, LocalServers, compute_dtype
from launch.servers import ServerPool, Serving
from recovery.artifacts import REPOSITORY
from recovery.config import ModelInput
from recovery.corpus import Split
from recovery.models import load_model
from recovery.tracking import Tracker
from tests.benchmarks.summary import append_row
from tests.processes import free_ports

MODEL = REPOSITORY / "assets" / "smollm2-135m-instruct"
SEQUENCES = 64
# `vllm bench serve` itself does not start in the CPU package, which has no metadata under the name vllm.
SERVE_BENCHMARK = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


class Unseeded(Sampling):
    """The same requests without their seeds: a server may then sample whole batches with one generator."""

    def _body(self, prompt: list[int], seed: int, max_tokens: int, more: dict[str, Any]) -> bytes:
        body = json.loads(super()._body(prompt, seed, max_tokens, more))
        del body["seed"]
        return json.dumps(body).encode()


class Bench:
    def __init__(self, folder: Path, samples: int, new_tokens: int) -> None:
        servers = LocalServers(count=1, port=free_ports(), sequences=SEQUENCES, kv_cache_gib=2)
        self.cluster = Cluster(name="bench", device="cpu", servers=servers)
        self.access = servers.access_on(self.cluster)
        self.folder, self.samples, self.new_tokens = folder, samples, new_tokens
        self.model = ModelInput(path=str(MODEL), digest="smollm2-135m")
        self.turns = 0
        found = load_sampling_vocabulary(self.model, "auto")
        # Nothing ends a text, so that every way of sampling makes the same number of tokens.
        self.vocabulary = Vocabulary(found.tokenizer, found.bos, frozenset(), found.width, found.eligible)

    def job(self, mode: Mode, greedy_tokens: int) -> GenerateJob:
        self.turns += 1
        settings = Generate(
            engine="vllm",
            mode=mode,
            samples=self.samples,
            greedy_tokens=greedy_tokens,
            max_length=self.new_tokens + 1,
        )
        runtime = GenerateRuntime(output=self.folder / f"turn-{self.turns}", servers=self.access)
        dtype = compute_dtype("auto", self.cluster)
        return GenerateJob(runtime=runtime, seed=self.turns, dtype=dtype, model=self.model, generate=settings)

    def ours(self, mode: Mode, greedy_tokens: int = 5, kind: type[Sampling] = Sampling) -> float:
        """New tokens a second of our client, after the examination of the server."""
        job = self.job(mode, greedy_tokens)
        folder = job.runtime.output
        folder.mkdir(parents=True)
        engine = ServedEngine(job, folder, self.vocabulary)
        stops, width = self.vocabulary.stops, self.vocabulary.width
        engine.sampling = kind(str(MODEL), job.generate, mode, stops, width)
        pieces: dict[Split, Pieces] = {"train": Pieces(folder / ".pieces")}
        with Tracker(None, None) as tracker:
            record = engine.fill({"train": np.arange(self.samples)}, pieces, tracker, 0)
        tokens = record["tokens_per_second"]
        assert isinstance(tokens, float)
        return tokens * self.new_tokens / (self.new_tokens + 1)  # without the start token

    def peer(self) -> float:
        """New tokens a second of `vllm bench serve`."""
        result = self.folder / f"vllm-{self.turns}.json"
        self.turns += 1
        command = [
            *(str(REPOSITORY / ".venv-vllm" / "bin" / "python"), "-c", SERVE_BENCHMARK),
            *("--backend", "openai", "--base-url", self.access.urls[0], "--endpoint", "/v1/completions"),
            *("--model", str(MODEL), "--dataset-name", "random", "--random-input-len", "1"),
            *("--random-output-len", str(self.new_tokens), "--num-prompts", str(self.samples), "--ignore-eos"),
            *("--max-concurrency", str(self.access.requests_per_server), "--temperature", "1.0", "--seed", "1"),
            *("--extra-body", json.dumps({"seed": 1})),
            *("--disable-tqdm", "--save-result", "--result-filename", str(result)),
        ]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.folder, check=False)
        if not result.exists():
            raise RuntimeError(f"vllm bench serve failed:\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}")
        return float(json.loads(result.read_text())["output_throughput"])


def best_of_turns(measures: dict[str, Callable[[], float]], turns: int) -> dict[str, float]:
    best = dict.fromkeys(measures, 0.0)
    for turn in range(turns):
        for name, measure in measures.items():
            rate = measure()
            print(f"turn {turn + 1}, {name}: {rate:.1f} tok/s", flush=True)
            best[name] = max(best[name], rate)
    return best


def transformers_rates(new_tokens: int) -> dict[str, float]:
    """New tokens a second of transformers' own `generate`: a batch of sequences, and LLM-QAT's loop of one."""
    import torch

    model = load_model(ModelInput(path=str(MODEL), digest=""), "float32")
    rates = {}
    ids = torch.arange(1000, 1000 + SEQUENCES)[:, None]
    fixed = {"top_k": 0, "eos_token_id": None, "pad_token_id": 0}
    start = time.perf_counter()
    model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=new_tokens, **fixed)
    rates["transformers generate, a batch of 64"] = SEQUENCES * new_tokens / (time.perf_counter() - start)
    start = time.perf_counter()
    for token in (1000, 2000):
        one = torch.tensor([[token]])
        # LLM-QAT (arXiv 2305.17888, section 3.1): a few greedy tokens, then the rest at random, one text at a time.
        begun = model.generate(
            one,
            attention_mask=torch.ones_like(one),
            do_sample=False,
            max_new_tokens=4,
            eos_token_id=None,
            pad_token_id=0,
        )
        rest = new_tokens - 4
        model.generate(begun, attention_mask=torch.ones_like(begun), do_sample=True, max_new_tokens=rest, **fixed)
    rates["LLM-QAT's loop, one text at a time"] = 2 * new_tokens / (time.perf_counter() - start)
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=SEQUENCES)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "runs" / "bench" / "generation")
    given = parser.parse_args()
    shutil.rmtree(given.folder, ignore_errors=True)
    given.folder.mkdir(parents=True)
    bench = Bench(given.folder, given.samples, given.new_tokens)
    with ServerPool(Serving.of(bench.job("one_request", 5)), bench.cluster, given.folder):
        bench.ours("one_request")  # the server compiles at its first requests
        rates = best_of_turns(
            {
                "vllm bench serve": bench.peer,
                "hybrid": lambda: bench.ours("one_request"),
                "plain": lambda: bench.ours("two_requests", 0),
                "two requests": lambda: bench.ours("two_requests"),
                "unseeded": lambda: bench.ours("two_requests", 0, Unseeded),
            },
            given.turns,
        )
    unit = "tok/s"
    append_row("generation: client / vllm bench serve", rates["plain"], unit, peer=rates["vllm bench serve"], goal=0.95)
    append_row("generation: hybrid in one request / plain", rates["hybrid"], unit, peer=rates["plain"], goal=0.97)
    append_row("generation: hybrid in two requests / plain", rates["two requests"], unit, peer=rates["plain"])
    append_row("generation: seeded / unseeded requests", rates["plain"], unit, peer=rates["unseeded"])
    for name, rate in transformers_rates(given.new_tokens).items():
        append_row(f"generation: hybrid / {name}", rates["hybrid"], unit, peer=rate)
    shutil.rmtree(given.folder)


if __name__ == "__main__":
    main()
