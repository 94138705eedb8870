"""A delivered adapter on a real vLLM server over the degraded base, and as a GGUF file by llama.cpp's own converter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from eval.deliver import Check
from launch.assets import LLAMA_CPP, fetch
from tests.conftest import REPOSITORY
from tests.processes import free_ports

pytestmark = pytest.mark.vllm


def test_an_adapter_is_served_as_it_was_scored(tmp_path: Path):
    """Ranks of their own for each module, so that what is served is the delivery's uniform form."""
    recipe = {
        "name": "served",
        "models": {"reference": str(REPOSITORY / "assets" / "smollm2-135m-instruct")},
        "degrade": {"kind": "gaussian_noise", "modules": ["kv"], "relative_std": 0.5},
        "generate": {"samples": 16, "held_out_samples": 8, "max_length": 64, "batch_samples": 16},
        "adapter": {"placement": "auto", "rank": 8, "init": "closed_form_sequential", "calibration_tokens": 256},
        "train": {"epochs": 0},
        "evaluate": {"suite": "none"},
    }
    servers = {"kind": "local", "kv_cache_gib": 1, "sequences": 8, "port": free_ports(1) - 99}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({"name": "here", "servers": servers}))
    command = [sys.executable, "-m", "launch.cli"]
    common = [str(tmp_path / "recipe.yaml"), "--runs-dir", str(tmp_path), "--cluster", str(tmp_path / "cluster.yaml")]
    subprocess.run([*command, "run", *common], check=True, cwd=REPOSITORY)
    converter = fetch(LLAMA_CPP, REPOSITORY / "assets")
    subprocess.run(
        [*command, "deliver", *common, "--served", "--gguf", "--llama-cpp", str(converter)], check=True, cwd=REPOSITORY
    )
    folder = tmp_path / "served" / "delivery"
    checks = {one["form"]: Check(**one) for one in json.loads((folder / "checks.json").read_text())}
    assert list(checks) == ["adapter", "uniform", "vllm", "gguf"]
    assert all(one.holds for one in checks.values())
    assert checks["vllm"].tokens_compared > 400
    assert checks["vllm"].kl != checks["adapter"].kl  # it is the server's, not a copy
    degraded = json.loads((folder / "summary.json").read_text())["kl"]["degraded"]
    assert checks["vllm"].kl < 0.5 * degraded
    assert (folder / "gguf" / "model.gguf").stat().st_size > 200e6
