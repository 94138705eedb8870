"""Which outputs count: gradients layer by layer, what a change costs, and where ranks buy most."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recovery.train
from recovery.adapters import load_adapter
from recovery.allocation import Spectrum, allocate, spectrum
from recovery.batches import Batch, collate
from recovery.closed_form import Metric, Moments, OutputMetric
from recovery.corpus import Split, Tokens, read_split
from recovery.costs import predict, saturated, weigh
from recovery.curvature import POWER, Sensitivity, drawn, sensitivities
from recovery.errors import UserError
from recovery.experts import matrix_at
from recovery.layerwise import back_through, begin, layers_of, output_of
from recovery.limits import put_right
from recovery.models import check_training_path, final_hidden, head_of
from recovery.stage import build
from recovery.survey import token_weights
from tests.conftest import ARCHITECTURES
from tests.pipeline import job_of, measure, model_at, tiny_recipe, width_of
from tests.test_repair import CPU, repair_with

Prepared = tuple[Path, Path, Path]


def text_of(prepared: Prepared, split: Split = "train") -> Tokens:
    return read_split(next((prepared[2] / "artifacts").glob("generate-*")), split)


def sense(model: Any, batches: list[Batch], width: int) -> dict[str, Sensitivity]:
    """Of every linear module inside the layers, by full name."""
    streams = [begin(model, batch) for batch in batches]
    names = [
        {name: f"model.layers.{number}.{name}" for name, part in layer.named_modules() if isinstance(part, nn.Linear)}
        for number, layer in enumerate(layers_of(model))
    ]
    walk = sensitivities(model, streams, names, width, 0, CPU, with_inputs=True)
    return {names[number][name]: one for number, found in walk for name, one in found.items()}


def cost(change_OI: Tensor, sensitivity: Sensitivity) -> float:
    """1/2 tr(G D C D^T), term by term."""
    assert sensitivity.inputs is not None
    inputs_II = sensitivity.inputs / sensitivity.weight
    curvature = sensitivity.curvature
    weights_OO = curvature if curvature.dim() == 2 else torch.diag(curvature)
    return 0.5 * float(torch.trace(weights_OO @ change_OI.double() @ inputs_II @ change_OI.double().T))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_gradients_layer_by_layer_are_those_of_the_whole_model(models: dict[str, Path], prepared: Prepared, kind: str):
    model, width = model_at(models[kind]), width_of(models[kind])
    check_training_path(model, width, kind)
    batch = collate(text_of(prepared), (0, 1, 2))
    found = sense(model, [batch], width)
    outputs: dict[str, Tensor] = {}
    for name in found:
        model.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: outputs.update({name: output}))
    model.requires_grad_(True)
    hidden_TH = final_hidden(model, batch)
    stream = begin(model, batch)
    gradient_TH = drawn(stream, head_of(model, width), 0)(hidden_TH.detach())
    reached = [name for name in found if name in outputs]
    gradients = torch.autograd.grad(hidden_TH, [outputs[name] for name in reached], gradient_TH)
    assert len(reached) >= 8
    for name, gradient in zip(reached, gradients, strict=True):
        flat_TO = gradient.flatten(0, -2)
        expected = (flat_TO.T @ flat_TO).double() / len(flat_TO)
        torch.testing.assert_close(found[name].curvature, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3", "qwen2_moe"])
def test_gradients_of_single_experts_are_those_of_their_parameters(
    models: dict[str, Path], prepared: Prepared, kind: str
):
    """The gradient of a weight is the sum over tokens of gradient times input."""
    model, width = model_at(models[kind]), width_of(models[kind])
    check_training_path(model, width, kind)
    stream = begin(model, collate(text_of(prepared), (0, 1, 2)))
    first, layer = layers_of(model)
    stream.states_1TH = output_of(first, 0, stream, CPU)
    names = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    found: dict[str, Tensor] = {}

    def take(name: str, inputs_TI: Tensor, gradients_TO: Tensor) -> None:
        found[name] = gradients_TO.T @ inputs_TI

    to_1TH = torch.randn(stream.states_1TH.shape, generator=torch.Generator().manual_seed(0))
    back_through(layer, {name: matrix_at(layer, name) for name in names}, 1, stream, to_1TH, CPU, take)
    weights = [layer.get_parameter(name).requires_grad_() for name in names]
    with torch.enable_grad():
        positional, named = stream.calls[1]
        output = layer(stream.states_1TH, *positional, **named)
        expected = torch.autograd.grad(output[0] if isinstance(output, tuple) else output, weights, to_1TH)
    assert found
    for name, gradient_EOI in zip(names, expected, strict=True):
        for expert, gradient_OI in enumerate(gradient_EOI):
            own_OI = found.get(f"{name}.{expert}", torch.zeros_like(gradient_OI))
            torch.testing.assert_close(own_OI, gradient_OI, rtol=1e-3, atol=1e-5 * float(gradient_EOI.abs().max()))


def test_inputs_of_many_wide_experts_are_told_by_their_squares():
    """What costs is the same as with uncorrelated inputs of the same squares."""
    generator = torch.Generator().manual_seed(0)
    reference, degraded, inputs = (torch.randn(8, 12, generator=generator) for _ in range(3))
    squares_I, one = inputs.double().square().sum(0), torch.tensor(1.0).double()
    gradients = torch.rand(8, generator=generator).double()
    spectra = [
        spectrum(reference, degraded, Sensitivity(gradients, moments, one, one), 0.1, 0.1)
        for moments in (squares_I, torch.diag(squares_I))
    ]
    torch.testing.assert_close(spectra[0].gains_K, spectra[1].gains_K)


def test_what_a_change_costs_is_its_kl(models: dict[str, Path], prepared: Prepared):
    """Small noise on one module at a time: predicted without running the changed model, measured with it."""
    folder = models["llama"]
    model, changed, width = model_at(folder), model_at(folder), width_of(folder)
    check_training_path(model, width, "llama")
    tokens = text_of(prepared)
    found = sense(model, [collate(tokens, tuple(range(first, first + 8))) for first in range(0, 48, 8)], width)
    predicted, measured = {}, {}
    for place, (name, sensitivity) in enumerate(sorted(found.items())):
        weight: Any = changed.get_submodule(name).weight
        before = weight.clone()
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(place)) * 0.1 * before.std()
        with torch.no_grad():
            weight += noise
        measured[name] = measure(changed, model_at(folder), tokens, width, 512, "").kl
        predicted[name] = cost(noise, sensitivity)
        gains = spectrum(before + noise, before, sensitivity, 1e-9, 1e-9).gains_K
        assert float(gains.sum()) == pytest.approx(predicted[name], rel=1e-3)
        with torch.no_grad():
            weight.copy_(before)
    ratios = sorted(predicted[name] / measured[name] for name in found)
    # Values are averaged over positions, whose inputs have something in common: a V projection costs more than
    # positions taken by themselves say.
    assert ratios[0] > 0.35
    assert ratios[-1] < 1.5
    assert ratios[len(ratios) // 2] == pytest.approx(1, rel=0.15)


def test_costs_of_a_checkpoint_and_forecasts_that_come_true(prepared: Prepared, tmp_path: Path):
    degraded = next((prepared[2] / "artifacts").glob("degrade-*"))
    models = model_at(prepared[0]), model_at(degraded)
    tokens = text_of(prepared)
    costs = weigh(*models, tokens, width_of(prepared[0]), seed=0).costs
    expected = measure(model_at(degraded), model_at(prepared[0]), tokens, width_of(prepared[0]), 512, "")
    assert costs.degraded.kl == pytest.approx(expected.kl, rel=1e-4)
    assert len(costs.drift) == 2
    assert costs.floor == pytest.approx(0, abs=1e-6)
    assert 0 < costs.drift[0] < 2
    assert set(costs.nats) == {f"model.layers.{n}.self_attn.{part}_proj" for n in (0, 1) for part in "kv"}
    dearest = max(costs.nats, key=costs.nats.__getitem__)
    assert costs.restored[0].module == dearest
    assert costs.restored[0].measured == pytest.approx(costs.restored[0].predicted, abs=0.35 * costs.degraded.kl)
    after = measure(models[1], models[0], tokens, width_of(prepared[0]), 512, "")
    assert after.kl == pytest.approx(expected.kl, rel=1e-4)  # what was put right for a look is wrong again
    kls = [one.kl for one in costs.forecasts]
    assert kls == sorted(kls, reverse=True)
    for rank in (4, 8, 16):
        adapter = {"init": "closed_form_sequential", "rank": rank}
        folder = repair_with(prepared, tmp_path / "runs", adapter)
        before, left = [json.loads(line)["kl"] for line in (folder / "held_out.jsonl").read_text().splitlines()]
        predicted = next(one for one in costs.forecasts if one.rank == rank)
        assert predicted.recovery == pytest.approx(1 - left / before, abs=0.15)


@pytest.mark.parametrize(("total", "kl"), [(10.0, 3.0), (3.0001, 3.0), (1e4, 5.0)])
def test_a_distribution_can_only_become_so_wrong(total: float, kl: float):
    assert saturated(total, total, kl) == pytest.approx(kl, rel=1e-6)
    assert saturated(0.0, total, kl) == 0
    left = [saturated(share * total, total, kl) for share in (0.01, 0.1, 0.5, 1.0)]
    assert left == sorted(left)
    assert all(found >= share * kl * (1 - 1e-9) for share, found in zip((0.01, 0.1, 0.5, 1.0), left, strict=True))
    assert saturated(1.0, 2.0, 3.0) == pytest.approx(1.5)


@pytest.mark.parametrize("whole", [True, False])
def test_outputs_that_count_are_repaired_first(whole: bool):
    generator = torch.Generator().manual_seed(0)
    reference, degraded = (torch.randn(12, 20, generator=generator, dtype=torch.float64) for _ in range(2))
    inputs = torch.randn(400, 20, generator=generator, dtype=torch.float64)
    moments = Moments.zero(20, CPU)
    moments.add(inputs, inputs)
    gradients = torch.randn(12, 12, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, 12)[:, None]
    curvature = gradients.T @ gradients if whole else gradients.square().sum(0)
    metric, outputs = Metric(moments, 1e-9), OutputMetric(curvature, 1e-9)

    def nats(weighed: OutputMetric | None) -> float:
        factors = metric.factors(reference, degraded, 3, 0.0, weighed)
        left = reference - degraded - factors.b_OR @ factors.a_RI
        one = torch.tensor(1.0)
        return cost(left, Sensitivity(curvature, moments.own_II, one, one))

    assert nats(outputs) < 0.9 * nats(None)
    full = metric.factors(reference, degraded, 12, 0.0, outputs)
    torch.testing.assert_close(full.b_OR @ full.a_RI, reference - degraded, rtol=1e-6, atol=1e-6)


def test_tokens_that_count_twice_are_as_good_as_two():
    generator = torch.Generator().manual_seed(0)
    own, theirs = (torch.randn(40, 8, generator=generator) for _ in range(2))
    weights = torch.randint(0, 3, (40,), generator=generator)
    weighed, repeated = Moments.zero(8, CPU), Moments.zero(8, CPU)
    weighed.add(own, theirs, weights.double())
    repeated.add(own.repeat_interleave(weights, 0), theirs.repeat_interleave(weights, 0))
    for name in ("own_II", "cross_II", "tokens"):
        torch.testing.assert_close(getattr(weighed, name), getattr(repeated, name), rtol=1e-5, atol=1e-5)


def test_weights_of_tokens_stand_in_their_places_without_the_noise_of_a_draw(prepared: Prepared):
    """Whatever forward passes the samples are packed into."""
    tokens, rows = text_of(prepared), (4, 0, 2, 1, 3)
    generator = torch.Generator().manual_seed(0)
    by_row = {row: torch.rand(int(tokens.lengths[row]), generator=generator).pow(8) for row in rows}
    one = torch.tensor(1.0)
    text = torch.cat([by_row[row] for row in rows]).double()
    text /= text.mean()
    variance = float(text.square().mean()) - 1
    assert variance > 2
    for groups in ([(0, 1, 2, 3, 4)], [(3, 0), (2, 4), (1,)]):
        weights = [(collate(tokens, group), torch.cat([by_row[row] for row in group])) for group in groups]
        found = token_weights(Sensitivity(one, None, one, one, weights), tokens, rows, 1)
        assert found is not None
        torch.testing.assert_close(found, 1 + (1 - 1 / variance) * (text - 1), rtol=1e-5, atol=1e-6)
        assert token_weights(Sensitivity(one, None, one, one, weights[1:]), tokens, rows, 1) is None
    batch = collate(tokens, rows)
    drawn_T = torch.randn(len(batch.ids_T), generator=generator).abs().pow(2 * POWER)
    noise = Sensitivity(one, None, one, one, [(batch, 0.5 + drawn_T)])
    assert token_weights(noise, tokens, rows, 1) is None


def test_a_token_weighs_what_its_gradient_does(models: dict[str, Path], prepared: Prepared):
    model, width = model_at(models["llama"]), width_of(models["llama"])
    check_training_path(model, width, "llama")
    batch = collate(text_of(prepared), (0, 1, 2))
    for sensitivity in sense(model, [batch], width).values():
        ((of, weights_T),) = sensitivity.weights
        assert of.rows == batch.rows
        assert len(weights_T) == len(batch.ids_T)
        assert float(weights_T.double().pow(1 / POWER).sum()) == pytest.approx(
            float(sensitivity.gradients.trace() if sensitivity.gradients.dim() == 2 else sensitivity.gradients.sum()),
            rel=1e-4,
        )


def test_ranks_go_where_they_save_most_for_their_price():
    generator = torch.Generator().manual_seed(0)
    prices = {"a": 3, "b": 5, "c": 7}
    spectra = {
        name: Spectrum(torch.rand(4, generator=generator).double().sort(descending=True).values, price)
        for name, price in prices.items()
    }

    def value(ranks: dict[str, int]) -> float:
        return sum(float(spectra[name].gains_K[:rank].sum()) for name, rank in ranks.items())

    for budget in (2, 3, 20, 37, 60, 1000):
        found = allocate(spectra, budget)
        assert sum(prices[name] * rank for name, rank in found.items()) <= budget
        everything = itertools.product(range(5), repeat=3)
        affordable = [
            dict(zip(prices, ranks, strict=True))
            for ranks in everything
            if sum(price * rank for price, rank in zip(prices.values(), ranks, strict=True)) <= budget
        ]
        # Greedy by worth a parameter: short of the best by less than the one direction that did not fit.
        dearest = max(float(found.gains_K[0]) for found in spectra.values())
        assert value(found) >= max(map(value, affordable)) - dearest
        assert all(found.values())
    assert allocate({"a": Spectrum(torch.zeros(3).double(), 1)}, 10) == {}


def test_forecasts_do_not_promise_what_adapters_cannot_reach(prepared: Prepared):
    """K and V are damaged a little, the last norm a lot."""
    reference, degraded = model_at(prepared[0]), model_at(prepared[0])
    with torch.no_grad():
        degraded.model.norm.weight.mul_(0.5)
        for name in ("k_proj", "v_proj"):
            weight = degraded.model.layers[0].self_attn.get_submodule(name).weight
            weight += 0.05 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    costs = weigh(reference, degraded, text_of(prepared), width_of(prepared[0]), seed=0).costs
    assert costs.floor > 0.8 * costs.degraded.kl
    assert all(one.kl >= costs.floor for one in costs.forecasts)
    assert max(one.recovery for one in costs.forecasts) < 0.2


def test_a_forecast_takes_the_damage_that_is_left_alone_as_measured(prepared: Prepared):
    """K is damaged a lot, the second layer's MLP too; adapters of full rank on K leave what the MLP costs."""
    reference, degraded = model_at(prepared[0]), model_at(prepared[0])
    generator = torch.Generator().manual_seed(0)
    keys = [f"model.layers.{number}.self_attn.k_proj" for number in (0, 1)]
    with torch.no_grad():
        for name in (*keys, "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"):
            weight = degraded.get_submodule(name).weight
            weight += 0.5 * weight.std() * torch.randn(weight.shape, generator=generator)
    place, width = frozenset(keys), width_of(prepared[0])
    weighed = weigh(reference, degraded, text_of(prepared), width, seed=0, checked=0, places=[place])
    put_right(degraded, reference, keys)
    expected = measure(degraded, reference, text_of(prepared), width, 512, "").kl
    kl = weighed.costs.degraded.kl
    assert 0 < expected < kl
    assert weighed.floors[place] == pytest.approx(expected, rel=1e-4)
    assert predict(weighed.spectra, dict.fromkeys(keys, 64), kl, weighed.floors[place]) == pytest.approx(
        expected, rel=1e-4
    )
    assert predict(weighed.spectra, dict.fromkeys(keys, 0), kl, weighed.floors[place]) == pytest.approx(kl, rel=1e-4)


