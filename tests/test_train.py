"""Training: resumed exactly after a kill at any step under every ZeRO stage; advice; refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import recovery.profile
import recovery.train
import recovery.training_run
from recovery.adapters import load_adapter
from recovery.batches import collate
from recovery.checkpoint import load_checkpoint, save_checkpoint
from recovery.config import ModelInput, Train
from recovery.corpus import read_split
from recovery.deepspeed_config import FOLDER
from recovery.engine import start_distributed
from recovery.errors import Unavailable, UserError
from recovery.models import checkpoint_activations
from recovery.stage import build
from recovery.tracking import Tracker
from recovery.train import checkpoint_steps
from recovery.training_run import learning_rates, set_up, steps_below_the_peak
from recovery.watch import advice, advice_on_warmup
from tests.pipeline import job_of, make_benchmarks, measure, model_at, run_in_process, tiny_recipe, width_of
from tests.training import Killed, losses, partitioned, train_with


@pytest.mark.parametrize(
    ("zero", "dtype"),
    [
        ("zero1", "float32"),
        ("zero2", "float32"),
        ("all of it partitioned", "float32"),
        ("zero1", "bfloat16"),
        ("zero3", "bfloat16"),
    ],
)
def test_killed_and_resumed_equals_undisturbed(
    prepared: tuple[Path, Path, Path], tmp_path: Path, zero: str, dtype: str
):
    if not zero.startswith("zero"):
        zero = partitioned(tmp_path)
    undisturbed = train_with(prepared, tmp_path / "a", None, dtype, deepspeed=zero)
    # Before the first checkpoint, right at one, between two, and soon after a restart; bfloat16 is slow on many CPUs.
    for stop in (3, 5, 12, 13) if dtype == "float32" else (12,):
        with pytest.raises(Killed):
            train_with(prepared, tmp_path / "b", stop, dtype, deepspeed=zero)
    resumed = train_with(prepared, tmp_path / "b", None, dtype, deepspeed=zero)
    assert losses(resumed) == losses(undisturbed)
    name = "adapter_model.safetensors"
    assert (resumed / name).read_bytes() == (undisturbed / name).read_bytes()
    held_out = [json.loads(line)["step"] for line in (resumed / "held_out.jsonl").read_text().splitlines()]
    assert held_out == [json.loads(line)["step"] for line in (undisturbed / "held_out.jsonl").read_text().splitlines()]
    assert not list(resumed.glob(".*"))


def test_nothing_is_printed_but_what_a_command_tells(
    prepared: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    train_with(prepared, tmp_path / "a", None, "bfloat16")
    assert capsys.readouterr().out == ""


def test_sigterm_saves_after_the_step_and_the_same_command_goes_on(prepared: tuple[Path, Path, Path], tmp_path: Path):
    undisturbed = train_with(prepared, tmp_path / "a", None)
    with pytest.raises(KeyboardInterrupt):
        train_with(prepared, tmp_path / "b", None, sigterm_at=7)
    (partial,) = (tmp_path / "b" / "artifacts").glob(".train-*.partial")
    assert max(checkpoint_steps(partial)) == 8  # the step that was being taken, between two checkpoints
    resumed = train_with(prepared, tmp_path / "b", None)
    assert losses(resumed) == losses(undisturbed)


def test_zero_stages_and_micro_batches_give_the_same_losses(prepared: tuple[Path, Path, Path], tmp_path: Path):
    runs = [
        losses(train_with(prepared, tmp_path / "a", None, deepspeed="zero1")),
        losses(train_with(prepared, tmp_path / "a", None, deepspeed="zero3")),
        losses(train_with(prepared, tmp_path / "a", None, micro_batch_tokens=40)),
        losses(train_with(prepared, tmp_path / "a", None, activation_checkpointing=True)),
    ]
    for other in runs[1:]:
        assert [loss for _, loss, _ in other] == pytest.approx([loss for _, loss, _ in runs[0]], rel=1e-3)


@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3"])
def test_gradients_of_many_micro_batches_add_up_in_float32(
    prepared: tuple[Path, Path, Path], tmp_path: Path, zero: str
):
    """The same sample 300 times: in bfloat16 a sum of equal numbers stands still at 256 of them."""
    model, data, source = prepared
    shutil.copytree(source, tmp_path / "runs")
    job = job_of(tiny_recipe(model, data, train={"deepspeed": zero, "max_grad_norm": 1e9}), tmp_path / "runs", "train")
    start_distributed()
    with Tracker(None, None) as tracker:
        run = set_up(job.model_copy(update={"dtype": "bfloat16"}), tmp_path, 0, 1, tracker)

    def norm(times: int) -> float:
        rows = run.plan[0].micro_batches[0][:1]
        batch = collate(run.tokens, rows)
        targets = run.teacher.targets(batch, run.teacher.fetch(rows))
        for number in range(times):
            run.engine.backward(batch, targets, 100, last=number == times - 1)
        return float(run.engine.step(0.0))

    assert norm(300) == pytest.approx(300 * norm(1), rel=1e-3)


def test_checkpointed_activations_turn_no_dropout_on(tiny: Path):
    model = model_at(tiny)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    ids = torch.arange(3, 40)[None]
    expected = model(input_ids=ids).logits
    checkpoint_activations(model)
    calls: list[object] = []
    layer = model.get_decoder().layers[0]
    layer._gradient_checkpointing_func = lambda function, *given: (calls.append(given), function(*given))[1]
    torch.testing.assert_close(model(input_ids=ids).logits, expected)
    assert calls  # it does look at the flag


def test_a_training_of_one_step_is_not_profiled(prepared: tuple[Path, Path, Path], tmp_path: Path):
    model, data, source = prepared
    shutil.copytree(source, tmp_path / "runs")
    train = {"epochs": 1, "batch_tokens": 100_000, "micro_batch_tokens": 160}
    job = job_of(tiny_recipe(model, data, train=train), tmp_path / "runs", "train")
    with pytest.raises(UserError, match="a single step"):
        recovery.profile.measure(job, tmp_path / "profile", 4)


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.json")), ids=lambda file: file.stem)
def test_every_shipped_deepspeed_file_trains(prepared: tuple[Path, Path, Path], tmp_path: Path, file: Path):
    found = losses(train_with(prepared, tmp_path / "a", None, deepspeed=file.stem, epochs=1))
    assert found[-1][1] < found[0][1]


@pytest.mark.parametrize("zero", ["zero1", "zero3"])
def test_a_head_that_learns_is_trained_and_measured(models: dict[str, Path], tmp_path: Path, zero: str):
    """OLMo's head is its own, so an adapter may sit there; the loss then goes through autograd."""
    data = make_benchmarks(tmp_path / "data")
    changes = {"adapter": {"placement": ["k_proj", "v_proj", "lm_head"]}, "train": {"epochs": 6, "deepspeed": zero}}
    done = run_in_process(tiny_recipe(models["olmo"], data, **changes), tmp_path / "runs")
    summary = json.loads((done["report"] / "summary.json").read_text())
    assert summary["kl"]["recovery"] > 0.3
    while_training = json.loads((done["train"] / "held_out.jsonl").read_text().splitlines()[-2])
    assert while_training["split"] == "held_out"
    # What training measured through the adapted head is what plain PEFT loading scores.
    assert while_training["kl"] == pytest.approx(summary["kl"]["recovered"], rel=1e-3)


