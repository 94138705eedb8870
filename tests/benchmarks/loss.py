"""The distillation loss beside its peers: processor time, peak memory, and the gradient's error in bf16.

    make bench-loss              # about 7 minutes on two cores

Runs in the peers' environment (`make install-peers`), all contenders in one process, on the same inputs, in turns;
medians count. Inputs are states and heads of random numbers: no loss here is faster on other numbers.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from recovery.head import Head
from recovery.loss import distill
from recovery.targets import DenseTargets
from tests.benchmarks.summary import append_row

Contender = Callable[["Inputs"], Tensor]
DENSE = ("TRL GKD", "NVIDIA ModelOpt", "plain PyTorch")


@dataclass(frozen=True)
class Inputs:
    """Both models' states (N, H) and heads (V, H), frozen but for the student's states."""

    student_NH: Tensor
    teacher_NH: Tensor
    student_VH: Tensor
    teacher_VH: Tensor

    @classmethod
    def random(cls, tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype) -> Inputs:
        generator = torch.Generator().manual_seed(0)

        def normal(rows: int, scale: float) -> Tensor:
            return (scale * torch.randn(rows, hidden, generator=generator)).to(dtype)

        # Logits with a standard deviation of 2, as trained models have; the student is the teacher with errors.
        teacher_NH, teacher_VH = normal(tokens, 1.0), normal(vocabulary, 2.0 / hidden**0.5)
        student_NH = (teacher_NH + normal(tokens, 0.3)).requires_grad_()
        return cls(student_NH, teacher_NH, teacher_VH.clone(), teacher_VH)


def ours(given: Inputs) -> Tensor:
    student, teacher = (Head(weight_VH, None, 1.0, None) for weight_VH in (given.student_VH, given.teacher_VH))
    return distill(given.student_NH, student, DenseTargets(given.teacher_NH, teacher))


def dense(divergence: Callable[[Tensor, Tensor], Tensor]) -> Contender:
    """A loss of two (tokens x vocabulary) tensors, made as a model's own head makes them."""

    def contender(given: Inputs) -> Tensor:
        with torch.no_grad():
            teacher_NV = given.teacher_NH @ given.teacher_VH.T
        return divergence(given.student_NH @ given.student_VH.T, teacher_NV)

    return contender


