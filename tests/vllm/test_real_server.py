"""A real vLLM server (CPU build) with our logits processor, behind `recover-lora serve` and the real client.

Order matters for the time only: one server serves all tests, the last ones kill it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import datagen.generate
import recovery.degrade
from datagen.config import Generate, GenerateJob, GenerateRuntime, ServerAccess
from datagen.integrity import check_corpus
from datagen.pieces import locate
from recovery.artifacts import read_manifest
from recovery.config import DegradeJob, ModelInput, Runtime
from recovery.corpus import read_rows, shards_of
from recovery.damage_config import GaussianNoise
from recovery.errors import UserError
from recovery.models import load_model
from recovery.stage import build
from tests.conftest import REPOSITORY
from tests.processes import wait_until
from tests.vllm.conftest import KEY, MODEL, Serving, command

pytestmark = pytest.mark.vllm
WIDTH = 49152
TIE = 1e-3  # nats, float32


@pytest.fixture(scope="module")
def reference() -> Any:
    return load_model(ModelInput(path=str(MODEL), digest=""), "float32")


def logprobs_of(model: Any, ids: list[list[int]]) -> torch.Tensor:
    """log-softmax (rows, positions, vocabulary) of equally long rows, by transformers."""
    with torch.inference_mode():
        return torch.log_softmax(model(input_ids=torch.tensor(ids)).logits.float(), -1)


def is_first_choice(logprobs: torch.Tensor, token: int) -> bool:
    return bool(logprobs.max() - logprobs[token] < TIE)


def generate(serving: Serving, output: Path, **changes: Any) -> Path:
    """A corpus made in this process by the real client."""
    settings = {"engine": "vllm", "samples": 300, "held_out_samples": 1, "max_length": 10, **changes}
    access = ServerAccess(urls=(serving.url,), api_key_env="POOL_KEY", requests_per_server=80)
    job = GenerateJob(
        runtime=GenerateRuntime(output=output, servers=access),
        seed=3,
        dtype="float32",
        model=ModelInput(path=str(MODEL), digest="smollm2"),
        generate=Generate.model_validate(settings),
    )
    return build(job, datagen.generate.produce, resumable=True)


def rows_of(corpus: Path) -> list[dict[str, Any]]:
    return [row for shard in shards_of(corpus, "train") for row in read_rows(shard)]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POOL_KEY", KEY)


def test_the_processor_in_the_servers_own_environment():
    """Both of vLLM's interfaces, batch moves and bad values, with vLLM's own classes."""
    python = REPOSITORY / ".venv-vllm" / "bin" / "python"
    options = ["-q", "--noconftest", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(REPOSITORY)]
    result = subprocess.run(
        [python, "-m", "pytest", *options, "tests/vllm/check_processor.py"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert "10 passed" in result.stdout


@pytest.mark.parametrize(("mode", "samples"), [("one_request", 240), ("two_requests", 80)])
def test_the_first_tokens_are_greedy_for_hundreds_of_starts(
    mode: str, samples: int, serving: Serving, reference: Any, tmp_path: Path
):
    """Against transformers in float32: each of the first five tokens is its first choice, or a tie with it."""
    corpus = generate(serving, tmp_path / "corpus", mode=mode, samples=samples)
    assert read_manifest(corpus)["details"]["mode"] == mode
    check_corpus(corpus)
    rows = rows_of(corpus)
    later = Counter[bool]()
    for first in range(0, len(rows), 50):
        part = [row["tokens"] + [0] * (10 - len(row["tokens"])) for row in rows[first : first + 50]]
        logprobs = logprobs_of(reference, part)
        for row, logprobs_TV in zip(rows[first : first + 50], logprobs, strict=True):
            for place, token in enumerate(row["tokens"][1:6]):
                assert is_first_choice(logprobs_TV[place], token), (row["start_token"], place)
            for place, token in enumerate(row["tokens"][6:], start=5):
                later[is_first_choice(logprobs_TV[place], token)] += 1
    assert len({row["start_token"] for row in rows}) == samples
    # Drawn tokens are often the first choice too, but far from always.
    assert 0.1 < later[True] / later.total() < 0.8


def test_later_tokens_follow_the_models_distribution(serving: Serving, reference: Any):
    """A chi-square test of 1500 draws of the token after two greedy ones; n > 1 gives each choice its own seed."""
    count = 1500
    # A start after which many tokens are likely, so that the test has many cells.
    texts = [[token] for token in range(1000, 1040)]
    for _ in range(2):
        best = logprobs_of(reference, texts)[:, -1].argmax(-1)
        texts = [[*text, int(token)] for text, token in zip(texts, best, strict=True)]
    after = logprobs_of(reference, texts)[:, -1].double().exp()
    chosen = int((after * count >= 5).sum(-1).argmax())
    start, greedy, probabilities = texts[chosen][:1], texts[chosen][1:], after[chosen].numpy()
    draws: list[list[int]] = []

    def ask(seed: int) -> list[list[int]]:
        answer = serving.complete(
            start, max_tokens=3, n=10, seed=1000 * seed, vllm_xargs={"greedy_tokens": 2, "vocabulary": WIDTH}
        )
        return [choice["token_ids"] for choice in answer["choices"]]

    with ThreadPoolExecutor(16) as threads:
        for choices in threads.map(ask, range(count // 10)):
            draws += choices
    assert len(draws) == count
    assert {tuple(draw[:2]) for draw in draws} == {tuple(greedy)}
    common = np.flatnonzero(probabilities * count >= 5)
    counts = Counter(draw[2] for draw in draws)
    observed = np.array([counts[int(token)] for token in common])
    expected = probabilities[common] * len(draws)
    observed, expected = (
        np.append(observed, len(draws) - observed.sum()),
        np.append(expected, len(draws) - expected.sum()),
    )
    assert len(common) > 10
    assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_requests_without_it_are_untouched_in_a_mixed_batch(serving: Serving, reference: Any):
    """Plain seeded and greedy requests give the same tokens alone and between hybrid ones; bad values get HTTP 400."""
    plain = [{"prompt": [1000 + n], "seed": n, "max_tokens": 8} for n in range(6)]
    plain += [{"prompt": [2000 + n], "temperature": 0.0, "max_tokens": 8} for n in range(4)]
    alone = [serving.complete(**fields)["choices"][0]["token_ids"] for fields in plain]
    hybrid = [
        {"prompt": [3000 + n], "seed": n, "max_tokens": 12, "vllm_xargs": {"greedy_tokens": n % 12}} for n in range(60)
    ]
    with ThreadPoolExecutor(70) as threads:
        answers = list(threads.map(lambda fields: serving.complete(**fields), [*hybrid, *plain]))
    tokens = [answer["choices"][0]["token_ids"] for answer in answers]
    assert tokens[60:] == alone
    for n, (fields, ids) in enumerate(zip(hybrid, tokens, strict=False)):
        logprobs = logprobs_of(reference, [fields["prompt"] + ids])[0]
        assert all(is_first_choice(logprobs[place], ids[place]) for place in range(n % 12))
    for bad in (-1, 2.5, "five"):
        status, answer = serving.ask(
            "/v1/completions", {"model": str(MODEL), "prompt": [1], "vllm_xargs": {"greedy_tokens": bad}}
        )
        assert status == 400
        assert "greedy_tokens must be a whole number" in answer


def test_padding_of_the_head_is_never_drawn(serving: Serving):
    """With a made-up small vocabulary every token stays inside it, greedy and drawn."""
    answer = serving.complete([504], max_tokens=40, n=4, seed=1, vllm_xargs={"greedy_tokens": 5, "vocabulary": 300})
    assert max(token for choice in answer["choices"] for token in choice["token_ids"]) < 300


def test_preempted_and_chunked_requests_stay_greedy(serving: Serving, reference: Any):
    """The server has room for 2560 tokens: 48 requests of up to 130 are preempted while their greedy tokens come."""
    page = serving.ask("/metrics")[1]
    before = preemptions(page)
    lengths = [85 if n % 2 == 0 else 1 for n in range(48)]
    prompts = [[5000 + 7 * n + k for k in range(length)] for n, length in enumerate(lengths)]

    def ask(prompt: list[int]) -> list[int]:
        arguments = {"greedy_tokens": 36, "vocabulary": WIDTH}
        answer = serving.complete(prompt, max_tokens=42, vllm_xargs=arguments)
        return answer["choices"][0]["token_ids"]

    with ThreadPoolExecutor(48) as threads:
        replies = list(threads.map(ask, prompts))
    assert preemptions(serving.ask("/metrics")[1]) > before
    for prompt, ids in zip(prompts, replies, strict=True):
        logprobs = logprobs_of(reference, [prompt + ids])[0]
        for place, token in enumerate(ids[:36], start=len(prompt) - 1):
            assert is_first_choice(logprobs[place], token), (prompt[0], place)


def preemptions(page: str) -> float:
    from datagen.throughput import parse_metrics

    return parse_metrics(page.encode())["num_preemptions"]


def test_captured_logprobs_are_the_models_own(serving: Serving, reference: Any, tmp_path: Path):
    """Raw log-probabilities in greedy positions too, the emitted token's, and the exact mass of the rest."""
    from safetensors.numpy import load_file

    corpus = generate(serving, tmp_path / "corpus", samples=12, max_length=20, capture_logprobs=8)
    tensors = load_file(corpus / "signal" / "train" / "shard-00000.safetensors")
    check_corpus(corpus)
    for place, row in enumerate(rows_of(corpus)):
        logprobs = logprobs_of(reference, [row["tokens"]])[0]
        first, last = tensors["offsets"][place : place + 2]
        for position, at in enumerate(range(first, last)):
            wanted = logprobs[position]
            best = wanted.topk(8)
            assert np.allclose(tensors["top_logprobs"][at], best.values, atol=TIE)
            assert np.allclose(wanted[tensors["top_ids"][at]], best.values, atol=TIE)
            assert np.isclose(tensors["emitted"][at], wanted[row["tokens"][position + 1]], atol=TIE)
            assert np.isclose(tensors["rest"][at], 1 - best.values.double().exp().sum(), atol=TIE)
            assert tensors["drawn"][at] == (position >= 5)