def test_an_adapter_on_a_tied_head_is_refused(models: dict[str, Path], tmp_path: Path):
    data = make_benchmarks(tmp_path / "data")
    with pytest.raises(UserError, match="no linear module is named lm_head"):
        run_in_process(tiny_recipe(models["llama"], data, adapter={"placement": ["lm_head"]}), tmp_path / "runs")


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path / "c", step, {"weight/a": torch.full((3,), float(step))})
    assert sorted(path.name for path in (tmp_path / "c").glob("*.safetensors")) == [
        "step-00000002.safetensors",
        "step-00000003.safetensors",
    ]
    last = tmp_path / "c" / "step-00000003.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    found = load_checkpoint(tmp_path / "c")
    assert found is not None
    assert found[0] == 2
    assert found[1]["weight/a"].tolist() == [2.0, 2.0, 2.0]


def test_a_corpus_of_another_vocabulary_is_refused(
    prepared: tuple[Path, Path, Path], models: dict[str, Path], tmp_path: Path
):

    _, data, runs = prepared
    job = job_of(tiny_recipe(models["llama"], data), runs, "train")
    other = ModelInput(path=str(make_other(tmp_path / "other")), digest="other")
    with pytest.raises(UserError, match="vocabulary differs from the reference's in 1 tokens, first: '<new>'"):
        build(job.model_copy(update={"degraded": other}), recovery.train.produce, resumable=True)


