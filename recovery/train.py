"""Train: LoRA adapters on the degraded model by logit distillation, KL(reference || degraded + adapter).

    python -m recovery.train JOB
    torchrun --nproc-per-node 8 --module recovery.train JOB

Goes on from its last checkpoint after any kill, with the same losses. The artifact's folder is a PEFT adapter, with
`history.jsonl` (one line a step), `held_out.jsonl` (measurements) and `metrics.jsonl` (as MLflow got them).
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from recovery.adapters import adapter_parameters, add_adapter, save_adapter
from recovery.artifacts import Workspace
from recovery.batches import Step, collate, plan_epoch
from recovery.checkpoint import load_checkpoint, save_checkpoint
from recovery.config import Train, TrainJob
from recovery.corpus import TOKENIZER, Tokens, check_ids, read_split
from recovery.engine import Engine, Student, start_distributed
from recovery.errors import UserError
from recovery.files import write_atomic
from recovery.measure import HeldOut, Measurement
from recovery.models import TORCH_DTYPES, check_training_path, device, load_model
from recovery.progress import progress
from recovery.stage import run_stage
from recovery.teacher import OnlineTeacher, TeacherSignal
from recovery.tracking import Tracker
from recovery.vocabulary import compare, load_vocabulary, used_width

log = logging.getLogger("recover-lora")
CHECKPOINTS = ".checkpoints"


def learning_rate(step: int, steps: int, train: Train) -> float:
    """Of step 0..steps-1: linear warm-up to the peak, then linear decay towards zero (Appendix B of the paper)."""
    warmup = min(train.warmup_steps, steps)
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    return train.learning_rate * (steps - step) / max(1, steps - warmup)


def advice(kls: list[float]) -> str | None:
    """What the latest held-out KLs say while training goes on, if anything is wrong."""
    if len(kls) >= 3 and kls[-1] > kls[-2] > kls[-3]:
        return "held-out KL has risen twice in a row: overfitting, or too high a learning rate"
    if len(kls) >= 4 and min(kls[-3:]) > 0.99 * min(kls[:-3]):
        return "held-out KL stagnates: more rank, another placement or more data would be needed"
    return None


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
    tracker: Tracker

    @property
    def leader(self) -> bool:
        return self.rank == 0


def set_up(job: TrainJob, folder: Path, rank: int, ranks: int, tracker: Tracker) -> Run:
    vocabulary = load_vocabulary(job.reference.path, job.reference.revision)
    width = used_width(vocabulary, load_vocabulary(job.degraded.path, job.degraded.revision))
    compare(vocabulary, load_vocabulary(str(job.corpus.path / TOKENIZER), model=False), str(job.corpus.path))
    tokens = read_split(job.corpus.path, "train")
    check_ids(tokens, width, str(job.corpus.path))
    reference = load_model(job.reference, job.dtype)
    check_training_path(reference, width, "models.reference")
    adapted = add_adapter(load_model(job.degraded, job.dtype), job.adapter, job.seed)
    check_training_path(adapted, width, "models.degraded")
    if job.train.activation_checkpointing:
        adapted.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        adapted.train()
    student = Student(adapted, width)
    teacher = OnlineTeacher(reference, width)
    texts = {"held_out": read_split(job.corpus.path, "held_out")}
    if job.contexts is not None:
        texts["contexts"] = read_split(job.contexts.path, "held_out")
    held_out = {
        name: HeldOut(text, teacher, device(), job.train.micro_batch_tokens, keep=True) for name, text in texts.items()
    }
    plan = [
        step
        for epoch in range(job.train.epochs)
        for step in plan_epoch(
            tokens.lengths, tokens.skip, job.seed, epoch, job.train.batch_tokens, job.train.micro_batch_tokens
        )
    ]
    if any(step.loss_tokens == 0 for step in plan):
        raise UserError(str(job.corpus.path), "samples of one token, which carry no loss", "raise generate.max_length")
    engine = Engine(student, job)
    return Run(job, folder, rank, ranks, adapted, student, engine, teacher, tokens, held_out, plan, tracker)


def resume(run: Run) -> int:
    """Restore the last good checkpoint; returns the number of steps that are done."""
    found = load_checkpoint(run.folder / CHECKPOINTS)
    done = 0
    if found is not None:
        done, state = found
        batch = collate(run.tokens, run.plan[0].micro_batches[0], device())
        run.engine.restore(state, done, batch, run.teacher.hidden(batch), run.teacher.head)
        log.info("going on after step %d of %d", done, len(run.plan))
    if run.leader:
        for name in ("history.jsonl", "held_out.jsonl"):
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


def train_step(run: Run, number: int) -> dict[str, float]:
    """One optimizer step; returns its line for the history."""
    started = time.monotonic()
    step = run.plan[number]
    mine = step.of_rank(run.rank, run.ranks)
    total = torch.zeros((), device=device())
    for position, rows in enumerate(mine):
        # A rank without a micro-batch of its own runs one without loss, so that all reduce together.
        batch = collate(run.tokens, rows or step.micro_batches[0], device())
        if not rows:
            batch.mask_BT[:] = False
        reference_NG = run.teacher.hidden(batch)
        total += run.engine.backward(
            batch, reference_NG, run.teacher.head, step.loss_tokens, last=position == len(mine) - 1
        )
    rate = learning_rate(number, len(run.plan), run.job.train)
    norm = run.engine.step(rate)
    torch.distributed.all_reduce(total)
    loss = float(total) / step.loss_tokens
    if not (math.isfinite(loss) and math.isfinite(norm)):
        rows = sorted(row for batch_rows in step.micro_batches for row in batch_rows)
        raise RuntimeError(
            f"loss {loss}, gradient norm {norm} at step {number + 1}, samples {rows}; nothing was saved over"
        )
    seconds = time.monotonic() - started
    return {
        "loss": loss,
        "learning_rate": rate,
        "grad_norm": norm,
        "loss_tokens": step.loss_tokens,
        "tokens_per_second": step.loss_tokens / seconds,
    }


def measure_held_out(run: Run, step: int, tokens: int) -> dict[str, Measurement]:
    """KL, top-1 agreement and perplexity now, on every held-out text; written and tracked by the leader."""
    results = {}
    for name, text in run.held_out.items():
        results[name] = text.measure(run.student.whole_head, run.engine.hidden)
    if run.leader:
        with (run.folder / "held_out.jsonl").open("a") as file:
            for name, result in results.items():
                line = {
                    **asdict(result),
                    "step": step,
                    "tokens": tokens,
                    "split": name,
                    "measured_tokens": result.tokens,
                }
                file.write(json.dumps(line) + "\n")
                values = {"kl": result.kl, "top1": result.top1, "perplexity": result.perplexity}
                run.tracker.metrics({f"eval/{name}_{key}": value for key, value in values.items()}, step)
        shown = ", ".join(f"{name} KL {result.kl:.4f}, top-1 {result.top1:.1%}" for name, result in results.items())
        log.info("step %d of %d: %s", step, len(run.plan), shown)
    return results


def train(run: Run, workspace: Workspace | None) -> None:
    """The loop: every step's line, measurements and checkpoints at their intervals."""
    done = resume(run)
    tokens_before = [0]
    for step in run.plan:
        tokens_before.append(tokens_before[-1] + step.loss_tokens)
    if done == 0:
        measure_held_out(run, 0, 0)
    bar = progress(tokens_before[-1], "tok", "train", tokens_before[done]) if run.leader else None
    kls = _earlier_kls(run.folder / "held_out.jsonl") if run.leader else []
    for number in range(done, len(run.plan)):
        line = train_step(run, number)
        step, tokens = number + 1, tokens_before[number + 1]
        if run.leader:
            with (run.folder / "history.jsonl").open("a") as file:
                # Without times, so that equal runs have equal files; speeds stand in metrics.jsonl.
                kept = {key: value for key, value in line.items() if key != "tokens_per_second"}
                file.write(json.dumps({"step": step, "tokens": tokens, **kept}) + "\n")
            track_step(run, step, tokens, line)
        if bar is not None:
            bar.update(int(line["loss_tokens"]))
            bar.set_postfix_str(f"KL {line['loss']:.3f}")
        last = step == len(run.plan)
        if step % run.job.train.evaluate_every == 0 or last:
            kls.append(measure_held_out(run, step, tokens)["held_out"].kl)
            if run.leader and (hint := advice(kls)):
                log.warning(hint)
        if step % run.job.train.checkpoint_every == 0 or last:
            state = run.engine.state()
            if run.leader:
                save_checkpoint(run.folder / CHECKPOINTS, step, state)
                assert workspace is not None
                workspace.tick()
    if bar is not None:
        bar.close()