def test_a_server_of_a_damaged_model_is_refused(serving: Serving, tmp_path: Path):
    """The recipe's reference is a copy with a little noise, the server's model the original."""
    reference = ModelInput(path=str(MODEL), digest="smollm2")
    damage = GaussianNoise(modules=("v_proj",), relative_std=0.02)
    output = tmp_path / "noisy"
    job = DegradeJob(runtime=Runtime(output=output), seed=0, reference=reference, damage=damage)
    noisy = build(job, recovery.degrade.produce, resumable=False)
    access = ServerAccess(urls=(serving.url,), api_key_env="POOL_KEY")
    asked = GenerateJob(
        runtime=GenerateRuntime(output=tmp_path / "corpus", servers=access),
        seed=3,
        dtype="float32",
        model=ModelInput(path=str(noisy), digest="noisy"),
        generate=Generate(engine="vllm", samples=4, max_length=10),
    )
    with pytest.raises(UserError, match=r"it serves another model than .*noisy: (log-probabilities differ|its greedy)"):
        build(asked, datagen.generate.produce, resumable=True)


def test_the_key_is_needed_and_is_in_no_log_or_command_line(serving: Serving):
    assert serving.ask("/v1/models", key=None)[0] == 401
    assert serving.ask("/v1/models")[0] == 200
    logs = list(serving.runs.rglob("*.log"))
    assert len(logs) >= 2
    assert not [path for path in logs if KEY in path.read_text(errors="replace")]
    for process in serving.group():
        assert KEY.encode() not in Path(f"/proc/{process}/cmdline").read_bytes()


