"""From a recipe to the stages of a run: the typed job of each, with the output folder that its identity names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datagen.config import GenerateJob, LabelledJob, Partition
from eval.config import ContextsJob, Divergence, EvaluateJob, ReportJob, Scores
from launch.cluster import Cluster, compute_dtype
from launch.recipe import Recipe
from launch.resolve import Names
from recovery.config import (
    ArtifactInput,
    CacheJob,
    DegradeJob,
    Dtype,
    Job,
    ModelInput,
    OnlineTeacher,
    RepairJob,
    SparseLogitsTeacher,
    Tracking,
    TrainJob,
)
from recovery.errors import UserError


@dataclass(frozen=True)
class Stage:
    """One job of a run. command: what `recover-lora <command>` starts it; label: names its job and log files."""

    label: str
    command: str
    module: str
    job: Job
    links: tuple[str, ...]
    """Names of the links in the run's folder."""
    distributed: bool = False

    def tracked_by(self, tracking: Tracking | None) -> Stage:
        runtime = self.job.runtime.model_copy(update={"tracking": tracking})
        return replace(self, job=self.job.model_copy(update={"runtime": runtime}))


class Builder:
    """Builds jobs whose outputs lie in one artifact folder."""

    def __init__(self, recipe: Recipe, runs_dir: Path) -> None:
        self._artifacts = runs_dir.resolve() / "artifacts"
        self._logs = runs_dir.resolve() / recipe.name / "logs"

    def job(self, kind: type[Any], label: str, **fields: Any) -> Any:
        """A job with the output folder that its identity names."""
        runtime: Any = kind.model_fields["runtime"].annotation
        unplaced = kind(runtime=runtime(output=Path("unplaced")), **fields)
        place = runtime(output=self._artifacts / unplaced.artifact_name, log=self._logs / f"{label}.log")
        return unplaced.model_copy(update={"runtime": place})


def artifact_of(job: Job) -> ArtifactInput:
    return ArtifactInput(path=job.runtime.output, digest=job.identity)


def generate_job(
    recipe: Recipe, names: Names, cluster: Cluster, runs_dir: Path, partition: Partition | None = None
) -> GenerateJob:
    """The job of the corpus, or of one part of it."""
    if partition is not None and recipe.generate.engine == "embedded":
        raise UserError(
            "--partition", "generate.engine is embedded", "parts are for several clients of servers: engine vllm"
        )
    if partition is not None and partition.of > (
        most := min(recipe.generate.samples, recipe.generate.held_out_samples)
    ):
        raise UserError("--partition", f"{partition.of} parts", f"at most {most}, so that each has held-out samples")
    label = "generate" if partition is None else f"generate-{partition.name}"
    job: GenerateJob = Builder(recipe, runs_dir).job(
        GenerateJob,
        label,
        seed=recipe.seed,
        dtype=compute_dtype(recipe.models.dtype, cluster),
        model=names.generator,
        generate=recipe.generate.of_its_engine(),
        partition=partition,
    )
    if recipe.generate.engine == "embedded":
        return job
    if cluster.servers is None:
        raise UserError(
            "generate.engine", f"vllm, but cluster {cluster.name} has no servers", "give its file a `servers` section"
        )
    access = cluster.servers.access_on(cluster)
    return job.model_copy(update={"runtime": job.runtime.model_copy(update={"servers": access})})


def partition_stage(recipe: Recipe, names: Names, cluster: Cluster, runs_dir: Path, partition: Partition) -> Stage:
    job = generate_job(recipe, names, cluster, runs_dir, partition)
    links = (f"corpus-{partition.name}",)
    return Stage(f"generate-{partition.name}", "generate", "datagen.generate", job, links)


def contexts_job(build: Builder, recipe: Recipe, names: Names) -> ContextsJob | None:
    """The job of the benchmark contexts on which KL is measured too; None when the recipe wants none."""
    evaluate = recipe.evaluate
    if not evaluate.contexts or not evaluate.task_names:
        return None
    return build.job(
        ContextsJob,
        "contexts",
        seed=recipe.seed,
        tokenizer=names.reference,
        tasks=evaluate.task_names,
        count=evaluate.contexts,
        context_tokens=evaluate.context_tokens,
        data=names.data,
    )


def labelled_job(build: Builder, recipe: Recipe, names: Names) -> LabelledJob | None:
    """The job of the text with answers that is learned from; None where it is the corpus."""
    if recipe.labelled is None:
        return None
    return build.job(
        LabelledJob,
        "labelled",
        seed=recipe.seed,
        tokenizer=names.reference,
        labelled=recipe.labelled,
        folders=names.labelled,
    )


def cache_job(
    build: Builder, recipe: Recipe, names: Names, dtype: Dtype, corpus: GenerateJob, contexts: ContextsJob | None
) -> CacheJob | None:
    """The job of the reference's signal on disk; None where its forward runs beside the student's."""
    if isinstance(recipe.teacher, OnlineTeacher):
        return None
    draws = isinstance(recipe.teacher, SparseLogitsTeacher) and not recipe.teacher.captured
    return build.job(
        CacheJob,
        "cache",
        seed=recipe.seed if draws else 0,
        dtype=dtype,
        reference=names.reference,
        corpus=artifact_of(corpus),
        contexts=artifact_of(contexts) if contexts is not None else None,
        teacher=recipe.teacher,
    )


