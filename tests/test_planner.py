"""Plans: parts of memory, layouts that fit, communication, and what the command says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from launch.cluster import Cluster, Hardware, load_cluster
from launch.plan_task import Task, task_of
from launch.plan_text import plan_text, scaling_text
from launch.planner import Layout, fits, memory, predictions, rehearsal_of, step
from launch.recipe import Recipe
from recovery.artifacts import REPOSITORY
from recovery.errors import UserError
from recovery.placement import expert_parameters, skeleton
from tests.pipeline import tiny_recipe

GPUS = Hardware(gemm_tflops=500, memory_gb_s=4000, memory_gib=64, allreduce_gb_s=200, network_gb_s=50)


def on(hosts: int, **hardware: float) -> Cluster:
    given = GPUS.model_copy(update=hardware)
    names = tuple(f"node-{number}" for number in range(hosts))
    return Cluster(name="planned", device="cuda", processes=8, nodes=names, hardware=given)


@pytest.fixture
def recipe(tiny: Path, tmp_path: Path) -> Recipe:
    return tiny_recipe(
        tiny, tmp_path, models={"dtype": "bfloat16"}, train={"batch_tokens": 40 * 16, "micro_batch_tokens": 40}
    )


@pytest.fixture
def task(recipe: Recipe) -> Task:
    return task_of(recipe, on(2), None, None)


def test_a_step_on_this_host_goes_at_the_pace_that_was_timed(recipe: Recipe):
    layout = Layout("zero1", "online", checkpointing=False)
    here = task_of(recipe, Cluster(name="here", device="cpu"), None, None)
    rehearsed = rehearsal_of(here, layout)
    names = rehearsed.phases("dense", online=True)
    assert set(names) < set(here.pace)
    roofline = sum(here.rates.seconds(phase.work) for phase in names.values())
    for slower in (1.0, 3.0):
        vars(here)["pace"] = dict.fromkeys(here.pace, slower)
        assert step(here, layout, rehearsed).compute == pytest.approx(slower * here.load * roofline)
    # What nobody can time here goes by the cluster's file.
    assert task_of(recipe, on(2), None, None).pace == {}


def test_parts_of_a_device(task: Task):
    whole = Layout("zero1", "online", checkpointing=False)
    pieces = replace(whole, deepspeed="zero3")
    first = memory(task, whole, rehearsal_of(task, whole))
    divided = memory(task, pieces, rehearsal_of(task, pieces))
    weights = rehearsal_of(task, whole).student.total
    assert task.devices == 16
    assert first.student == weights
    # Noise on K and V leaves the rest of the reference as it is, and that is held once.
    assert 0 < first.reference < 0.3 * weights
    assert divided.student == pytest.approx(weights / 16)
    assert divided.reference == pytest.approx(weights / 16 + rehearsal_of(task, pieces).reference.head)
    assert divided.buffers > weights  # gathered
    cached = replace(whole, teacher="hidden_states")
    assert memory(task, cached, rehearsal_of(task, cached)).reference == 0
    copies = replace(whole, deepspeed="zero3_hpz")
    assert memory(task, copies, rehearsal_of(task, copies)).student == pytest.approx(weights / 16 + weights / 8)
    # Both models are on the device before they share anything.
    assert first.peak >= first.runtime + 2 * weights


def test_what_is_loaded_whole_is_planned_whole(models: dict[str, Path], tmp_path: Path):
    """Experts: ZeRO-3 divides the student after it was loaded, and leaves the reference as it is."""
    recipe = tiny_recipe(models["mixtral"], tmp_path, models={"dtype": "bfloat16"})
    task, pieces = task_of(recipe, on(2), None, None), Layout("zero3", "online", checkpointing=False)
    found, rehearsed = memory(task, pieces, rehearsal_of(task, pieces)), rehearsal_of(task, pieces)
    assert found.student == pytest.approx(rehearsed.student.total / 16)
    assert found.reference == rehearsed.reference.total
    assert found.loading >= found.runtime + 2 * rehearsed.student.total


def test_what_the_damage_leaves_alone_is_shared(models: dict[str, Path], tmp_path: Path):
    def share(modules: list[str]) -> float:
        degrade = {"kind": "gaussian_noise", "relative_std": 0.5, "modules": modules}
        return task_of(tiny_recipe(models["mixtral"], tmp_path, degrade=degrade), on(2), None, None).same_share

    model = skeleton(str(models["mixtral"]), None)
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(parameter.numel() for parameter in expert_parameters(model).values())
    assert share(["experts.gate_up_proj", "experts.down_proj"]) == pytest.approx(1 - experts / total)
    assert share(["k_proj"]) > 0.9


def test_communication_grows_with_what_is_divided(task: Task):
    plain, pieces = (Layout(name, "online", checkpointing=False) for name in ("zero2", "zero3"))
    found = {layout: step(task, layout, rehearsal_of(task, layout)) for layout in (plain, pieces)}
    trainable = rehearsal_of(task, plain).trainable
    assert found[plain].sent == pytest.approx(15 / 16 * trainable * (4 + task.width))
    weights = rehearsal_of(task, pieces).student.total
    assert found[pieces].sent == pytest.approx(found[plain].sent + task.rounds * 15 / 16 * 3 * weights)
    assert found[pieces].communication == pytest.approx(found[pieces].sent / 50e9)


def test_what_does_not_fit_is_not_recommended(recipe: Recipe, tmp_path: Path):
    roomy = plan_text(recipe, on(2), None, tmp_path)
    assert "recommended: " in roomy
    assert "TOO MUCH" not in roomy
    # A device's context takes 3.2 GB, and DeepSpeed's buffer of gradients 1 GB, or 2 under ZeRO-1.
    cramped = task_of(recipe, on(2, memory_gib=4.0), None, None)
    assert not any(fits(cramped, one) for one in predictions(cramped))
    text = plan_text(recipe, on(2, memory_gib=4.0), None, tmp_path)
    assert "nothing fits into 4.3 GB of a device" in text
    assert "checkpointing" in text  # was tried
    between = plan_text(recipe, on(2, memory_gib=5.2), None, tmp_path)
    assert "recommended: zero2" in between
    assert "not zero1, online: needs 5." in between


def test_a_step_with_too_little_work_is_pointed_out(recipe: Recipe, tmp_path: Path):
    text = plan_text(recipe, on(4), None, tmp_path)
    assert "a step has 16 micro-batches for 32 devices, so others wait: raise train.batch_tokens to 1,280" in text


def test_a_rate_that_is_not_there_is_named(recipe: Recipe, tmp_path: Path):
    with pytest.raises(UserError, match=r"hardware\.network_gb_s: missing"):
        plan_text(
            recipe,
            Cluster(**{**on(2).model_dump(), "hardware": {**GPUS.model_dump(), "network_gb_s": None}}),
            None,
            tmp_path,
        )
    with pytest.raises(UserError, match=r"hardware\.gemm_tflops: missing"):
        plan_text(recipe, load_cluster("two-hosts-example"), None, tmp_path)


def test_scaling_is_told_with_its_assumptions(recipe: Recipe):
    lines = scaling_text(recipe, on(1)).splitlines()
    devices = [int(line.split()[0]) for line in lines[2:10]]
    assert devices == [8, 16, 32, 64, 128, 256, 512, 1024]
    efficiency = [float(line.split()[-1].rstrip("%")) for line in lines[2:10]]
    assert efficiency[0] == 100
    assert efficiency == sorted(efficiency, reverse=True)
    assert lines[10].endswith("no waiting for the slowest, nothing of the")


def test_the_papers_model_and_its_caches():
    """Llama-3.2-1B, 120k samples of 2048 tokens: the figures that caching is about."""
    content = yaml.safe_load((REPOSITORY / "launch" / "recipes" / "paper" / "llama-3.2-1b.yaml").read_text())
    content["models"]["reference"] = str(REPOSITORY / "launch" / "shapes" / "llama-1b")
    task = task_of(Recipe.model_validate(content), load_cluster("mi300x"), 1, None)
    found = {one.layout.teacher: one for one in predictions(task, own=True)}
    assert task.tokens == 245_760_000
    assert found["online"].disk == 0
    assert found["hidden_states"].disk == pytest.approx(1.0e12, rel=0.01)
    assert found["sparse_logits"].disk / task.tokens <= 420
    assert found["hidden_states"].step.seconds < 0.9 * found["online"].step.seconds
    online = found["online"].memory
    assert online.loading == pytest.approx(online.runtime + 2 * 2 * 1.236e9, rel=0.01)
