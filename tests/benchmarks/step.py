"""The training step beside its peers: real tokens a second, memory, use of the machine; and the cached teachers.

    make bench-step              # about 14 minutes on two cores

SmolLM2-135M with noise on K and V, adapters of rank 64 there, on hybrid samples of up to 512 tokens that the reference
made. Every contender is a process of its own that takes the same optimizer step (the same samples, at least 2048
tokens) when it is its turn; medians count. A peer runs at the fastest of the batch sizes tried.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from launch.cluster import Cluster
from launch.plan_task import task_of
from launch.planner import Layout, rehearsal_of
from launch.recipe import Recipe
from recovery.artifacts import REPOSITORY
from recovery.batches import Step, collate, idle_share, plan_epoch
from recovery.cache import draw
from recovery.config import TrainJob
from recovery.corpus import read_split
from recovery.engine import start_distributed
from recovery.files import write_atomic
from recovery.loss import distill
from recovery.models import final_hidden
from recovery.targets import DenseTargets, SparseTargets
from recovery.tracking import Tracker
from recovery.train import look, train_step
from recovery.training_run import Run, set_up
from tests.benchmarks.rank import training_job
from tests.benchmarks.summary import append_row

RECIPE = REPOSITORY / "launch" / "recipes" / "smollm2-135m" / "demo.yaml"
FOLDER = REPOSITORY / "runs" / "bench" / "step"
PEERS = REPOSITORY / ".venv-peers" / "bin" / "python"
SETTINGS = (
    "generate.samples=28",
    "generate.held_out_samples=4",
    "generate.max_length=512",
    "generate.batch_samples=28",
    "adapter.rank=64",
    "adapter.init=zero",
    "evaluate.contexts=0",
    "train.batch_tokens=2560",
    "train.micro_batch_tokens=512",
    "train.learning_rate=0.0005",
    "train.warmup_steps=1",
)
TEACHERS = {
    "online": (),
    "hidden_states": ("teacher={kind: hidden_states}",),
    "sparse_logits": ("teacher={kind: sparse_logits}",),
}
BATCH_SIZES = (1, 2, 4, 8)
MINIMUM_TOKENS = 2048


@dataclass(frozen=True)
class Setup:
    jobs: dict[str, TrainJob]
    recipe: Recipe
    plan: list[Step]
    samples: list[list[list[int]]]
    """Of each step, token ids."""


def prepare() -> Setup:
    """The damaged model, the corpus and the caches, made by the product itself; reused where they are there."""
    jobs, recipe = {}, None
    for kind, override in TEACHERS.items():
        recipe, jobs[kind] = training_job(RECIPE, [*SETTINGS, f"name=bench-{kind}", *override], FOLDER)
    assert recipe is not None
    tokens = read_split(jobs["online"].corpus.path, "train")
    budgets = recipe.train.batch_tokens, recipe.train.micro_batch_tokens
    plan = plan_epoch(tokens.lengths, tokens.skip, jobs["online"].seed, 0, *budgets)
    rows = [[row for group in step.micro_batches for row in group] for step in plan]
    samples = [[tokens.row(row).tolist() for row in own] for own in rows]
    share = idle_share(plan, tokens.lengths, recipe.train.micro_batch_tokens)
    print(f"{len(tokens)} samples of {int(tokens.lengths.min())} to {int(tokens.lengths.max())} tokens")
    positions = sum(len(collate(tokens, group).ids_T) for step in plan for group in step.micro_batches)
    padding = 1 - int(tokens.lengths.sum()) / positions
    print(f"padding: {padding:.1%}; {share:.1%} of the micro-batches' room is unused")
    append_row("step: padding share, packed", padding, "share of computed positions", better="lower", goal=0.02)
    return Setup(jobs, recipe, plan, samples)


# ---- contenders ------------------------------------------------------------------------------------------


class Contender:
    """A process that takes a step when it is told to."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self.found: list[dict[str, float]] = []
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=REPOSITORY
        )
        self._read("ready")

    def _read(self, start: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(start):
                return line
        raise RuntimeError(f"{self.name} ended with {self._process.wait()}")

    def step(self, line: str, tokens: int, *, measured: bool) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        result = json.loads(self._read("{"))
        rate = tokens / result["seconds"]
        if measured:
            self.found.append({**result, "rate": rate})
        print(f"  {self.name:<22} {rate:6.1f} tok/s, loss {result['loss']:.6f}, {result['peak_mb']:.0f} MB", flush=True)
        return rate

    def median(self, field: str) -> float:
        return statistics.median(result[field] for result in self.found)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def our_contender(kind: str, job: TrainJob) -> Contender:
    file = FOLDER / f"{kind}.json"
    write_atomic(file, job.to_json())
    return Contender(f"ours, {kind}", [sys.executable, "-m", "tests.benchmarks.step", "--worker", str(file)])


def peer_contender(kind: str, setup: Setup, batch_size: int) -> Contender:
    file = FOLDER / "peers.json"
    job = setup.jobs["online"]
    given = {
        "reference": job.reference.path,
        "degraded": job.degraded.path,
        "rank": job.adapter.rank,
        "learning_rate": job.train.learning_rate,
        "folder": str(FOLDER / "trl"),
    }
    write_atomic(file, json.dumps(given))
    command = [str(PEERS), "-m", "tests.benchmarks.step_peers", kind, str(file), str(batch_size)]
    return Contender(f"{kind}, batch {batch_size}", command)


def worker(job_file: Path) -> None:
    """Our own training loop, a step for each line."""
    job: TrainJob = TrainJob.from_file(job_file)
    rank, ranks = start_distributed()
    scratch = FOLDER / f"worker-{job_file.stem}"
    scratch.mkdir(exist_ok=True)
    with Tracker(None, None) as tracker:
        run = set_up(job, scratch, rank, ranks, tracker)
        feed = run.feed(0)
        print("ready", flush=True)
        for line in sys.stdin:
            begun = time.perf_counter()
            train_step(run, int(line), feed)
            loss = look(run)[0]["loss"]
            seconds = time.perf_counter() - begun
            peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(json.dumps({"seconds": seconds, "loss": loss, "peak_mb": peak_mb}), flush=True)
        feed.close()


# ---- measurements ----------------------------------------------------------------------------------------


def fastest(kind: str, setup: Setup) -> Contender:
    """The peer at its fastest batch size: each size takes the first step twice, the second time counts."""
    line, tokens = json.dumps(setup.samples[0]), setup.plan[0].loss_tokens
    best: tuple[float, Contender] | None = None
    for size in BATCH_SIZES:
        peer = peer_contender(kind, setup, size)
        peer.step(line, tokens, measured=False)
        rate = peer.step(line, tokens, measured=False)
        if best is None or rate > best[0]:
            if best is not None:
                best[1].close()
            best = rate, peer
        else:
            peer.close()
            break  # larger ones have more padding still
    assert best is not None
    best[1].close()
    return peer_contender(kind, setup, int(best[1].name.rsplit(" ", 1)[1]))


def in_turns(setup: Setup, turns: int) -> dict[str, Contender]:
    contenders = {kind: fastest(kind, setup) for kind in ("plain", "trl")}
    contenders |= {kind: our_contender(kind, job) for kind, job in setup.jobs.items()}
    usable = [number for number, step in enumerate(setup.plan) if step.loss_tokens >= MINIMUM_TOKENS - 64]
    assert usable[: turns + 1] == list(range(turns + 1)), "the corpus gives too few steps of 2048 tokens"
    for number in range(turns + 1):
        tokens = setup.plan[number].loss_tokens
        for name, contender in contenders.items():
            line = json.dumps(setup.samples[number]) if name in ("plain", "trl") else str(number)
            contender.step(line, tokens, measured=number > 0)
    for contender in contenders.values():
        contender.close()
    return contenders


def matrix_rates() -> dict[str, float]:
    """GFLOP/s of large matrix products here."""
    rates = {}
    for dtype in (torch.bfloat16, torch.float32):
        one, other = (torch.randn(1536, 1536).to(dtype) for _ in range(2))
        torch.mm(one, other)
        best = 0.0
        for _ in range(5):
            begun = time.perf_counter()
            torch.mm(one, other)
            best = max(best, 2 * 1536**3 / (time.perf_counter() - begun) / 1e9)
        rates[str(dtype).removeprefix("torch.")] = best
    return rates


def report(setup: Setup, found: dict[str, Contender]) -> None:
    peer = max((found["trl"], found["plain"]), key=lambda contender: contender.median("rate"))
    print(f"the faster peer: {peer.name}")
    online, hidden = found["online"], found["hidden_states"]
    unit = "tok/s"
    append_row("step: online / faster peer", online.median("rate"), unit, peer=peer.median("rate"), goal=1.5)
    append_row("step: hidden_states / faster peer", hidden.median("rate"), unit, peer=peer.median("rate"), goal=2.0)
    sparse = found["sparse_logits"].median("rate")
    append_row("step: sparse_logits / faster peer", sparse, unit, peer=peer.median("rate"))
    lean = min(online.median("peak_mb"), hidden.median("peak_mb"))
    memory = {"better": "lower", "goal": 0.6}
    append_row("step: memory, online / peer", online.median("peak_mb"), "MB", peer=peer.median("peak_mb"), **memory)
    append_row("step: memory, hidden_states / peer", lean, "MB", peer=peer.median("peak_mb"), **memory)
    task = task_of(setup.recipe, Cluster(name="bench", device="cpu"), None, None)
    step = rehearsal_of(task, Layout("zero1", "online", checkpointing=False))
    phases = (step.teacher, step.forward, step.loss["dense"], step.backward)
    flops = sum(phase.work.flops for phase in phases) / step.loss_tokens
    rates = matrix_rates()
    print("matrix products: " + ", ".join(f"{rate:.0f} GFLOP/s in {dtype}" for dtype, rate in rates.items()))
    used = flops * online.median("rate") / 1e9
    # Where bf16 is emulated, the rate that counts is float32's, in which the step runs.
    append_row("step: FLOPs used / matrix products", used, "GFLOP/s", peer=max(rates.values()), goal=0.55)
    seconds = hidden.median("seconds"), online.median("seconds")
    append_row("step: time, hidden_states / online", seconds[0], "s", peer=seconds[1], better="lower", goal=0.8)
    worst = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(hidden.found, online.found, strict=True))
    append_row("step: loss, hidden_states against online", worst, "relative", better="lower", goal=1e-3)


