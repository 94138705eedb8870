"""What each kind of teacher costs for a recipe, before anything is made: disk, memory and time, predicted."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from launch.cluster import Cluster, compute_dtype, uses_gpu
from launch.recipe import Recipe
from recovery.config import Dtype, HiddenStatesTeacher, ModelInput, SparseLogitsTeacher
from recovery.corpus import SUMMARY
from recovery.files import read_json
from recovery.placement import skeleton
from recovery.teacher_cache import bytes_per_token

EFFICIENCY = 0.6
"""Share of the measured matrix-product rate that a whole model reaches."""


@dataclass(frozen=True)
class Size:
    """One model: parameters of its layers, and of its head."""

    body: int
    hidden: int
    vocabulary: int

    @property
    def head(self) -> int:
        return self.hidden * self.vocabulary

    @classmethod
    def of(cls, model: ModelInput) -> Size:
        network = skeleton(model.path, model.revision)
        config = network.config.get_text_config()
        outside = {id(parameter) for parameter in network.get_input_embeddings().parameters()}
        outside |= {id(parameter) for parameter in network.get_output_embeddings().parameters()}
        body = sum(parameter.numel() for parameter in network.parameters() if id(parameter) not in outside)
        return cls(body, int(config.hidden_size), int(config.vocab_size))


@dataclass(frozen=True)
class Cost:
    kind: str
    disk_bytes: float
    reference_bytes: float
    """Memory that the reference takes while training, on each device."""
    cache_flops: float
    training_flops: float


def costs(recipe: Recipe, reference: Size, student: Size, tokens: int, dtype: Dtype) -> list[Cost]:
    """Of every kind, for a corpus of `tokens` loss tokens. Forward 2 FLOPs a parameter and token, backward 2 more."""
    width = 2 if dtype == "bfloat16" else 4
    given = recipe.teacher
    hidden = given if isinstance(given, HiddenStatesTeacher) else HiddenStatesTeacher()
    sparse = given if isinstance(given, SparseLogitsTeacher) else SparseLogitsTeacher()
    seen = tokens * recipe.train.epochs
    learning = seen * (4 * student.body + 4 * student.head)
    forward, logits = 2 * reference.body, 2 * reference.head
    states = bytes_per_token(hidden, reference.hidden)
    drawn = 0 if sparse.captured else tokens * (forward + logits)
    return [
        Cost("online", 0, width * (reference.body + reference.head), 0, learning + seen * (forward + logits)),
        Cost("hidden_states", tokens * states, width * reference.head, tokens * forward, learning + seen * logits),
        Cost("sparse_logits", tokens * bytes_per_token(sparse, 0), width * reference.head, drawn, learning),
    ]


def matrix_rate(dtype: Dtype, gpu: bool) -> float:
    """FLOP/s of one device of this machine in large matrix products, measured for half a second."""
    import torch

    device, size = ("cuda", 8192) if gpu else ("cpu", 1024)
    left = torch.randn(size, size, device=device).to(torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    torch.mm(left, left)
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < 0.5:
        torch.mm(left, left)
        if gpu:
            torch.cuda.synchronize()
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - begun)


def corpus_tokens(recipe: Recipe, corpus: Path) -> tuple[int, str]:
    """(tokens of the training split, where the number is from)."""
    summary = corpus / SUMMARY
    if summary.is_file():
        return int(read_json(summary)["train"]["tokens"]), "of the corpus"
    return recipe.generate.samples * recipe.generate.max_length, "at most: the corpus is not there yet"


def teacher_table(recipe: Recipe, reference: ModelInput, student: ModelInput, corpus: Path, cluster: Cluster) -> str:
    """The three kinds side by side, for `recover-lora cache RECIPE --dry-run`."""
    dtype = compute_dtype(recipe.models.dtype, cluster)
    tokens, source = corpus_tokens(recipe, corpus)
    rate = matrix_rate(dtype, uses_gpu(cluster))
    effective = EFFICIENCY * rate * cluster.processes
    about = (
        f"teacher signal for {tokens:,} tokens ({source}), {recipe.train.epochs} epochs; times are predictions from "
        f"{rate / 1e9:,.0f} GFLOP/s measured here in {dtype}, {EFFICIENCY:.0%} of it in use, on {cluster.processes} "
        "devices"
    )
    head = f"  {'teacher.kind':<14} {'disk':>10} {'bytes/token':>12} {'memory':>10} {'to make':>10} {'to train':>10}"
    lines = [about, head]
    for cost in costs(recipe, Size.of(reference), Size.of(student), tokens, dtype):
        chosen = "*" if cost.kind == recipe.teacher.kind else " "
        lines.append(
            f"{chosen} {cost.kind:<14} {_size(cost.disk_bytes):>10} {cost.disk_bytes / max(tokens, 1):>12,.0f} "
            f"{_size(cost.reference_bytes):>10} {_duration(cost.cache_flops / effective):>10} "
            f"{_duration(cost.training_flops / effective):>10}"
        )
    lines.append("  memory: what the reference takes on each device while training; * the recipe's choice")
    return "\n".join(lines)


def _size(count: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.0f} kB" if count else "-"


def _duration(seconds: float) -> str:
    if not seconds:
        return "-"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