def make_other(folder: Path) -> Path:
    from tests.conftest import make_model

    return make_model(folder, "llama", extra=("<new>",))


def test_schedule_warms_up_and_decays_linearly():
    rates = learning_rates([100] * 12, Train(learning_rate=1.0, warmup_steps=4))
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == pytest.approx([1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])


def test_schedule_counts_tokens():
    """At the same token the same rate, whatever the size of the steps."""
    train = Train(learning_rate=1.0, warmup_tokens=400)
    small, large = learning_rates([100] * 12, train), learning_rates([200] * 6, train)
    assert large[:2] == [small[1], small[3]] == [0.5, 1.0]
    assert large[2:] == small[4::2]
    assert learning_rates([100] * 3, train) == [1 / 3, 2 / 3, 1.0]  # a warm-up longer than the run


def test_a_run_that_is_warm_up_for_the_most_part_is_told():
    def said(steps: int, train: Train) -> str | None:
        return advice_on_warmup(
            {"steps": steps, "warmup_steps": steps_below_the_peak(learning_rates([100] * steps, train))}
        )

    assert "6 steps, 5 of them below" in str(said(6, Train(warmup_steps=80)))
    assert said(12, Train(warmup_steps=6)) is None
    assert said(1, Train(warmup_steps=0)) is None
    assert "8 steps, 7 of them" in str(said(8, Train(warmup_tokens=10_000)))


def test_advice_names_rising_and_stagnating_kl():
    assert advice([3.0, 2.0, 1.0]) is None
    assert "risen" in str(advice([1.0, 1.1, 1.2]))
    assert "stagnates" in str(advice([2.0, 1.0, 1.001, 0.999, 1.0]))


def test_compiled_layers_give_the_same_losses(prepared: tuple[Path, Path, Path], tmp_path: Path):
    plain = train_with(prepared, tmp_path / "plain", None, epochs=1)
    compiled = train_with(prepared, tmp_path / "compiled", None, epochs=1, compile=True)
    assert compiled != plain
    for one, other in zip(losses(compiled), losses(plain), strict=True):
        assert one == pytest.approx(other, rel=1e-3)


def test_the_best_measurement_is_delivered_and_training_stops_when_nothing_gets_better(
    prepared: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Ten good steps, then a learning rate at which everything is lost."""
    rates = "learning_rates"
    monkeypatch.setattr(recovery.training_run, rates, lambda steps, _: [1e-2] * 10 + [1.0] * (len(steps) - 10))
    settings: dict[str, Any] = {"epochs": 6, "evaluate_every": 2, "checkpoint_every": 3, "patience": 3}
    folder = train_with(prepared, tmp_path / "runs", None, **settings)
    lines = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    kls = {line["step"]: line["kl"] for line in lines if line["split"] == "held_out"}
    details = json.loads((folder / "manifest.json").read_text())["details"]
    best = min(kls, key=lambda step: kls[step])
    assert 0 < best <= 10
    assert details["best_step"] == best
    assert details["steps_taken"] == max(kls) == best + 2 * 3  # three measurements without a better one
    assert max(kls) < details["steps"]
    model, _, source = prepared
    recovered = load_adapter(model_at(next((source / "artifacts").glob("degrade-*"))), folder)
    held_out = read_split(next((source / "artifacts").glob("generate-*")), "held_out")
    found = measure(recovered, model_at(model), held_out, width_of(model), 512, "")
    assert found.kl == pytest.approx(kls[best], rel=1e-3)


def test_training_that_never_helps_delivers_nothing(prepared: tuple[Path, Path, Path], tmp_path: Path):
    with pytest.raises(Unavailable, match="no adapter is delivered"):
        train_with(prepared, tmp_path / "runs", None, learning_rate=30.0, warmup_steps=0, evaluate_every=1)
    assert not list((tmp_path / "runs" / "artifacts").glob("train-*"))