def sparse_gradients(setup: Setup, batches: int) -> None:
    """The adapters' averaged gradient of the sparse targets against the exact one: untrained, and after training."""
    job = setup.jobs["online"]
    start_distributed()
    with Tracker(None, None) as tracker:
        run = set_up(job, FOLDER / "worker-online", 0, 1, tracker)
        cosine = _cosine(run, batches)
        append_row("step: cosine of sparse and exact gradient, start", cosine, "cosine", goal=0.995)
        feed = run.feed(0)
        for number in range(len(run.plan)):
            train_step(run, number, feed)
        losses = [line["loss"] for line in look(run)]
        print(f"trained {len(losses)} steps: loss {losses[0]:.3f} to {losses[-1]:.3f}")
        cosine = _cosine(run, batches)
        append_row("step: cosine of sparse and exact gradient, trained", cosine, "cosine", goal=0.995)
    cache = setup.jobs["sparse_logits"].cache
    assert cache is not None
    details = json.loads((cache.path / "manifest.json").read_text())["details"]
    append_row("step: sparse cache", details["bytes_per_token"], "bytes a token", better="lower", goal=420)


def _cosine(run: Run, batches: int) -> float:
    parameters = [p for p in run.student.parameters() if p.requires_grad]
    totals = [torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64) for _ in range(2)]
    rows = [group for step in run.plan for group in step.micro_batches][:batches]
    generator = torch.Generator().manual_seed(0)
    for group in rows:
        batch = collate(run.tokens, group)
        dense = run.teacher.targets(batch, ())
        assert isinstance(dense, DenseTargets)
        hidden = final_hidden(run.adapted, batch)[batch.loss_N]
        with run.student.whole_head() as head:
            for number, targets in enumerate((dense, _drawn(dense, generator))):
                loss = distill(hidden, head, targets)
                gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
                totals[number] += torch.cat([gradient.flatten() for gradient in gradients]).double()
    return float(torch.nn.functional.cosine_similarity(totals[0], totals[1], dim=0))


def _drawn(dense: DenseTargets, generator: torch.Generator) -> SparseTargets:
    parts = [
        draw(dense.head.logits(hidden), 48, torch.rand(len(hidden), 16, generator=generator))
        for hidden in dense.hidden_NG.split(128)
    ]
    return SparseTargets.of({name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--gradient-batches", type=int, default=10, help="of 512 tokens, for the sparse gradient")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(arguments.worker)
    if not PEERS.exists():
        parser.error(f"{PEERS} is not there: make install-peers")
    FOLDER.mkdir(parents=True, exist_ok=True)
    setup = prepare()
    report(setup, in_turns(setup, arguments.turns))
    sparse_gradients(setup, arguments.gradient_batches)
    for scratch in FOLDER.glob("worker-*"):
        shutil.rmtree(scratch)
    return None


if __name__ == "__main__":
    main()
