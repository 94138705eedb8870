"""One real vLLM server for the tests of this folder, started through `recover-lora serve`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml

from tests.conftest import REPOSITORY
from tests.processes import children_of, free_ports, group_of

MODEL = REPOSITORY / "assets" / "smollm2-135m-instruct"
KEY = "key-of-the-tests"
MAX_LENGTH = 130
# About 2500 tokens for 64 sequences of up to 130: the server must preempt. Prompts of more than 82 tokens come in
# chunks; those have no seeds in the tests, as a CPU server cannot have both.
BLOCKS, BLOCK_SIZE = 80, 32


@dataclass
class Serving:
    process: subprocess.Popen[str]
    url: str
    recipe: Path
    cluster: Path
    runs: Path
    environment: dict[str, str]

    def ask(self, path: str, body: dict[str, Any] | None = None, key: str | None = KEY) -> tuple[int, Any]:
        """Status and decoded answer of one request."""
        request = urllib.request.Request(self.url + path, None if body is None else orjson.dumps(body))
        request.add_header("Content-Type", "application/json")
        if key is not None:
            request.add_header("Authorization", f"Bearer {key}")
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                content = response.read()
                return response.status, orjson.loads(content) if content.startswith(b"{") else content.decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def complete(self, prompt: list[int], **fields: Any) -> dict[str, Any]:
        """One completion request of the tests: temperature 1, everything else neutral."""
        body = {
            "model": str(MODEL),
            "prompt": prompt,
            "temperature": 1.0,
            "ignore_eos": True,
            "return_token_ids": True,
            **fields,
        }
        status, answer = self.ask("/v1/completions", body)
        assert status == 200, answer
        return answer

    def group(self) -> set[int]:
        """Process ids of the servers that `serve` started: guards, API servers, engines."""
        return {member for guard in children_of(self.process.pid) for member in group_of(guard)}

    def api_server(self) -> int:
        """The child of the guard."""
        (guard,) = children_of(self.process.pid)
        (child,) = children_of(guard)
        return child


def write_files(folder: Path, port: int) -> tuple[Path, Path]:
    recipe = {
        "name": "real",
        "models": {"reference": str(MODEL), "dtype": "float32"},
        "degrade": {"kind": "gaussian_noise", "relative_std": 0.5},
        "generate": {"engine": "vllm", "samples": 120, "held_out_samples": 4, "max_length": 80},
        "evaluate": {"data_dir": str(REPOSITORY / "assets" / "benchmarks"), "suite": "extended"},
    }
    servers = {
        "kind": "local",
        "count": 1,
        "port": port,
        "sequences": 64,
        "kv_cache_gib": 1,
        "api_key_env": "POOL_KEY",
        "arguments": [
            *("--block-size", str(BLOCK_SIZE), "--num-gpu-blocks-override", str(BLOCKS)),
            *("--enable-chunked-prefill", "--long-prefill-token-threshold", "82"),
            *("--max-model-len", str(MAX_LENGTH)),
        ],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "cluster.yaml").write_text(yaml.safe_dump({"name": "test", "device": "cpu", "servers": servers}))
    return folder / "recipe.yaml", folder / "cluster.yaml"


def command(name: str, recipe: Path, cluster: Path, runs: Path, *more: str) -> list[str]:
    program = [sys.executable, "-m", "launch.cli", name, str(recipe)]
    return [*program, "--cluster", str(cluster), "--runs-dir", str(runs), *more]


@pytest.fixture(scope="session")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("real")
    recipe, cluster = write_files(folder, free_ports())
    runs = folder / "runs"
    environment = {**os.environ, "POOL_KEY": KEY, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(
        command("serve", recipe, cluster, runs),
        env=environment,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=(folder / "serve.err").open("w"),
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            assert url.startswith("http://127.0.0.1:"), (folder / "serve.err").read_text()[-3000:]
            yield Serving(process, url, recipe, cluster, runs, environment)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