def adapter_stages(
    build: Builder,
    recipe: Recipe,
    names: Names,
    dtype: Dtype,
    degraded: ModelInput,
    corpus: GenerateJob,
    contexts: ContextsJob | None,
    labelled: LabelledJob | None,
) -> list[Stage]:
    """What makes the adapter: the closed form, the teacher's cache and training, as far as the recipe has them."""
    stages: list[Stage] = []
    common: dict[str, Any] = {
        "seed": recipe.seed,
        "dtype": dtype,
        "reference": names.reference,
        "degraded": degraded,
        "corpus": artifact_of(corpus),
        "adapter": recipe.adapter,
    }
    repair: RepairJob | None = None
    if recipe.adapter.init != "zero":
        repair = build.job(RepairJob, "repair", **common)
        assert repair is not None
        links = ("closed_form",) if recipe.train.epochs else ("closed_form", "adapter")
        stages.append(Stage("repair", "train", "recovery.repair", repair, links, distributed=True))
    if not recipe.train.epochs:
        return stages
    cache = cache_job(build, recipe, names, dtype, corpus, contexts)
    if cache is not None:
        stages.append(Stage("cache", "cache", "recovery.cache", cache, ("teacher_cache",), distributed=True))
    train = build.job(
        TrainJob,
        "train",
        **common,
        contexts=artifact_of(contexts) if contexts is not None else None,
        cache=artifact_of(cache) if cache is not None else None,
        start=artifact_of(repair) if repair is not None else None,
        labelled=artifact_of(labelled) if labelled is not None else None,
        teacher=recipe.teacher,
        train=recipe.train,
        deepspeed=names.deepspeed,
    )
    stages.append(Stage("train", "train", "recovery.train", train, ("adapter",), distributed=True))
    return stages


def score_jobs(
    build: Builder,
    recipe: Recipe,
    names: Names,
    dtype: Dtype,
    degraded: ModelInput,
    recovered: dict[str, Any],
    divergence: Divergence,
) -> dict[str, EvaluateJob]:
    """The evaluations of the three models; the last two measure KL as well. recovered: its model, and the adapter if
    it has one."""
    evaluate = recipe.evaluate
    models = {
        "reference": {"model": names.reference, "adapter": None, "divergence": None},
        "degraded": {"model": degraded, "adapter": None, "divergence": divergence},
        "recovered": {**recovered, "divergence": divergence},
    }
    return {
        who: build.job(
            EvaluateJob,
            f"evaluate-{who}",
            seed=recipe.seed,
            dtype=dtype,
            tasks=evaluate.task_names,
            limit=evaluate.limit,
            batch_tokens=evaluate.batch_tokens,
            data=names.data,
            **own,
        )
        for who, own in models.items()
    }


def build_stages(recipe: Recipe, names: Names, cluster: Cluster, runs_dir: Path) -> list[Stage]:
    """The stages of a run in their order; their jobs need nothing but the recipe and what it names."""
    dtype = compute_dtype(recipe.models.dtype, cluster)
    build = Builder(recipe, runs_dir)
    stages: list[Stage] = []

    degrade: DegradeJob | None = None
    degraded = names.degraded
    if recipe.degrade is not None:
        degrade = build.job(DegradeJob, "degrade", seed=recipe.seed, reference=names.reference, damage=recipe.degrade)
        assert degrade is not None
        degraded = ModelInput(path=str(degrade.runtime.output), digest=degrade.identity)
        stages.append(Stage("degrade", "degrade", "recovery.degrade", degrade, ("degraded",)))
    assert degraded is not None

    generate = generate_job(recipe, names, cluster, runs_dir)
    stages.append(Stage("generate", "generate", "datagen.generate", generate, ("corpus",)))
    contexts = contexts_job(build, recipe, names)
    if contexts is not None:
        stages.append(Stage("contexts", "generate", "eval.contexts", contexts, ("contexts",)))

    texts = artifact_of(contexts) if contexts is not None else None
    labelled = labelled_job(build, recipe, names)
    if labelled is not None:
        stages.append(Stage("labelled", "generate", "datagen.labelled", labelled, ("labelled",)))
    makers = adapter_stages(build, recipe, names, dtype, degraded, generate, contexts, labelled)
    stages += makers
    by_label = {stage.label: artifact_of(stage.job) for stage in makers}
    repair = by_label.get("repair")
    adapter = by_label.get("train", repair)
    assert adapter is not None, "a recipe has a closed form or epochs"

    divergence = Divergence(reference=names.reference, corpus=artifact_of(generate), contexts=texts)
    recovered: dict[str, Any] = {"model": degraded, "adapter": adapter}
    if recipe.train.parameters == "all":
        recovered = {"model": ModelInput(path=str(adapter.path), digest=adapter.digest), "adapter": None}
    scores = score_jobs(build, recipe, names, dtype, degraded, recovered, divergence)
    for who, job in scores.items():
        stages.append(Stage(f"evaluate-{who}", "evaluate", "eval.evaluate", job, (f"scores/{who}",)))

    report = build.job(
        ReportJob,
        "report",
        name=recipe.name,
        seed=recipe.seed,
        bootstrap=recipe.evaluate.bootstrap,
        tasks=recipe.evaluate.task_names,
        reference=names.reference,
        corpus=artifact_of(generate),
        adapter=adapter,
        repair=repair,
        scores=Scores(**{who: artifact_of(job) for who, job in scores.items()}),
        contexts=texts,
        degrade=artifact_of(degrade) if degrade is not None else None,
    )
    stages.append(Stage("report", "report", "eval.report", report, ("report",)))
    return stages
