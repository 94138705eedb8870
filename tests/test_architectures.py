"""Every kind of architecture through the whole pipeline, as a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from recovery.adapters import load_adapter
from recovery.attention import packed
from recovery.batches import Batch, collate
from recovery.config import ModelInput
from recovery.corpus import Tokens, read_split
from recovery.loss import forward_kl
from recovery.models import causal_lm, check_training_path, final_hidden, head_of, load_model
from recovery.placement import select
from recovery.vocabulary import load_vocabulary, used_width
from tests.conftest import ARCHITECTURES, make_config
from tests.pipeline import make_benchmarks, measure, model_at, run_in_process, tiny_recipe, width_of


@pytest.fixture(scope="module")
def runs(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("architectures")
    data = make_benchmarks(folder / "data")
    # Phi-3's keys and values are in one matrix with the queries, which has twice the rank.
    ranks = {"phi3": 64}
    return {
        kind: run_in_process(tiny_recipe(models[kind], data, adapter={"rank": ranks.get(kind, 32)}), folder / kind)
        for kind in ARCHITECTURES
    }


def ids(width: int) -> torch.Tensor:
    return torch.randint(0, width, (3, 24), generator=torch.Generator().manual_seed(0))


def packed_samples(width: int) -> tuple[list[torch.Tensor], Batch]:
    """Samples of unequal length (Gemma2's window is 16), alone and packed, with loss on every position."""
    samples = [ids(width)[row, :length] for row, length in enumerate((24, 9, 17))]
    offsets = np.cumsum([0, *map(len, samples)])
    batch = collate(Tokens(np.arange(3), offsets, torch.cat(samples).int().numpy()), (0, 1, 2))
    return samples, batch


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_held_out_kl_falls_by_half(runs: dict[str, dict[str, Path]], kind: str):
    summary = json.loads((runs[kind]["report"] / "summary.json").read_text())
    assert summary["kl"]["degraded"] > 0.02
    assert summary["kl"]["recovery"] >= 0.5
    assert summary["kl"]["recovery"] == pytest.approx(1 - summary["kl"]["recovered"] / summary["kl"]["degraded"])


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_merged_weights_equal_base_plus_adapter(runs: dict[str, dict[str, Path]], kind: str):
    from peft import PeftModel

    base = model_at(runs[kind]["degrade"])
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    adapted: Any = PeftModel.from_pretrained(base, runs[kind]["train"])  # plain PEFT, as any user would
    tokens = ids(250)
    with torch.no_grad():
        unmerged = adapted(input_ids=tokens).logits
        factors = {
            name.removeprefix("base_model.model."): (module.lora_A["default"].weight, module.lora_B["default"].weight)
            for name, module in adapted.named_modules()
            if hasattr(module, "lora_A")
        }
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=tokens).logits, unmerged, rtol=1e-4, atol=1e-4)
    after = merged.state_dict()
    assert factors
    for name, weight in before.items():
        module = name.removesuffix(".weight")
        change = factors[module][1] @ factors[module][0] if module in factors else torch.zeros(1)
        torch.testing.assert_close(after[name], weight + change, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_training_path_equals_the_models_own_forward(runs: dict[str, dict[str, Path]], kind: str):
    model = load_adapter(model_at(runs[kind]["degrade"]), runs[kind]["train"])
    vocabulary = load_vocabulary(str(runs[kind]["degrade"]))
    width = used_width(vocabulary, vocabulary)
    assert width == len(vocabulary.tokens)
    tokens, batch = packed_samples(width)
    with torch.no_grad():
        own = torch.cat([model(input_ids=sample[None]).logits[0, :, :width] for sample in tokens])
        with packed(causal_lm(model)):
            ours = head_of(model, width).logits(final_hidden(model, batch))
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_gradients_equal_autograd_through_the_models_own_logits(models: dict[str, Path], kind: str):
    """Packed training against dense losses of single samples, which know nothing of hidden states or packing."""
    student, teacher = model_at(models[kind]), model_at(models[kind])
    width = 200
    tokens, batch = packed_samples(width)
    weight = student.get_submodule(select(student, ["kv"], "test")[1]).weight
    weight.requires_grad_()
    with torch.no_grad():
        weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        reference_logits = torch.cat([teacher(input_ids=sample[None]).logits[0, :, :width] for sample in tokens])
        with packed(teacher):
            reference = final_hidden(teacher, batch)
    logits = torch.cat([student(input_ids=sample[None]).logits[0, :, :width] for sample in tokens])
    dense = torch.nn.functional.kl_div(
        torch.log_softmax(logits, -1), torch.log_softmax(reference_logits, -1), reduction="sum", log_target=True
    )
    (expected,) = torch.autograd.grad(dense, weight)
    with packed(student):
        hidden = final_hidden(student, batch)
        total = forward_kl(hidden, head_of(student, width), reference, head_of(teacher, width))
    (found,) = torch.autograd.grad(total, weight)
    torch.testing.assert_close(total, dense, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_adapter_reproduces_the_scored_kl(runs: dict[str, dict[str, Path]], kind: str):
    from peft import PeftModel

    folders = runs[kind]
    adapted: Any = PeftModel.from_pretrained(model_at(folders["degrade"]), folders["train"])
    reference_folder = Path(json.loads((folders["train"] / "manifest.json").read_text())["job"]["reference"]["path"])
    text = read_split(folders["generate"], "held_out")
    found = measure(adapted, model_at(reference_folder), text, width_of(reference_folder), 320, "")
    scored = json.loads((folders["report"] / "summary.json").read_text())["kl"]["recovered"]
    assert found.kl == pytest.approx(scored, rel=1e-4)


def test_bos_carries_no_loss_and_padding_of_the_head_no_mass(runs: dict[str, dict[str, Path]]):
    assert read_split(runs["llama"]["generate"], "train").skip == 1
    assert read_split(runs["qwen2"]["generate"], "train").skip == 0
    tokens = read_split(runs["llama"]["generate"], "train")
    assert all(tokens.row(position)[0] == 0 for position in range(len(tokens)))
    assert int(read_split(runs["qwen2"]["generate"], "train").ids.max()) < 259


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_bfloat16_model_is_the_one_that_others_load(models: dict[str, Path], kind: str):
    """Its rotary frequencies too, which transformers keeps in float32."""
    ours: Any = load_model(ModelInput(path=str(models[kind]), digest=""), "bfloat16")
    theirs: Any = AutoModelForCausalLM.from_pretrained(models[kind], dtype=torch.bfloat16).eval()
    kept = dict(theirs.named_buffers())
    assert any("inv_freq" in name and one.dtype == torch.float32 for name, one in kept.items())
    for name, one in (*ours.named_buffers(), *ours.named_parameters()):
        other = kept[name] if name in kept else theirs.get_parameter(name)
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_a_window_that_only_the_mask_knows_is_kept():
    config = make_config("qwen2_moe", 259)
    config.sliding_window, config.layer_types = 4, ["sliding_attention"] * 2
    torch.manual_seed(0)
    check_training_path(AutoModelForCausalLM.from_config(config).eval(), 259, "windows")
