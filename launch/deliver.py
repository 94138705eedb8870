"""`recover-lora deliver`: a finished run's adapter, with a model card, as those who deploy it take it."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from eval.config import DeliverJob, EvaluateJob
from eval.gguf import CONVERTER
from launch.cluster import Cluster, LocalServers
from launch.execution import Plan
from launch.pipeline import DELIVERY, is_finished, link, missing_inputs, run_stage_process
from launch.recipe import Recipe
from launch.servers import ServerPool, Serving
from launch.share import PORTS
from launch.stages import Builder, Stage, artifact_of
from launch.tracking import register
from recovery.errors import EXIT_DONE, Unavailable, UserError, first_line
from recovery.files import HashMemory, sha256_of
from recovery.placement import skeleton
from recovery.sources import check_packing

LLAMA_CPP = Path("assets/llama.cpp")
SPARSE = 0.05
"""Share of zeros from which a matrix counts as pruned."""
LOOKED_AT = 8
"""Of the adapted matrices."""


@dataclass(frozen=True)
class Forms:
    """What is delivered beside the adapter and its card, and how it is checked."""

    merged: bool = False
    gguf: bool = False
    served: bool = False
    """Whether a vLLM server has to answer as was scored."""
    llama_cpp: Path = LLAMA_CPP
    """Folder with llama.cpp's converter."""
    dense: bool = False
    """Merge into a packed or sparse model all the same: a plain checkpoint comes out."""


def deliver_stage(plan: Plan, forms: Forms) -> Stage:
    """Raises UserError where the run is not finished, and for what cannot be delivered that way."""
    stages = {stage.label: stage for stage in plan.stages}
    recovered = stages["evaluate-recovered"].job
    assert isinstance(recovered, EvaluateJob)
    if recovered.adapter is None or recovered.divergence is None:
        folder = plan.run_folder / "adapter"
        raise UserError("deliver", "train.parameters is all: there is no adapter", f"{folder} is a whole checkpoint")
    if (forms.merged or forms.gguf) and not forms.dense and (found := undone_by_merging(recovered)):
        option = "--merged" if forms.merged else "--gguf"
        raise UserError(option, found, "leave it out: the adapter works beside that base; or add --dense to merge")
    if forms.gguf and not (forms.llama_cpp / CONVERTER).is_file():
        raise UserError("--gguf", f"no {CONVERTER} in {forms.llama_cpp}", "`make llama-cpp`, or --llama-cpp FOLDER")
    job: DeliverJob = Builder(plan.recipe, plan.runs_dir).job(
        DeliverJob,
        "deliver",
        name=plan.recipe.name,
        dtype=recovered.dtype,
        reference=recovered.divergence.reference,
        degraded=recovered.model,
        adapter=recovered.adapter,
        corpus=recovered.divergence.corpus,
        scores=artifact_of(recovered),
        report=artifact_of(stages["report"].job),
        merged=forms.merged,
        gguf=forms.gguf,
        served=forms.served,
    )
    runtime = job.runtime.model_copy(update={"llama_cpp": forms.llama_cpp.resolve()})
    job = job.model_copy(update={"runtime": runtime})
    stage = Stage("deliver", "deliver", "eval.deliver", job, (DELIVERY,))
    if absent := missing_inputs(stage, plan.stages):
        raise UserError("deliver", f"needs {', '.join(absent)}, not finished", "`recover-lora run` the recipe first")
    return stage