def test_killed_half_way_it_is_started_again_and_the_corpus_is_completed(serving: Serving):
    """SIGKILL to the API server and then to its engine's group while the real client works."""
    with (serving.runs / "generate.err").open("w") as errors:
        run = subprocess.Popen(
            command("generate", serving.recipe, serving.cluster, serving.runs),
            env=serving.environment,
            cwd=REPOSITORY,
            stderr=errors,
        )
        artifacts = serving.runs / "artifacts"

        def is_under_way() -> bool:
            # Pieces are written every five seconds: the corpus takes several times that on a fast machine.
            assert run.poll() is None, "generation ended before it could be killed"
            return len(locate(sorted(artifacts.glob(".generate-*/.pieces/train/piece-*"))).index) > 20

        wait_until(is_under_way, 300)
        killed = serving.group()
        os.kill(serving.api_server(), signal.SIGKILL)
        # What the API server leaves behind ends with its guard.
        wait_until(lambda: not any(Path(f"/proc/{process}").exists() for process in killed), 20)
        assert run.wait(400) == 0, (serving.runs / "generate.err").read_text()[-3000:]
    corpus = serving.runs / "real" / "corpus"
    result = subprocess.run(
        [sys.executable, "-m", "launch.cli", "corpus", "verify", str(corpus)],
        env=serving.environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "train: 120 samples" in result.stdout
    said = (serving.runs / "real" / "logs" / "serve.log").read_text()
    assert "died; start 1 of 3" in said


def test_servers_end_with_a_launcher_that_is_killed(serving: Serving):
    """Even by SIGKILL nothing of the servers is left, and the port is free."""
    wait_until(lambda: serving.ask("/health")[0] == 200, 120)
    processes = serving.group()
    assert len(processes) >= 4  # guard, API server, engine, worker
    serving.process.kill()
    serving.process.wait()
    wait_until(lambda: not any(Path(f"/proc/{process}").exists() for process in processes), 20)
