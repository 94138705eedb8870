"""Recipe section and stage jobs of evaluation.

Nothing here imports torch or lm_eval, so that a typo in a recipe is reported within a second.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from recovery.config import ArtifactInput, Dtype, Job, LooseInput, ModelInput, Runtime
from recovery.settings import Config

MMLU = ("mmlu_philosophy", "mmlu_management", "mmlu_astronomy")
PAPER = ("hellaswag", *MMLU, "arc_challenge", "winogrande", "piqa", "openbookqa", "boolq")
SUITES: dict[str, tuple[str, ...]] = {
    "paper": PAPER,
    # Small models stand well above chance on these two, where the paper's seven say nothing about them.
    "extended": (*PAPER, "arc_easy", "sciq"),
    "none": (),
}
KNOWN = SUITES["extended"]


class Evaluate(Config):
    """Recipe section `evaluate`: what the reference, the degraded and the recovered model are scored on."""

    suite: Literal["paper", "extended", "none"] = "paper"
    """paper: the nine tasks of section 5.2; extended: ARC-Easy and SciQ too; none: KL on held-out text alone."""
    tasks: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Tasks by name, in place of a suite."""
    limit: PositiveInt | None = None
    """Items of each task, a seeded sample; all of them unless given."""
    data_dir: str | None = None
    """Folder with the benchmark data; the model hub's datasets unless given."""
    batch_tokens: PositiveInt | None = None
    """Most tokens of one scoring batch, into which questions are packed without padding; 1024 on a CPU and 8192
    elsewhere unless given."""
    bootstrap: PositiveInt = 10000
    """Bootstrap draws behind the intervals of AR%."""
    contexts: NonNegativeInt = 32
    """Benchmark contexts on which the distribution shift is measured; 0 for none."""
    context_tokens: PositiveInt = Field(default=128, ge=2)
    """Each context is cut to this many tokens."""

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: tuple[str, ...] | None) -> tuple[str, ...] | None:
        unknown = [name for name in tasks or () if name not in KNOWN]
        if unknown:
            raise ValueError(f"unknown task {', '.join(unknown)}; known: {', '.join(KNOWN)}")
        if tasks is not None and len(set(tasks)) != len(tasks):
            raise ValueError("a task is listed twice")
        return tasks

    @property
    def task_names(self) -> tuple[str, ...]:
        return self.tasks if self.tasks is not None else SUITES[self.suite]


class BenchmarkData(LooseInput):
    """A local folder of benchmark data. Its digest is of the files that the tasks at hand read."""


class Divergence(Config):
    """What a model's next-token distribution is compared with, and on which text."""

    reference: ModelInput
    corpus: ArtifactInput
    """Its held-out split."""
    contexts: ArtifactInput | None = None


class ContextsJob(Job):
    stage: ClassVar[str] = "contexts"
    schema_version: ClassVar[int] = 1
    seed: int
    tokenizer: ModelInput
    tasks: tuple[str, ...]
    count: PositiveInt
    context_tokens: PositiveInt
    data: BenchmarkData | None = None
    """None: the hub's datasets."""


class EvaluateJob(Job):
    stage: ClassVar[str] = "evaluate"
    schema_version: ClassVar[int] = 3
    seed: int
    dtype: Dtype
    model: ModelInput
    adapter: ArtifactInput | None = None
    """A PEFT adapter on top of the model."""
    tasks: tuple[str, ...]
    limit: PositiveInt | None = None
    batch_tokens: PositiveInt | None = None
    data: BenchmarkData | None = None
    """None: the hub's datasets."""
    divergence: Divergence | None = None
    """None for the reference itself, whose scores then serve every recipe that uses it."""


class Scores(Config):
    """The three models' finished evaluations."""

    reference: ArtifactInput
    degraded: ArtifactInput
    recovered: ArtifactInput


class ReportJob(Job):
    stage: ClassVar[str] = "report"
    schema_version: ClassVar[int] = 9
    name: str
    seed: int
    bootstrap: PositiveInt
    tasks: tuple[str, ...]
    reference: ModelInput
    corpus: ArtifactInput
    adapter: ArtifactInput
    scores: Scores
    contexts: ArtifactInput | None = None
    repair: ArtifactInput | None = None
    """The closed form with which training began, or the adapter itself where there was no training."""
    degrade: ArtifactInput | None = None
    """None when the recipe was given a degraded model."""


class DeliverRuntime(Runtime):
    server: str | None = None
    """Address of a vLLM server that serves the adapter over the degraded model."""
    served_name: str = ""
    """The adapter's model name there."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the server's key."""
    llama_cpp: Path | None = None
    """Folder with llama.cpp's convert_hf_to_gguf.py."""


class DeliverJob(Job):
    stage: ClassVar[str] = "deliver"
    schema_version: ClassVar[int] = 3
    runtime: DeliverRuntime  # pyright: ignore[reportIncompatibleVariableOverride] - narrower, and frozen
    name: str
    dtype: Dtype
    reference: ModelInput
    degraded: ModelInput
    adapter: ArtifactInput
    corpus: ArtifactInput
    scores: ArtifactInput
    """Of the recovered model."""
    report: ArtifactInput
    merged: bool
    """Whether the whole recovered model is delivered too."""
    gguf: bool = False
    """Whether it is delivered as a GGUF file."""
    served: bool = False
    """Whether a vLLM server has to answer as was scored, with the adapter over the degraded model."""
