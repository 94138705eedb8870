"""Train: LoRA adapters on the degraded model by logit distillation, KL(reference || degraded + adapter).

    python -m recovery.train JOB
    torchrun --nproc-per-node 8 --module recovery.train JOB

Goes on from its last checkpoint after any kill, with the same losses. The artifact's folder is a PEFT adapter (a whole
checkpoint where all parameters learn), with
`history.jsonl` (one line a step), `held_out.jsonl` (measurements) and `metrics.jsonl` (as MLflow got them).
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch.profiler import record_function

from recovery.adapters import adapter_parameters
from recovery.artifacts import Workspace, read_manifest
from recovery.batches import collate, idle_share
from recovery.checkpoint import load_checkpoint, save_checkpoint
from recovery.communication import Communication
from recovery.config import TrainJob
from recovery.engine import start_distributed
from recovery.errors import Unavailable
from recovery.feed import Prepared
from recovery.files import HELD_OUT, HISTORY, held_out_lines, sync_file, write_atomic
from recovery.learner import save_learner
from recovery.measure import Measurement
from recovery.models import device, of_all_ranks
from recovery.progress import progress
from recovery.stage import run_stage
from recovery.stopping import Stopping
from recovery.tracking import Tracker
from recovery.training_run import Run, Taken, set_up, steps_below_the_peak
from recovery.watch import Watch, advice, advice_on_warmup, line_of

log = logging.getLogger("recover-lora")
CHECKPOINTS = ".checkpoints"
BEST = ".best"


def resume(run: Run) -> int:
    """Restore the last good checkpoint; returns the number of steps that are done."""
    found = load_checkpoint(run.folder / CHECKPOINTS)
    seen = of_all_ranks(-1 if found is None else found[0], run.ranks)
    if len(set(seen)) > 1:  # before restoring, which all ranks do together
        steps = ", ".join("none" if step < 0 else f"step {step}" for step in seen)
        raise Unavailable(f"the ranks see other checkpoints than each other ({steps}): try again later")
    done = 0
    if found is not None:
        done, state = found
        rows = run.plan[0].micro_batches[0]
        batch = collate(run.tokens, rows).to(device())
        run.engine.restore(state, done, batch, run.teacher.targets(batch, run.teacher.fetch(rows)))
        log.info("going on after step %d of %d", done, len(run.plan))
    if run.leader:
        for name in (HISTORY, HELD_OUT):
            _keep_until(run.folder / name, done if found is not None else -1)
    return done


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines of steps that will be done again."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = []
    for line in lines:
        with contextlib.suppress(ValueError):  # a kill may have cut the last line
            if json.loads(line)["step"] <= step:
                kept.append(line)
    write_atomic(path, "".join(line + "\n" for line in kept))


def train_step(run: Run, number: int, feed: Iterator[Prepared]) -> None:
    """One optimizer step; its loss and norm stay on the device, in `run.pending`."""
    step = run.plan[number]
    mine = step.of_rank(run.rank, run.ranks)
    total = torch.zeros((), device=device())
    for position in range(len(mine)):
        with record_function("data"):
            host, fetched = next(feed)
        batch = host.to(device())
        with record_function("teacher"):
            targets = run.teacher.targets(batch, fetched)
        total += run.engine.backward(batch, targets, step.loss_tokens, last=position == len(mine) - 1)
    with record_function("optimizer"):
        norm = run.engine.step(run.rates[number])
    run.pending.append(Taken(number, total, norm))


def look(run: Run) -> list[dict[str, float]]:
    """The history's lines of the pending steps: the one place where the host waits for the device.

    Raises RuntimeError for a loss or norm that is not finite, before any checkpoint could hold its weights.
    """
    if not run.pending:
        return []
    totals = torch.stack([taken.total for taken in run.pending])
    torch.distributed.all_reduce(totals)
    lines = []
    for taken, total in zip(run.pending, totals.tolist(), strict=True):
        step = run.plan[taken.number]
        loss, norm = total / step.loss_tokens, float(taken.norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            rows = sorted(row for batch_rows in step.micro_batches for row in batch_rows)
            raise Unavailable(
                f"loss {loss}, gradient norm {norm} at step {taken.number + 1}, samples {rows}; nothing was saved "
                "over; lower train.learning_rate"
            )
        lines.append(
            {
                "step": taken.number + 1,
                "loss": loss,
                "learning_rate": run.rates[taken.number],
                "grad_norm": norm,
                "loss_tokens": step.loss_tokens,
            }
        )
    run.pending.clear()
    return lines


def measure_held_out(run: Run, step: int, tokens: int) -> dict[str, Measurement]:
    """KL, top-1 agreement and perplexity now, on every held-out text; written and tracked by the leader."""
    results = {}
    for name, text in run.held_out.items():
        results[name] = text.measure(run.student.whole_head, run.engine.hidden)
    if run.leader:
        with (run.folder / HELD_OUT).open("a") as file:
            for name, result in results.items():
                file.write(line_of(result, step, tokens, name))
                values = {"kl": result.kl, "top1": result.top1, "perplexity": result.perplexity}
                run.tracker.metrics({f"eval/{name}_{key}": value for key, value in values.items()}, step)
        shown = ", ".join(f"{name} KL {result.kl:.4f}, top-1 {result.top1:.1%}" for name, result in results.items())
        log.info("step %d of %d: %s", step, len(run.plan), shown)
    return results


def train(run: Run, workspace: Workspace | None, stopping: Stopping) -> Watch:
    """The loop: steps, and at their intervals a look at the losses, measurements and checkpoints.

    Raises KeyboardInterrupt, with everything saved, when SIGTERM asked for the end.
    """
    done, settings = resume(run), run.job.train
    ends = np.cumsum([0, *(step.loss_tokens for step in run.plan)]).tolist()
    if done == 0:
        measure_held_out(run, 0, 0)
        if run.job.start is not None:
            keep_weights(run, 0)
    watch = Watch.of(run.folder, leader=run.leader)
    bar = progress(ends[-1], "tok", "train", ends[done]) if run.leader else None
    feed, clock = run.feed(done), time.monotonic()
    for number in range(done, len(run.plan)):
        if watch.has_stagnated(settings.patience):
            log.info("stopped after step %d: %d measurements without a better one", number, settings.patience)
            break
        answer = stopping.ask()
        if run.ranks > 1 and number == done + 1:
            with Communication() as communication:
                train_step(run, number, feed)
            run.tracker.metrics({"perf/communication_share": communication.share}, number + 1)
        else:
            train_step(run, number, feed)
        step, tokens, stopped = number + 1, ends[number + 1], answer()
        if bar is not None:
            bar.update(tokens - ends[number])
        last = step == len(run.plan)
        evaluate = last or step % settings.evaluate_every == 0
        checkpoint = last or stopped or step % settings.checkpoint_every == 0
        if evaluate or checkpoint or step % settings.log_every == 0:
            lines = look(run)
            if run.leader:
                keep(run, lines, ends, time.monotonic() - clock)
            if bar is not None:
                bar.set_postfix_str(f"loss {lines[-1]['loss']:.3f}")
            clock = time.monotonic()
        if evaluate:
            if watch.take(step, measure_held_out(run, step, tokens)["held_out"].kl):
                keep_weights(run, step)
            if run.leader and (hint := advice(watch.kls)):
                log.warning(hint)
        if checkpoint or (evaluate and watch.has_stagnated(settings.patience)):
            write_checkpoint(run, step, watch, workspace)
            if stopped and not last:
                log.info("asked to stop: saved after step %d of %d", step, len(run.plan))
                torch.distributed.barrier()  # the others end no sooner than the leader has saved
                raise KeyboardInterrupt
        if evaluate or checkpoint:
            clock = time.monotonic()
    if bar is not None:
        bar.close()
    return watch


def write_checkpoint(run: Run, step: int, watch: Watch, workspace: Workspace | None) -> None:
    """Save the state after `step` steps. Every rank must call it; the leader has the workspace."""
    began = time.monotonic()
    state = run.engine.state()
    if workspace is not None:
        for name in (HISTORY, HELD_OUT):  # a checkpoint never outlives the lines that it goes on from
            sync_file(run.folder / name)
        save_checkpoint(run.folder / CHECKPOINTS, step, state)
        # Not before: after a kill the steps behind the checkpoint are measured again.
        wanted = {best_path(run.folder, watch.best_until(kept)) for kept in checkpoint_steps(run.folder)}
        for path in set((run.folder / BEST).glob("step-*.safetensors")) - wanted:
            path.unlink()
        workspace.tick()
    run.tracker.metrics({"perf/checkpoint_seconds": time.monotonic() - began}, step)


def keep(run: Run, lines: list[dict[str, float]], ends: list[int], seconds: float) -> None:
    """Write the lines into the history, and track them. seconds: what these steps took together."""
    speed = sum(line["loss_tokens"] for line in lines) / seconds
    with (run.folder / HISTORY).open("a") as file:
        for line in lines:
            step = int(line["step"])
            # Without times, so that equal runs have equal files; speeds stand in metrics.jsonl.
            file.write(json.dumps({"tokens": ends[step], **line}) + "\n")
            log.debug("step %d/%d loss %.5f grad %.3f", step, len(run.plan), line["loss"], line["grad_norm"])
            values = {
                "loss/train": line["loss"],
                "optim/learning_rate": line["learning_rate"],
                "optim/grad_norm": line["grad_norm"],
                "perf/tokens_per_second": speed,
                "data/tokens": ends[step],
            }
            run.tracker.metrics(values, step)


def keep_weights(run: Run, step: int) -> None:
    """Write the adapters as they are now, as the best so far. Every rank must call it."""
    weights = run.engine.weights()
    if run.leader:
        path = best_path(run.folder, step)
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, save(weights))


def checkpoint_steps(folder: Path) -> list[int]:
    """Of the checkpoints that are kept; a run may go on from either."""
    return [int(note.stem.removeprefix("step-")) for note in (folder / CHECKPOINTS).glob("step-*.json")]


def best_path(folder: Path, step: int) -> Path:
    return folder / BEST / f"step-{step:08d}.safetensors"


def check_better(watch: Watch, job: TrainJob) -> None:
    """Raise Unavailable where training found nothing better than the degraded model: no adapter is delivered then."""
    degraded = watch.kls[0]
    if job.start is not None:
        degraded = held_out_lines(job.start.path)[0]["kl"]
    best = watch.kls[watch.best]
    if best >= degraded:
        raise Unavailable(
            f"held-out KL was never below the degraded model's {degraded:.4f} (at best {best:.4f}): no adapter is "
            "delivered; lower train.learning_rate, or set adapter.init: closed_form_sequential"
        )


@contextlib.contextmanager
def _tracker(job: TrainJob, folder: Path, leader: bool) -> Iterator[Tracker]:
    with Tracker(job.runtime.tracking if leader else None, folder / "metrics.jsonl" if leader else None) as tracker:
        yield tracker


def produce(job: TrainJob, workspace: Workspace) -> dict[str, Any]:
    rank, ranks = start_distributed()
    leader = rank == 0
    with _tracker(job, workspace.path, leader) as tracker:
        run = set_up(job, workspace.path, rank, ranks, tracker)
        parameters = adapter_parameters(run.student)
        start = {} if job.start is None else read_manifest(job.start.path)["details"]
        counts = {
            "loss_tokens": sum(step.loss_tokens for step in run.plan),
            "calibration_tokens": start.get("calibration_tokens", 0),
            "steps": len(run.plan),
            "warmup_steps": steps_below_the_peak(run.rates),
            "trainable_parameters": sum(getattr(p, "ds_numel", p.numel()) for p in parameters.values()),
            "adapted_modules": len(parameters) // 2 if job.train.parameters == "adapters" else len(parameters),
            "ranks": ranks,
            "padding_share": 0.0,
            "idle_share": round(idle_share(run.plan, run.tokens.lengths, job.train.micro_batch_tokens), 4),
        }
        log.info(
            "%(trainable_parameters)d trainable parameters, %(steps)d steps, %(loss_tokens)d loss tokens; no padding, "
            "%(idle_share).1f%% of the room for micro-batches unused",
            {**counts, "idle_share": 100 * counts["idle_share"]},
        )
        if leader and (said := advice_on_warmup(counts)):
            log.warning("%s", said)
        if run.student.trainable_head:
            log.info("the head learns too: its loss goes through autograd, with two products more")
        with Stopping() as stopping:
            watch = train(run, workspace if leader else None, stopping)
        check_better(watch, job)
        taken = watch.steps[-1]
        counts |= {"best_step": watch.best_step, "steps_taken": taken}
        counts["loss_tokens"] = sum(step.loss_tokens for step in run.plan[:taken])
        prefix = "adapted."
        if leader:
            kept = load_file(best_path(workspace.path, watch.best_step))
            master = {name.removeprefix(prefix): tensor for name, tensor in kept.items()}
            save_learner(job, run.adapted, master, workspace.path)
        torch.distributed.barrier()
    return counts


if __name__ == "__main__":
    run_stage(TrainJob, produce, resumable=True, description=__doc__ or "")