def test_a_budget_too_small_for_a_single_rank_is_the_users_mistake(prepared: Prepared, tmp_path: Path):
    adapter = {"placement": "auto", "init": "closed_form", "budget": 10}
    with pytest.raises(UserError, match=r"adapter\.budget: 10 is less than a single rank"):
        repair_with(prepared, tmp_path / "runs", adapter)


def test_auto_adapts_what_is_damaged_and_training_goes_on_from_there(prepared: Prepared, tmp_path: Path):
    model, data, source = prepared
    adapter = {"placement": "auto", "init": "closed_form_sequential", "rank": 12}
    repaired = repair_with(prepared, tmp_path / "runs", adapter)
    config = json.loads((repaired / "adapter_config.json").read_text())
    ranks = config["rank_pattern"]
    assert config["alpha_pattern"] == ranks
    assert set(config["target_modules"]) == set(ranks)
    assert all(name.endswith(("k_proj", "v_proj")) for name in ranks)
    assert len(set(ranks.values())) > 1
    details = json.loads((repaired / "manifest.json").read_text())["details"]
    budget = 12 * sum(2 * (64 + 32) for _ in range(2))
    assert 0.9 * budget < details["trainable_parameters"] <= budget
    recipe = tiny_recipe(model, data, adapter=adapter, train={"epochs": 4, "learning_rate": 1e-3})
    trained = build(job_of(recipe, tmp_path / "runs", "train"), recovery.train.produce, resumable=True)
    lines = [json.loads(line) for line in (trained / "held_out.jsonl").read_text().splitlines()]
    kls = [line["kl"] for line in lines if line["split"] == "held_out"]
    last = json.loads((repaired / "held_out.jsonl").read_text().splitlines()[-1])["kl"]
    assert kls[0] == pytest.approx(last, rel=1e-4)
    assert min(kls[1:]) < kls[0]
    base = model_at(next((source / "artifacts").glob("degrade-*")))
    found = measure(
        load_adapter(base, trained), model_at(model), text_of(prepared, "held_out"), width_of(model), 512, ""
    )
    assert found.kl == pytest.approx(min(kls), rel=1e-4)
