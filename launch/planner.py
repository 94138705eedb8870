"""Memory of a device, time of a step and device-hours of every layout of a recipe, before anything starts.

What a micro-batch computes and keeps is told by the model itself (recovery.rehearsal); how it is divided over devices
and what DeepSpeed holds beside it is counted here; rates are measured on this host or stand in the cluster's file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.plan_task import Task, sparse_teacher
from recovery.config import HiddenStatesTeacher
from recovery.deepspeed_config import read_deepspeed
from recovery.placement import skeleton
from recovery.rehearsal import Rehearsal, cache_bytes_per_token, rehearse
from recovery.teacher_cache import bytes_per_token

SHIPPED = ("zero1", "zero2", "zero3", "zero3_hpz", "zero3_offload")
REDUCE_ELEMENTS, LIVE_ELEMENTS = 5e8, 1e9
"""DeepSpeed's defaults: of the buffer in which gradients are reduced, of gathered weights that ZeRO-3 keeps for their
next use."""
HEADROOM = 0.9
"""What a device is filled to at the most: predictions are within a tenth (`make bench-plan`)."""
GENERATION_EFFICIENCY = 0.35
"""Share of the roofline that decoding reaches: what the embedded engine does on two cores, an assumption elsewhere."""
HEAP = {"cuda": 0.0, "cpu": 0.8}
"""What a CPU's heap loses to holes, as a share of the activations: glibc places aligned blocks of many sizes badly
(measured with glibc 2.36, `make bench-plan`). torch's allocator of GPUs keeps blocks for what asks again."""
HOST_LINK = 25e9
"""Bytes a second between a GPU and its host's memory, for zero3_offload: PCIe 5 in practice. An assumption."""


@dataclass(frozen=True)
class Layout:
    deepspeed: str
    teacher: str
    checkpointing: bool

    def __str__(self) -> str:
        return f"{Path(self.deepspeed).stem}, {self.teacher}" + (", checkpointing" if self.checkpointing else "")

    @property
    def settings(self) -> str:
        """As --set takes them."""
        given = f"--set train.deepspeed={self.deepspeed} --set teacher='{{kind: {self.teacher}}}'"
        return given + (" --set train.activation_checkpointing=true" if self.checkpointing else "")


@dataclass(frozen=True)
class Zero:
    """What of a DeepSpeed file decides about memory and communication."""

    stage: int
    secondary: int
    """Devices that hold one copy of the weights together (hpZ); 1: there is none."""
    offload_weights: bool
    offload_optimizer: bool
    reduce_elements: float
    live_elements: float

    @classmethod
    def of(cls, name: str) -> Zero:
        given: dict[str, Any] = read_deepspeed(name).get("zero_optimization", {})

        def offloads(part: str) -> bool:
            return given.get(part, {}).get("device", "none") != "none"

        return cls(
            stage=int(given.get("stage", 0)),
            secondary=int(given.get("zero_hpz_partition_size", 1)),
            offload_weights=offloads("offload_param"),
            offload_optimizer=offloads("offload_optimizer"),
            reduce_elements=float(given.get("reduce_bucket_size", REDUCE_ELEMENTS)),
            live_elements=float(given.get("stage3_max_live_parameters", LIVE_ELEMENTS)),
        )


@dataclass(frozen=True)
class Memory:
    """Bytes of one device, by part."""

    student: float
    reference: float
    adapters: float
    """Adapters (or all parameters), their gradients, master weights and moments."""
    activations: float
    """What a micro-batch's forward keeps for its backward, and the holes between."""
    logits: float
    """What is alive beside it at the most: chunks of logits, a layer's inner tensors."""
    buffers: float
    """DeepSpeed's: gathered weights, gradients being reduced."""
    runtime: float
    loading: float
    """All of it while models are loaded: both whole, even if most of their weights are shared afterwards; on a CPU the
    file that one is read from too."""

    @property
    def parts(self) -> dict[str, float]:
        return {name: value for name, value in vars(self).items() if name != "loading"}

    @property
    def peak(self) -> float:
        return max(sum(self.parts.values()), self.loading)


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step."""

    compute: float
    communication: float
    sent: float
    """Bytes that a device sends in it."""

    @property
    def seconds(self) -> float:
        return self.compute + self.communication


@dataclass(frozen=True)
class Prediction:
    layout: Layout
    memory: Memory
    step: Step
    cache_s: float
    train_s: float
    disk: float
    """Bytes of the teacher's cache."""