def _earlier_kls(path: Path) -> list[float]:
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line["kl"] for line in lines if line["split"] == "held_out"]


def track_step(run: Run, step: int, tokens: int, line: dict[str, float]) -> None:
    log.debug(
        "step %d/%d tokens %d loss %.5f lr %.3e grad %.3f %.0f tok/s",
        *(
            step,
            len(run.plan),
            tokens,
            line["loss"],
            line["learning_rate"],
            line["grad_norm"],
            line["tokens_per_second"],
        ),
    )
    run.tracker.metrics(
        {
            "loss/train": line["loss"],
            "optim/learning_rate": line["learning_rate"],
            "optim/grad_norm": line["grad_norm"],
            "perf/tokens_per_second": line["tokens_per_second"],
            "data/tokens": tokens,
        },
        step,
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
        counts = {
            "loss_tokens": sum(step.loss_tokens for step in run.plan),
            "calibration_tokens": 0,
            "steps": len(run.plan),
            "trainable_parameters": sum(getattr(p, "ds_numel", p.numel()) for p in parameters.values()),
            "adapted_modules": len(parameters) // 2,
            "ranks": ranks,
        }
        log.info(
            "%(trainable_parameters)d trainable parameters, %(steps)d steps, %(loss_tokens)d loss tokens",
            counts,
        )
        train(run, workspace if leader else None)
        prefix = "adapted."
        weights = {
            name.removeprefix(prefix): tensor.to(TORCH_DTYPES[job.dtype])
            for name, tensor in run.engine.weights().items()
        }
        if leader:
            save_adapter(run.adapted, workspace.path, weights, base=str(job.degraded.path))
        torch.distributed.barrier()
    return counts


if __name__ == "__main__":
    run_stage(TrainJob, produce, resumable=True, description=__doc__ or "")
