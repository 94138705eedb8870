"""What `recover-lora plan` predicts beside what is measured: memory of a rank, and tokens a second.

    make bench-plan              # about 15 minutes on two cores

Nine layouts of SmolLM2-135M and of a random model of half a billion parameters: ZeRO stages, teachers, one rank and
two, with and without activation checkpointing.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from launch.cluster import Cluster
from launch.plan_task import Task, task_of
from launch.planner import Layout, memory, rehearsal_of, step
from recovery.artifacts import REPOSITORY
from recovery.sources import load_tokenizer
from tests.benchmarks.rank import take_steps, training_job
from tests.benchmarks.step import RECIPE, SETTINGS
from tests.benchmarks.summary import append_row

FOLDER = REPOSITORY / "runs" / "bench" / "plan"
SMALL, HALF = "smollm2", "half-billion"
STEPS = 2


@dataclass(frozen=True)
class Case:
    model: str
    deepspeed: str
    teacher: str
    ranks: int = 1
    checkpointing: bool = False

    def __str__(self) -> str:
        ranks = f"{self.ranks} rank{'s' * (self.ranks > 1)}"
        return f"{self.model}, {self.deepspeed}, {self.teacher}, {ranks}" + ", checkpointing" * self.checkpointing

    @property
    def settings(self) -> list[str]:
        given = [
            *SETTINGS,
            f"name=bench-plan-{self.model}",
            f"train.deepspeed={self.deepspeed}",
            f"teacher={{kind: {self.teacher}}}",
            f"train.activation_checkpointing={str(self.checkpointing).lower()}",
        ]
        if self.model == SMALL:
            return [*given, "train.batch_tokens=2048", "train.micro_batch_tokens=1024"]
        given += [f"models.reference={half_billion()}", "generate.max_length=256", "generate.samples=16"]
        return [*given, "train.batch_tokens=512", "train.micro_batch_tokens=512", "generate.batch_samples=20"]


CASES = (
    Case(SMALL, "zero1", "online"),
    Case(SMALL, "zero2", "hidden_states"),
    Case(SMALL, "zero1", "sparse_logits"),
    Case(SMALL, "zero2", "online", checkpointing=True),
    Case(SMALL, "zero2", "online", ranks=2),
    Case(SMALL, "zero3", "online", ranks=2),
    Case(HALF, "zero2", "online"),
    Case(HALF, "zero2", "hidden_states"),
    Case(HALF, "zero3", "hidden_states", ranks=2),
)


def half_billion() -> str:
    """A random model of 0.5 billion parameters with SmolLM2's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = FOLDER / HALF
    if not (folder / "tokenizer.json").exists():
        tokenizer = load_tokenizer("assets/smollm2-135m-instruct", None)
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=30,
            num_attention_heads=16,
            num_key_value_heads=4,
            vocab_size=len(tokenizer),
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def predicted(case: Case, task: Task) -> tuple[float, float]:
    """(bytes of a rank, tokens a second)"""
    layout = Layout(case.deepspeed, case.teacher, case.checkpointing)
    rehearsed = rehearsal_of(task, layout)
    found = memory(task, layout, rehearsed)
    shown = ", ".join(f"{name} {value / 1e6:.0f}" for name, value in vars(found).items())
    print(f"  predicted MB: {shown}", flush=True)
    return found.peak, task.recipe.train.batch_tokens / step(task, layout, rehearsed).seconds


def main() -> None:
    chosen = [case for case in CASES if all(word in str(case) for word in sys.argv[1:])]
    FOLDER.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    within = {"memory": 0, "rate": 0}
    for case in chosen:
        recipe, job = training_job(RECIPE, case.settings, FOLDER)
        cluster = Cluster(name="bench", device="cpu", processes=case.ranks)
        task = task_of(recipe, cluster, None, job.corpus.path)
        bytes_, rate = predicted(case, task)
        found = take_steps(job, FOLDER, case.ranks, max(threads // case.ranks, 1), STEPS)
        append_row(f"plan: memory, {case}", bytes_ / 1e6, "MB predicted", peer=found["peak"] / 1e6)
        append_row(f"plan: rate, {case}", rate, "tok/s predicted", peer=found["rate"])
        within["memory"] += abs(bytes_ / found["peak"] - 1) <= 0.10
        within["rate"] += abs(found["rate"] / rate - 1) <= 0.25
    print(f"of {len(chosen)} layouts:")
    append_row("plan: memory within a tenth", within["memory"], "layouts", goal=6)
    append_row("plan: step within a quarter", within["rate"], "layouts", goal=6)


if __name__ == "__main__":
    main()