def memory(task: Task, layout: Layout, rehearsed: Rehearsal) -> Memory:
    zero, width, devices = Zero.of(layout.deepspeed), task.width, task.devices
    all_learn, online = task.recipe.train.parameters == "all", layout.teacher == "online"
    divided, in_pieces = is_divided(task, layout), is_in_pieces(task, layout)
    own, theirs = rehearsed.student, rehearsed.reference
    student, reference = float(own.total), float(theirs.total if online else 0)
    # What a device computes with is whole while it is used.
    # Gradients are reduced in float32; ZeRO-2 alone gathers them in the model's own type before.
    buffers = min(zero.reduce_elements, rehearsed.trainable) * 4
    if task.rates.gpu:
        buffers = buffers + zero.reduce_elements * width if zero.stage == 2 else zero.reduce_elements * 4
    if divided:
        pieces = 1 / devices + (1 / zero.secondary if zero.secondary > 1 else 0)
        models = (own, theirs) if online and in_pieces else (own,)
        gathered = [min(model.total, zero.live_elements * width) for model in models]
        # One model after the other; a CPU's heap does not give back what the first one took.
        buffers += max(gathered) if task.rates.gpu else sum(gathered)
        student *= 0 if zero.offload_weights else pieces
        if in_pieces:
            reference = (0 if zero.offload_weights else reference * pieces) + (theirs.head if online else 0)
    elif online and task.same_share:
        reference -= own.total * task.same_share
    if not online and not task.head_is_same:
        reference += theirs.head
    # Gradients are added up in float32; adapters are no part of the model.
    learning = rehearsed.trainable * (4 + (0 if all_learn else width))
    optimizer = 0 if zero.offload_optimizer and task.rates.gpu else rehearsed.trainable * 16 / devices
    peak = rehearsed.peak(targets_of(layout), online=online)
    whole = (own.total + (theirs.total if online else 0)) / (devices if in_pieces else 1)
    loading = task.rates.runtime + whole + (0 if task.rates.gpu else 2 * own.elements)  # of the file, in bfloat16
    return Memory(
        student=student,
        reference=reference,
        adapters=learning + optimizer,
        activations=rehearsed.kept * (1 + HEAP["cuda" if task.rates.gpu else "cpu"]),
        logits=max(peak - rehearsed.kept, 0),
        buffers=buffers,
        runtime=task.rates.runtime,
        loading=loading,
    )


def targets_of(layout: Layout) -> str:
    return "sparse" if layout.teacher == "sparse_logits" else "dense"


def step(task: Task, layout: Layout, rehearsed: Rehearsal) -> Step:
    """Nothing of the communication is taken to be hidden behind the computation: an upper bound."""
    zero, devices, rates = Zero.of(layout.deepspeed), task.devices, task.rates
    online = layout.teacher == "online"
    phases = rehearsed.phases(targets_of(layout), online=online)
    compute = task.load * sum(task.seconds(name, phase) for name, phase in phases.items())
    if devices == 1:
        return Step(compute, 0.0, 0.0)
    share = (devices - 1) / devices
    link = rates.across_bytes_s if task.hosts > 1 else rates.inside_bytes_s
    assert link is not None, "rates_of has looked for it"
    # Gradients are reduced to their owners, and what was learned is gathered from them.
    sent = share * rehearsed.trainable * (4 + task.width)
    seconds = sent / link
    if zero.stage == 3:
        forward = share * (rehearsed.student.total + (rehearsed.reference.total if online else 0))
        backward = share * rehearsed.student.total
        inside = zero.secondary > 1 and task.hosts > 1 and rates.inside_bytes_s is not None
        sent += task.rounds * (forward + backward)
        seconds += task.rounds * (forward / link + backward / ((rates.inside_bytes_s or link) if inside else link))
        if zero.offload_weights and rates.gpu:
            seconds += task.rounds * (forward + backward) / HOST_LINK / share / devices
    return Step(compute, seconds, sent)