def plain(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """What DistillKit, LLM-QAT and AMD Quark write, each with its own reduction."""
    q, p = torch.log_softmax(student_NV, -1), torch.softmax(teacher_NV, -1)
    return torch.nn.functional.kl_div(q, p, reduction="sum")


def peers() -> dict[str, Contender]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # pyright: ignore[reportMissingImports]
    from modelopt.torch.distill.losses import LogitsDistillationLoss  # pyright: ignore[reportMissingImports]
    from trl.experimental.gkd import GKDTrainer  # pyright: ignore[reportMissingImports]
    from trl.trainer.distillation_trainer import _chunked_divergence_loss  # pyright: ignore[reportMissingImports]

    def labels(given: Inputs) -> Tensor:
        return torch.zeros(len(given.student_NH), dtype=torch.long)

    def gkd(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
        mask = torch.zeros(1, len(student_NV), dtype=torch.long)
        return GKDTrainer.generalized_jsd_loss(student_NV[None], teacher_NV[None], labels=mask, beta=0.0)

    def chunked(given: Inputs) -> Tensor:
        mask = torch.ones(len(given.student_NH), dtype=torch.bool)
        states = given.student_NH, given.teacher_NH
        return _chunked_divergence_loss(*states, given.student_VH, given.teacher_VH, mask, 0.0)[0]

    def liger(given: Inputs) -> Tensor:
        loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False, chunk_size=256
        )
        return loss(given.student_NH, given.student_VH, given.teacher_NH, given.teacher_VH, labels(given))

    modelopt = LogitsDistillationLoss(reduction="none")
    return {
        "TRL GKD": dense(gkd),
        "TRL chunked": chunked,
        "Liger chunked": liger,
        "NVIDIA ModelOpt": dense(lambda student_NV, teacher_NV: modelopt(student_NV, teacher_NV).sum()),
        "plain PyTorch": dense(plain),
    }


@dataclass(frozen=True)
class Measured:
    processor_s: float
    wall_s: float
    peak_mb: float


def run(contender: Contender, given: Inputs) -> Measured:
    """One forward and backward pass. peak: resident memory beyond what was there before (Linux)."""
    given.student_NH.grad = None
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, begun, wall = _resident_kb("VmRSS"), _processor_s(), time.perf_counter()
    contender(given).backward()
    return Measured(_processor_s() - begun, time.perf_counter() - wall, (_resident_kb("VmHWM") - before) / 1024)


def _processor_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _resident_kb(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def in_turns(contenders: dict[str, Contender], given: Inputs, turns: int) -> dict[str, Measured]:
    """Medians, after one unmeasured run of each."""
    found: dict[str, list[Measured]] = {name: [] for name in contenders}
    for turn in range(turns + 1):
        for name, contender in contenders.items():
            measured = run(contender, given)
            if turn:
                found[name].append(measured)
    medians = {
        name: Measured(*(statistics.median(getattr(m, field) for m in runs) for field in Measured.__annotations__))
        for name, runs in found.items()
    }
    for name, median in medians.items():
        print(
            f"  {name:<16} {median.processor_s:6.2f} CPU-s {median.wall_s:6.2f} s {median.peak_mb:6.0f} MB", flush=True
        )
    return medians


def gradient_error(contender: Contender, given: Inputs, exact_NH: Tensor) -> float:
    """Relative L2 error of the gradient's direction and size; losses differ in their constant factor."""
    given.student_NH.grad = None
    contender(given).backward()
    found = given.student_NH.grad
    assert found is not None
    found = found.double()
    found = found * (exact_NH.norm() ** 2 / (found * exact_NH).sum())
    return float((found - exact_NH).norm() / exact_NH.norm())


def exact_gradient(given: Inputs) -> Tensor:
    states = given.student_NH.detach().double().requires_grad_()
    q = torch.log_softmax(states @ given.student_VH.double().T, -1)
    p = torch.log_softmax(given.teacher_NH.double() @ given.teacher_VH.double().T, -1)
    (gradient,) = torch.autograd.grad(torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True), states)
    return gradient


def speed_and_memory(contenders: dict[str, Contender], turns: int) -> None:
    print("float32, N=256, H=1024, V=128256")
    found = in_turns(contenders, Inputs.random(256, 1024, 128_256, torch.float32), turns)
    mine, trl = found["ours"], found["TRL chunked"]
    fastest = min(found[name].processor_s for name in DENSE)
    leanest = min(found[name].peak_mb for name in DENSE)
    append_row("loss: time / fastest dense", mine.processor_s, "CPU-s", peer=fastest, better="lower", goal=1.0)
    append_row("loss: time / TRL chunked", mine.processor_s, "CPU-s", peer=trl.processor_s, better="lower", goal=0.55)
    append_row("loss: peak memory / leanest dense", mine.peak_mb, "MB", peer=leanest, better="lower", goal=0.4)
    append_row("loss: peak memory / TRL chunked", mine.peak_mb, "MB", peer=trl.peak_mb, better="lower", goal=0.9)


def accuracy(contenders: dict[str, Contender], turns: int) -> None:
    print("bfloat16, N=256, H=1024, V=32000")
    given = Inputs.random(256, 1024, 32_000, torch.bfloat16)
    exact_NH = exact_gradient(given)
    errors = {name: 100 * gradient_error(contender, given, exact_NH) for name, contender in contenders.items()}
    for name, error in errors.items():
        print(f"  {name:<16} {error:.3f} % gradient error", flush=True)
    widened = Inputs(
        given.student_NH.detach().float().requires_grad_(), given.teacher_NH, given.student_VH, given.teacher_VH
    )
    wide = 100 * gradient_error(ours, widened, exact_NH)
    found = in_turns({name: contenders[name] for name in ("ours", "TRL chunked")}, given, turns)
    append_row("loss: bf16 gradient error", errors["ours"], "%", better="lower", goal=0.25)
    append_row("loss: bf16 gradient error, float32 output", wide, "%", better="lower", goal=0.20)
    append_row(
        "loss: bf16 gradient error / TRL chunked", errors["ours"], "%", peer=errors["TRL chunked"], better="lower"
    )
    mine, trl = found["ours"].processor_s, found["TRL chunked"].processor_s
    append_row("loss: bf16 time / TRL chunked", mine, "CPU-s", peer=trl, better="lower", goal=0.6)


def papers_sizes() -> None:
    """The paper's largest heads at its sample length, each in a process of its own, for the peak of all of it."""
    for name, hidden, vocabulary in (("Llama-3.2-1B", 2048, 128_256), ("Gemma-2-2B", 2304, 256_000)):
        command = [sys.executable, "-m", "tests.benchmarks.loss", "--one", str(hidden), str(vocabulary)]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds, peak_gb = map(float, result.stdout.split())
        size = f"2048 tokens of {name} (H={hidden}, V={vocabulary})"
        print(f"  {size}: {seconds:.1f} s", flush=True)
        append_row(f"loss: whole process, {size}", peak_gb, "GB", better="lower", goal=8.0)


def one(hidden: int, vocabulary: int) -> None:
    given = Inputs.random(2048, hidden, vocabulary, torch.bfloat16)
    # Both models have the same frozen head, as a student damaged elsewhere has; one copy is in memory.
    given = Inputs(given.student_NH, given.teacher_NH, given.teacher_VH, given.teacher_VH)
    begun = time.perf_counter()
    ours(given).backward()
    print(time.perf_counter() - begun, _resident_kb("VmHWM") / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--one", type=int, nargs=2, metavar=("HIDDEN", "VOCABULARY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        return one(*arguments.one)
    contenders = {"ours": ours, **peers()}
    speed_and_memory(contenders, arguments.turns)
    accuracy(contenders, arguments.turns)
    return papers_sizes()


if __name__ == "__main__":
    main()
