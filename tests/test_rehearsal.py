"""A rehearsed step beside the same step with real tensors: equal FLOPs, equal memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from recovery.adapters import adapter_parameters, add_adapter
from recovery.config import Adapter, ModelInput, SparseLogitsTeacher, Train
from recovery.loss import distill
from recovery.models import check_training_path, final_hidden, head_of
from recovery.placement import skeleton
from recovery.rehearsal import Case, Rehearsal, _batch, pace, rehearse, with_adapter
from recovery.tape import Work
from recovery.targets import DenseTargets
from tests.pipeline import model_at

LENGTHS = (24, 17, 9)


def rehearsed(model: Path, adapter: Adapter, **changes: bool) -> Rehearsal:
    return rehearse(case_of(model, adapter), **{"checkpointing": False, "in_pieces": False, **changes})


def case_of(model: Path, adapter: Adapter, train: Train | None = None) -> Case:
    given = ModelInput(path=str(model), digest="")
    return Case(given, given, adapter, train or Train(), "float32", LENGTHS, SparseLogitsTeacher())


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen2_moe"])
@pytest.mark.parametrize("budget", [1500, 30_000])
def test_a_budget_that_goes_where_it_counts_is_rehearsed_as_large(models: dict[str, Path], name: str, budget: int):
    """Over experts too."""
    adapter = Adapter(placement="auto", init="closed_form_sequential", budget=budget)
    adapted = with_adapter(skeleton(str(models[name]), None), adapter)
    found = sum(parameter.numel() for parameter in adapter_parameters(adapted).values())
    assert 0.5 * budget < found <= budget


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3"])
def test_what_is_rehearsed_is_what_runs(models: dict[str, Path], name: str):
    adapter = Adapter(placement="attention_mlp", rank=4)
    expected = rehearsed(models[name], adapter)
    reference = model_at(models[name])
    adapted = add_adapter(model_at(models[name]), adapter, 0)
    width = int(reference.config.get_text_config().vocab_size)
    for model in (reference, adapted):
        check_training_path(model, width, "model")
    batch = _batch(LENGTHS)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in adapted.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    counter = FlopCounterMode(display=False)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), counter:
        hidden = final_hidden(adapted, batch)[batch.loss_N]
    # Kept are the tensors that autograd saves, and the result; masks and positions of some bytes beside them.
    kept = sum(saved.values()) + hidden.nbytes
    assert expected.kept == pytest.approx(kept, rel=0.03)
    assert expected.trainable == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    attention = expected.forward.work.flops - counter.get_total_flops()
    # torch counts no FLOPs of the CPU's fused attention, the rehearsal does.
    assert 0 <= attention < 0.2 * expected.forward.work.flops
    targets = DenseTargets(final_hidden(reference, batch)[batch.loss_N], head_of(reference, width))
    with FlopCounterMode(display=False) as counter:
        distill(hidden, head_of(adapted, width), targets)
    assert expected.loss["dense"].work.flops == counter.get_total_flops()


def test_every_architecture_can_be_rehearsed(models: dict[str, Path]):
    for name, model in models.items():
        found = rehearsed(model, Adapter(placement="kv", rank=2))
        own = model_at(model)
        assert found.student.total == sum(parameter.nbytes for parameter in own.parameters()), name
        assert found.kept > 0
        assert found.backward.work.flops > 0.7 * found.forward.work.flops, name


def test_checkpointing_keeps_less_and_computes_more(tiny: Path):
    adapter = Adapter(placement="attention_mlp", rank=4)
    plain, checkpointed = rehearsed(tiny, adapter), rehearsed(tiny, adapter, checkpointing=True)
    assert checkpointed.kept < 0.5 * plain.kept
    assert checkpointed.backward.work.flops > 1.3 * plain.backward.work.flops
    # ZeRO-3's own linear function keeps the inputs of frozen matrices too, and afterwards torch has its own again.
    own, few = torch.nn.functional.linear, Adapter(placement="kv", rank=4)
    assert rehearsed(tiny, few, in_pieces=True).kept > rehearsed(tiny, few).kept
    assert torch.nn.functional.linear is own


def test_every_architecture_has_a_pace(models: dict[str, Path]):
    adapter = Adapter(placement="kv", rank=2)
    for name, model in models.items():
        asked: list[int] = []

        def roofline(work: Work, asked: list[int] = asked) -> float:
            asked.append(work.flops)
            return 1e-3

        found = pace(case_of(model, adapter), torch.device("cpu"), roofline)
        expected = rehearsed(model, adapter)
        phases = {**expected.phases("dense", online=True), **expected.phases("sparse", online=True)}
        assert set(found) == {*phases, "measure"}, name
        assert all(0 < value < 1e5 for value in found.values()), name
        # Two layers at the most, and the whole head: no more than the model does.
        assert 0 < sum(asked) <= sum(phase.work.flops for phase in (*phases.values(), expected.measure)), name


def test_rehearsing_takes_no_memory_and_moves_no_random_state(tiny: Path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    rehearsed(tiny, Adapter(placement="kv", rank=2))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_learning_head_and_all_parameters(tiny: Path):
    case = case_of(tiny, Adapter(), Train(parameters="all"))
    everything = rehearse(case, checkpointing=False, in_pieces=False)
    assert set(everything.loss) == {"dense"}
    assert everything.trainable == everything.student.elements