def undone_by_merging(recovered: EvaluateJob) -> str | None:
    """What the degraded model is that a merged one would not be, packed or sparse; None for a plain, dense one."""
    model, adapter = recovered.model, recovered.adapter
    bare = skeleton(model.path, model.revision)
    if packing := check_packing(model.path, bare.config):
        return f"the degraded model is packed ({packing['quant_method']}), merging would unpack it"
    if adapter is None or not adapter.path.is_dir() or not Path(model.path).is_dir():
        return None
    from recovery.adapters import adapted_modules
    from recovery.weights import Checkpoint

    weights = Checkpoint(Path(model.path))
    names = [name for module in sorted(adapted_modules(adapter.path)) if (name := f"{module}.weight") in weights]
    for name in names[:: max(1, len(names) // LOOKED_AT)]:
        share = float((weights[name] == 0).float().mean())
        if share >= SPARSE:
            return f"the degraded model is sparse ({share:.0%} of {name} are zero), merging would fill it"
    return None


def served_by(stage: Stage, plan: Plan) -> tuple[Stage, ServerPool]:
    """The stage with the address of a server of the adapter over the degraded model, and that server, to be started.

    Raises UserError for a cluster without servers of its own, and for an adapter that vLLM does not take.
    """
    from recovery.adapters import WEIGHTS, write_uniform

    job, settings = stage.job, plan.cluster.servers
    assert isinstance(job, DeliverJob)
    if not isinstance(settings, LocalServers) or plan.cluster.hosts:
        raise UserError("--served", "the cluster has no servers of kind local on this host", "take --cluster local")
    # One, behind the ports of those that draw samples: they may be at work.
    own = settings.model_copy(update={"count": 1, "port": settings.port + PORTS - 1})
    # With one rank everywhere, as the delivery has it.
    adapter = (plan.run_folder / "serving").resolve()
    rank = write_uniform(job.adapter.path, adapter)
    corpus = next(stage.job for stage in plan.stages if stage.label == "generate")
    # Of its content, so that a server of another adapter is not taken for this one's.
    name = f"recovered-{sha256_of(adapter / WEIGHTS)[:12]}"
    longest = int(corpus.model_dump()["generate"]["max_length"]) + 1  # and the one token that has to be asked for
    serving = Serving(job.degraded, job.dtype, longest, adapter=adapter, adapter_name=name, rank=rank)
    pool = ServerPool(serving, plan.cluster.model_copy(update={"servers": own}), plan.run_folder / "logs")
    known = {"server": own.url(0), "served_name": name, "api_key_env": settings.api_key_env}
    job = job.model_copy(update={"runtime": job.runtime.model_copy(update=known)})
    return replace(stage, job=job), pool


def deliver(recipe: Recipe, cluster: Cluster, runs_dir: Path, forms: Forms, push_to: str | None = None) -> int:
    """Make the delivery and link it as `delivery` in the run's folder; returns the exit code.

    push_to: a hub repository that gets it in the end.
    """
    if push_to is not None:
        token_of_the_hub()
    memory = HashMemory(runs_dir / ".hashes.json")
    plan = Plan.of(recipe, cluster, runs_dir, memory)
    stage = deliver_stage(plan, forms)
    if is_finished(stage, memory):
        print(f"[deliver] reused {stage.job.runtime.output}", file=sys.stderr)
    else:
        stage, pool = served_by(stage, plan) if forms.served else (stage, nullcontext())
        with pool:
            code = run_stage_process(stage, plan.run_folder, cluster)
        if code != EXIT_DONE:
            return code
    link(stage, plan.run_folder)
    memory.save()
    folder = plan.run_folder / DELIVERY
    print(f"adapter  {folder}\ncard     {folder / 'README.md'}")
    for name, made in (("merged", forms.merged), ("gguf", forms.gguf)):
        if made:
            print(f"{name:<8} {folder / name}")
    if (address := register(recipe, runs_dir, folder)) is not None:
        print(f"MLflow   {address}")
    if push_to is not None:
        print(f"hub      {push(folder, push_to)}")
    return EXIT_DONE


def token_of_the_hub() -> str:
    """Raises UserError where the environment has none."""
    token = os.environ.get("HF_TOKEN")
    if not token:
        raise UserError("--push", "HF_TOKEN is not set", "export a token that may write to the repository")
    return token


def push(folder: Path, repository: str) -> str:
    """Upload a delivery to a private hub repository, which is made where there is none; returns its address.

    The manifest stays here: it names folders of this machine. Raises UserError for a public repository, Unavailable
    where the hub does not take it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    api = HfApi(token=token_of_the_hub())
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        if not api.repo_info(repository).private:
            raise UserError(f"--push {repository}", "that repository is public", "make it private, or name another")
        # The link's target: the hub's client does not follow one.
        api.upload_folder(
            repo_id=repository,
            folder_path=folder.resolve(),
            commit_message="Deliver a recovered adapter",
            ignore_patterns=["manifest.json"],
            # Of an earlier delivery with other forms: it would stand beside another adapter.
            delete_patterns=["merged/**", "gguf/**", "uniform/**"],
        )
    except HFValidationError as error:
        raise UserError(f"--push {repository}", str(error), "write owner/name") from error
    except UserError:
        raise
    except Exception as error:  # the client passes on what its network library raises
        said = first_line(error)
        raise Unavailable(f"the hub did not take it ({said}); nothing here has changed") from error
    return f"{api.endpoint}/{repository}"