def predict(task: Task, layout: Layout, rehearsed: Rehearsal) -> Prediction:
    recipe, seen = task.recipe, task.tokens
    one, cache, disk = step(task, layout, rehearsed), 0.0, 0.0
    if layout.teacher != "online":
        batches = math.ceil((seen + task.held_out_tokens) / rehearsed.tokens / task.devices)
        cache = batches * task.seconds("teacher", rehearsed.teacher)
        kind = HiddenStatesTeacher() if layout.teacher == "hidden_states" else sparse_teacher(recipe)
        hidden = rehearsed.reference.head // task.width // rehearsed.vocabulary
        disk = seen * bytes_per_token(kind, hidden) + task.held_out_tokens * bytes_per_token(
            HiddenStatesTeacher(), hidden
        )
    looks = 1 + math.ceil(task.steps / recipe.train.evaluate_every)
    # Held-out text is measured by every rank alike.
    measuring = task.seconds("measure", rehearsed.measure)
    measuring *= looks * math.ceil(task.held_out_tokens / rehearsed.tokens)
    return Prediction(layout, memory(task, layout, rehearsed), one, cache, task.steps * one.seconds + measuring, disk)


def generation_rate(task: Task) -> float:
    """Tokens a second of all devices: every decoding step reads the weights and the samples' keys and values."""
    generate, rates = task.recipe.generate, task.rates
    model = skeleton(task.reference.path, None)
    elements = sum(parameter.numel() for parameter in model.parameters())
    together, devices = generate.batch_samples, 1
    if generate.engine == "vllm":
        together, devices = task.sequences, task.serving
    kept = cache_bytes_per_token(model, task.dtype) * generate.max_length / 2
    step_s = max((elements * task.width + together * kept) / rates.bytes_s, 2 * elements * together / rates.flops_s)
    return GENERATION_EFFICIENCY * together * devices / step_s


def layouts(task: Task, checkpointing: bool) -> list[Layout]:
    """The recipe's own, and what else its loss and the number of devices allow."""
    recipe = task.recipe
    names = [recipe.train.deepspeed, *(name for name in SHIPPED if name != recipe.train.deepspeed)]
    if task.devices == 1:
        names = names[:1]
    idle = {"zero3_hpz": task.hosts == 1, "zero3_offload": not task.rates.gpu}
    names = [name for name in names if name == recipe.train.deepspeed or not idle.get(name)]
    teachers = ["online"]
    if recipe.labelled is None and recipe.train.loss.cross_entropy < 1:
        teachers.append("hidden_states")
        plain = recipe.train.loss.kind == "forward_kl" and recipe.train.loss.temperature == 1
        if plain and recipe.train.parameters == "adapters":
            teachers.append("sparse_logits")
    return [Layout(name, teacher, checkpointing) for name in names for teacher in teachers]


def is_divided(task: Task, layout: Layout) -> bool:
    """Whether every device holds a part of the student."""
    return Zero.of(layout.deepspeed).stage == 3 and task.devices > 1


def is_in_pieces(task: Task, layout: Layout) -> bool:
    """Whether no device ever holds a whole model, not while it loads and not of the reference."""
    return is_divided(task, layout) and task.may_be_in_pieces


def rehearsal_of(task: Task, layout: Layout) -> Rehearsal:
    """What a micro-batch does; the same for layouts that divide nothing within it, and remembered."""
    checkpointing, in_pieces = key = layout.checkpointing, is_in_pieces(task, layout)
    if key not in task.rehearsals:
        task.rehearsals[key] = rehearse(task.case, checkpointing=checkpointing, in_pieces=in_pieces)
    return task.rehearsals[key]


def predictions(task: Task, *, own: bool = False) -> list[Prediction]:
    """Of every layout, or of the recipe's own with every teacher; with activation checkpointing too, where nothing
    fits without."""
    found: list[Prediction] = []
    for checkpointing in dict.fromkeys((task.recipe.train.activation_checkpointing, True)):
        for layout in layouts(task, checkpointing):
            if own and layout.deepspeed != task.recipe.train.deepspeed:
                continue
            rehearsed = rehearsal_of(task, layout)
            if targets_of(layout) in rehearsed.loss:
                found.append(predict(task, layout, rehearsed))
        if any(fits(task, one) for one in found):
            break
    return found


def fits(task: Task, prediction: Prediction) -> bool:
    return prediction.memory.peak <= HEADROOM * task.rates.memory


def cheapest(task: Task, found: Iterable[Prediction]) -> Prediction | None:
    """Of those that fit, the one with the fewest device-hours; of equals (to a hundredth) that with least disk."""
    fitting = [one for one in found if fits(task, one)]
    if not fitting:
        return None
    least = min(one.cache_s + one.train_s for one in fitting)
    near = [one for one in fitting if one.cache_s + one.train_s <= 1.01 * least]
    return min(near, key=lambda one: (one.disk, one.memory.peak))
