"""`recover-lora plan` in words: the table of all layouts, what is recommended and why not the others."""

from __future__ import annotations

import math
from pathlib import Path

from launch.cluster import Cluster
from launch.plan_task import Task, task_of
from launch.planner import Layout, Prediction, cheapest, fits, generation_rate, predictions, rehearsal_of, step
from launch.recipe import Recipe
from recovery.errors import UserError

SCALING = (8, 16, 32, 64, 128, 256, 512, 1024)
LEGEND = """student to runtime: memory of a device by part (adapters: with gradients, master weights and moments;
logits: with a layer's inner tensors; buffers: DeepSpeed's); the peak may come earlier, while both models are loaded.
of it sent: share of a step in communication, none of it taken to be hidden. device-hours: cache and training."""
ASSUMED = (
    "Assumed: every device as fast as the cluster's file says, no waiting for the slowest, nothing of the\n"
    "communication hidden, a bus bandwidth between hosts that does not fall with their number."
)


def plan_text(recipe: Recipe, cluster: Cluster, nodes: int | None, corpus: Path | None, *, own: bool = False) -> str:
    """own: of the recipe's own DeepSpeed file only."""
    task = task_of(recipe, cluster, nodes, corpus)
    found = predictions(task, own=own)
    train = recipe.train
    about = (
        f"corpus: {task.tokens:,} tokens ({task.tokens_source}), {in_bytes(4 * task.tokens)}; {train.epochs} epochs of "
        f"{math.ceil(task.tokens / train.batch_tokens):,} steps of {train.batch_tokens:,} tokens; {task.rounds} "
        f"micro-batches of {task.micro_tokens:,} tokens a device and step"
    )
    hardware = f"{_count(task.hosts, 'host')} x {_count(task.per_host, 'device')}"
    lines = [
        f"{recipe.name} on {cluster.name}: {hardware}, {task.dtype}; all predicted",
        task.rates.source,
        about,
        _generation(task),
        *_idle(task),
        "",
        _table(task, found),
        "",
        LEGEND,
        "",
        *_advice(task, found),
    ]
    return "\n".join(lines)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _generation(task: Task) -> str:
    rate = generation_rate(task)
    seconds = task.tokens / rate
    devices = task.serving if task.recipe.generate.engine == "vllm" else 1
    return (
        f"its generation ({task.recipe.generate.engine}, {_count(devices, 'device')}): {rate:,.0f} tokens/s, "
        f"{duration(seconds)}, {seconds * devices / 3600:.3g} device-hours"
    )


def _idle(task: Task) -> list[str]:
    groups = math.ceil(task.recipe.train.batch_tokens / task.micro_tokens)
    if groups >= task.devices:
        return []
    wanted = f"raise train.batch_tokens to {task.devices * task.micro_tokens:,} or lower train.micro_batch_tokens"
    return [f"NOTE  a step has {groups} micro-batches for {task.devices} devices, so others wait: {wanted}"]


def _table(task: Task, found: list[Prediction]) -> str:
    parts = ("student", "reference", "adapters", "activations", "logits", "buffers", "runtime")
    head = ("layout", *parts, "peak", "", "step", "of it sent", "tokens/s", "cache", "disk", "device-hours")
    rows: list[tuple[str, ...]] = [head]
    for one in found:
        shown = one.memory.parts
        rate = task.recipe.train.batch_tokens / one.step.seconds
        share = one.step.communication / one.step.seconds
        hours = (one.cache_s + one.train_s) * task.devices / 3600
        rows.append(
            (
                str(one.layout),
                *(in_bytes(shown[part]) for part in parts),
                in_bytes(one.memory.peak),
                "fits" if fits(task, one) else "TOO MUCH",
                f"{one.step.seconds:.3g} s",
                f"{share:.0%}",
                f"{rate:,.0f}",
                duration(one.cache_s),
                in_bytes(one.disk),
                f"{hours:.3g}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _advice(task: Task, found: list[Prediction]) -> list[str]:
    best = cheapest(task, found)
    room = in_bytes(task.rates.memory)
    if best is None:
        least = min(found, key=lambda one: one.memory.peak)
        largest = max(least.memory.parts.items(), key=lambda part: part[1])[0]
        nearest = f"nearest: {least.layout} with {in_bytes(least.memory.peak)}, most of it {largest}"
        return [f"nothing fits into {room} of a device; {nearest}; use more devices, or lower train.micro_batch_tokens"]
    hours = (best.cache_s + best.train_s) * task.devices / 3600
    lines = [
        f"recommended: {best.layout} ({in_bytes(best.memory.peak)} of {room}, {hours:.3g} device-hours)",
        f"  {best.layout.settings}",
    ]
    for one in found:
        if one is best:
            continue
        if not fits(task, one):
            largest, size = max(one.memory.parts.items(), key=lambda part: part[1])
            reason = f"needs {in_bytes(one.memory.peak)}, {in_bytes(size)} of it {largest}"
        else:
            more = (one.cache_s + one.train_s) / (best.cache_s + best.train_s) - 1
            sent = one.step.communication - best.step.communication
            why = "sends more" if sent > 0.5 * (one.step.seconds - best.step.seconds) > 0 else "computes more"
            reason = f"{more:+.0%} of the time: {why}" if more >= 0.01 else "as fast, with more memory"
        lines.append(f"  not {one.layout}: {reason}")
    return lines


def scaling_text(recipe: Recipe, cluster: Cluster) -> str:
    """Tokens a second for 8 to 1024 devices of the cluster's kind, each with as much work as on the smallest."""
    start = task_of(recipe, cluster, 1, None)
    per_device = max(recipe.train.batch_tokens // SCALING[0], start.micro_tokens)
    lines = [
        f"{recipe.name} on hosts of {cluster.name}, {per_device:,} tokens a device and step; all predicted",
        f"{'devices':>8} {'step':>9} {'of it sent':>11} {'tokens/s':>12} {'efficiency':>11}",
    ]
    layout = Layout(recipe.train.deepspeed, recipe.teacher.kind, recipe.train.activation_checkpointing)
    rehearsed, first = rehearsal_of(start, layout), None
    for devices in SCALING:
        hosts = max(devices // cluster.processes, 1)
        batch = per_device * devices
        wider = recipe.model_copy(update={"train": recipe.train.model_copy(update={"batch_tokens": batch})})
        task = task_of(wider, cluster, hosts, None)
        if task.devices != devices:
            raise UserError(
                f"cluster {cluster.name}", f"{cluster.processes} processes", f"they do not divide {devices}"
            )
        one = step(task, layout, rehearsed)
        rate = batch / one.seconds
        first = first or rate / devices
        share = one.communication / one.seconds
        lines.append(
            f"{devices:>8} {one.seconds:>7.3g} s {share:>11.1%} {rate:>12,.0f} {rate / devices / first:>11.1%}"
        )
    lines.append(f"{layout}. {ASSUMED}")
    return "\n".join(lines)


def in_bytes(count: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.0f} kB" if count else "-"


def duration(seconds: float) -> str:
    if not seconds:
        return "-"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
