"""What training works with: models, texts, the teacher, the engine, and the plan of its steps."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from recovery.batches import Step, plan_epoch
from recovery.config import Train, TrainJob
from recovery.corpus import Tokens, read_split
from recovery.engine import Engine, Student, engine_config, forward_only
from recovery.errors import UserError
from recovery.feed import Prepared, prepared, teachers
from recovery.learner import compile_layers, make_learner
from recovery.measure import HeldOut
from recovery.models import check_training_path, checkpoint_activations, device, head_of, load_model, share_equal
from recovery.partition import gather_with_adapters, held_bytes, partitioned_loading, shape_bytes
from recovery.placement import may_be_in_pieces
from recovery.teacher import OnlineTeacher, TeacherSignal
from recovery.texts import read_texts
from recovery.tracking import Tracker

log = logging.getLogger("recover-lora")


def learning_rates(step_tokens: list[int], train: Train) -> list[float]:
    """Of every step: linear warm-up to the peak, then linear decay towards zero (Appendix B of the paper).

    Counted in loss tokens, so that a recipe means the same with steps of another size, and a small step is a small
    part of the way.
    """
    ends = np.cumsum([0, *step_tokens])
    total = int(ends[-1])
    warmup = train.warmup_tokens
    warmup = int(ends[min(train.warmup_steps, len(step_tokens))]) if warmup is None else min(warmup, total)
    rates = []
    for before, end in itertools.pairwise(ends.tolist()):
        share = min(1.0, end / warmup) if before < warmup else (total - before) / (total - warmup)
        rates.append(train.learning_rate * share)
    return rates


def steps_below_the_peak(rates: Sequence[float]) -> int:
    """How many steps the warm-up takes before the whole rate is reached, or the run ends."""
    return max(range(len(rates)), key=rates.__getitem__) if rates else 0


@dataclass
class Run:
    """What the loop works with; made by `set_up`."""

    job: TrainJob
    folder: Path
    rank: int
    ranks: int
    adapted: Any
    student: Student
    engine: Engine
    teacher: TeacherSignal
    tokens: Tokens
    held_out: dict[str, HeldOut]
    plan: list[Step]
    rates: list[float]
    tracker: Tracker
    pending: list[Taken] = field(default_factory=list)
    """Steps whose losses nobody has looked at yet."""

    @property
    def leader(self) -> bool:
        return self.rank == 0

    def feed(self, done: int) -> Generator[Prepared, None, None]:
        """This rank's micro-batches of the steps that are left, made ahead."""
        return prepared(self.tokens, self.teacher, self.plan[done:], self.rank, self.ranks)


@dataclass(frozen=True)
class Taken:
    """A step that was taken; its figures are still on the device, of this rank alone."""

    number: int
    total: Tensor
    norm: Tensor | float


def is_zero3(job: TrainJob) -> bool:
    return job.deepspeed.get("zero_optimization", {}).get("stage") == 3


def set_up(job: TrainJob, folder: Path, rank: int, ranks: int, tracker: Tracker) -> Run:
    corpus = read_texts(job)
    tokens, width = corpus.train, corpus.width
    texts = {"held_out": corpus.held_out}
    if job.contexts is not None:
        texts["contexts"] = read_split(job.contexts.path, "held_out")
    in_pieces = ranks > 1 and is_zero3(job) and all(map(may_be_in_pieces, (job.degraded, job.reference)))
    with partitioned_loading(engine_config(job)) if in_pieces else contextlib.nullcontext():
        degraded = load_model(job.degraded, job.dtype)
        reference = None if job.cache is not None else load_model(job.reference, job.dtype)
    if reference is not None and job.train.parameters == "adapters" and not in_pieces:
        shared = share_equal(degraded, reference)
        log.info("%.0f MB of weights are the same in both models and held once", shared / 1e6)
    adapted = make_learner(job, degraded)
    if job.train.activation_checkpointing:
        checkpoint_activations(adapted)
    if job.train.compile:
        compile_layers(adapted)
    student = Student(adapted, width)
    if student.trainable_head and is_zero3(job) and ranks > 1:
        # Ranks would gather the head as often as they have chunks of tokens, which differ.
        found = f"ZeRO-3 on {ranks} ranks, with a head that learns"
        raise UserError("train.deepspeed", found, "use zero1 or zero2, or leave the head alone")
    if not in_pieces:  # in what ZeRO-3 gathers as a whole no part runs by itself
        check_training_path(adapted, width, "models.degraded")
    if is_zero3(job) and gather_with_adapters(adapted):
        degraded.enable_input_require_grads()  # else the first of them are let go before their gradients are made
    engine = Engine(student, job)
    if in_pieces:
        check_training_path(adapted, width, "models.degraded")
    online = None
    if reference is not None:
        hidden = forward_only(reference, job) if in_pieces else None
        check_training_path(reference, width, "models.reference")
        online = OnlineTeacher(reference, width, hidden)
    if in_pieces:
        held, whole = held_bytes(adapted), sum(shape_bytes(parameter) for parameter in adapted.parameters())
        log.info("every model is held in pieces: %.2f of the student's %.2f MB on a rank", held / 1e6, whole / 1e6)
    teacher, measuring = teachers(job, online, width, tokens, texts, head_of(adapted, width))
    held_out = {
        name: HeldOut(text, measuring[name], device(), job.train.micro_batch_tokens, keep=job.cache is None)
        for name, text in texts.items()
    }
    budgets = job.train.batch_tokens, job.train.micro_batch_tokens
    plan = [
        step
        for epoch in range(job.train.epochs)
        for step in plan_epoch(tokens.lengths, tokens.skip, job.seed, epoch, *budgets)
    ]
    if any(step.loss_tokens == 0 for step in plan):
        raise UserError(str(job.corpus.path), "samples of one token, which carry no loss", "raise generate.max_length")
    rates = learning_rates([step.loss_tokens for step in plan], job.train)
    return Run(job, folder, rank, ranks, adapted, student, engine, teacher, tokens, held_out, plan, rates, tracker)
