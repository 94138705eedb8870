"""Models that other tools quantized: unpacked to the numbers they compute with, repaired beside their packed base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eval.config import Evaluate
from launch.diagnose import diagnose
from launch.models import resolve_model
from launch.recipe import Recipe
from recovery.adapters import load_adapter
from recovery.corpus import read_split
from recovery.errors import UserError
from recovery.files import HashMemory
from recovery.vocabulary import load_vocabulary, used_width
from tests.conftest import make_model
from tests.packed import write_fp8, write_gguf, write_integers, write_nf4
from tests.pipeline import job_of, make_benchmarks, measure, model_at, run_in_process, tiny_recipe

KINDS = ("fp8", "nf4", "gguf", "gptq", "awq")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "reference", extra=("ab",))


@pytest.fixture(scope="module")
def packed(reference: Path) -> dict[str, tuple[Path, dict[str, Tensor]]]:
    """Each kind's folder or file, and what its weights stand for where that is known without reading it."""
    folder = reference.parent
    write_nf4(reference, folder / "nf4")
    return {
        "fp8": (folder / "fp8", write_fp8(reference, folder / "fp8")),
        "nf4": (folder / "nf4", {}),
        "gguf": (folder / "model.gguf", write_gguf(reference, folder / "model.gguf")),
        "gptq": (folder / "gptq", write_integers(reference, folder / "gptq", "gptq")),
        "awq": (folder / "awq", write_integers(reference, folder / "awq", "awq", version="gemm", zero_point=True)),
    }


def repair_recipe(reference: Path, degraded: Path, data: Path, train: dict[str, Any]) -> Recipe:
    return tiny_recipe(
        reference,
        data,
        models={"degraded": str(degraded)},
        degrade=None,
        adapter={"placement": "attention_mlp", "rank": 24, "init": "closed_form_sequential"},
        train=train,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_unpacked_to_what_they_stand_for(packed: dict[str, tuple[Path, dict[str, Tensor]]], kind: str):
    path, meant = packed[kind]
    found = dict(model_at(path).named_parameters())
    assert all(weight.dtype == torch.float32 for weight in found.values())
    assert {name: weight.shape for name, weight in meant.items()}.items() <= {
        name: weight.shape for name, weight in found.items()
    }.items()
    for name, weight in meant.items():
        assert torch.equal(found[name], weight), name


def test_an_unpacked_model_gives_the_packed_ones_logits(packed: dict[str, tuple[Path, dict[str, Tensor]]]):
    from transformers import AutoModelForCausalLM

    path, _ = packed["nf4"]
    ids = torch.arange(3, 40)[None]
    own: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    torch.testing.assert_close(model_at(path)(ids).logits, own(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS[:-1])  # AWQ is loaded as GPTQ is
def test_the_whole_pipeline_takes_them_and_leaves_them_as_they_are(
    reference: Path, packed: dict[str, tuple[Path, dict[str, Tensor]]], tmp_path: Path, kind: str
):
    path, _ = packed[kind]
    recipe = repair_recipe(reference, path, make_benchmarks(tmp_path / "data"), {"epochs": 3, "learning_rate": 1e-3})
    folders = run_in_process(recipe, tmp_path / "runs")
    summary = json.loads((folders["report"] / "summary.json").read_text())
    assert summary["kl"]["recovered"] < 0.5 * summary["kl"]["degraded"]
    base = json.loads((folders["train"] / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(path)


def test_the_adapter_fits_the_packed_base(
    reference: Path, packed: dict[str, tuple[Path, dict[str, Tensor]]], tmp_path: Path
):
    """Plain PEFT on bitsandbytes' own packed modules."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    path, _ = packed["nf4"]
    recipe = repair_recipe(reference, path, make_benchmarks(tmp_path / "data"), {"epochs": 0})
    folders = run_in_process(recipe, tmp_path / "runs", until="repair")
    base: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert type(base.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    for module in base.modules():
        if type(module).__name__ == "Linear4bit":
            # Its kernel for processors with AVX-512 bfloat16 rounds to bfloat16 and takes no width of 96.
            module.support_avx512bf16_for_cpu = False
    adapted = PeftModel.from_pretrained(base, folders["repair"]).eval()
    ours = load_adapter(model_at(path), folders["repair"])
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(adapted(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-4)
    width = used_width(load_vocabulary(str(reference)), load_vocabulary(str(path)))
    lines = (folders["repair"] / "held_out.jsonl").read_text().splitlines()
    held_out = read_split(folders["generate"], "held_out")
    assert measure(ours, model_at(reference), held_out, width, 256, "").kl == pytest.approx(
        json.loads(lines[-1])["kl"], rel=1e-3
    )


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_diagnosed(reference: Path, packed: dict[str, tuple[Path, dict[str, Tensor]]], kind: str):
    text = diagnose(reference, packed[kind][0], None, 0)
    assert "14 of" in text  # the projections of two layers
    assert "Information was lost: recover it with adapters." in text


def test_a_gguf_file_is_known_by_its_content(packed: dict[str, tuple[Path, dict[str, Tensor]]], tmp_path: Path):
    path, _ = packed["gguf"]
    found = resolve_model(str(path), None, "models.degraded", HashMemory(None))
    (tmp_path / "copy.gguf").write_bytes(path.read_bytes())
    copied = resolve_model(str(tmp_path / "copy.gguf"), None, "models.degraded", HashMemory(None))
    assert found.digest == copied.digest
    (tmp_path / "bad.gguf").write_bytes(b"none")
    with pytest.raises(UserError, match="not a GGUF file"):
        resolve_model(str(tmp_path / "bad.gguf"), None, "models.degraded", HashMemory(None))
    with pytest.raises(UserError, match="no file"):
        resolve_model(str(tmp_path / "none.gguf"), None, "models.degraded", HashMemory(None))
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:900])
    with pytest.raises(UserError, match="tokens cannot be read"):
        load_vocabulary(str(tmp_path / "cut.gguf"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_again_is_not_packed_again(
    packed: dict[str, tuple[Path, dict[str, Tensor]]], tmp_path: Path, kind: str
):
    model = model_at(packed[kind][0])
    model.save_pretrained(tmp_path / "saved")
    again = dict(model_at(tmp_path / "saved").named_parameters())
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    for name, weight in model.named_parameters():
        assert torch.equal(again[name], weight), name


def test_all_parameters_of_a_packed_model_learn(
    reference: Path, packed: dict[str, tuple[Path, dict[str, Tensor]]], tmp_path: Path
):
    recipe = tiny_recipe(
        reference,
        tmp_path,
        models={"degraded": str(packed["fp8"][0])},
        degrade=None,
        train={"parameters": "all", "epochs": 2, "learning_rate": 5e-4},
    ).model_copy(update={"evaluate": Evaluate(suite="none")})
    folders = run_in_process(recipe, tmp_path / "runs")
    kl = json.loads((folders["report"] / "summary.json").read_text())["kl"]
    assert kl["recovered"] < kl["degraded"]
    assert "## Use the model" in (folders["report"] / "report.md").read_text()


def test_experts_of_a_packed_model_are_found(models: dict[str, Path], tmp_path: Path):
    write_fp8(models["mixtral"], tmp_path / "fp8")
    text = diagnose(models["mixtral"], tmp_path / "fp8", None, 0)
    assert "missing" not in text
    assert "Information was lost: recover it with adapters." in text


def test_what_cannot_be_unpacked_is_refused_at_once(models: dict[str, Path], reference: Path, tmp_path: Path):
    write_fp8(models["deepseek_v3"], tmp_path / "fp8")  # whose latents are 40 wide
    recipe = tiny_recipe(models["deepseek_v3"], tmp_path, models={"degraded": str(tmp_path / "fp8")}, degrade=None)
    recipe = recipe.model_copy(update={"evaluate": Evaluate(suite="none")})
    with pytest.raises(UserError, match="no multiple of its blocks"):
        job_of(recipe, tmp_path, "train")
    write_integers(reference, tmp_path / "marlin", "gptq", checkpoint_format="marlin")
    recipe = tiny_recipe(reference, tmp_path, models={"degraded": str(tmp_path / "marlin")}, degrade=None)
    recipe = recipe.model_copy(update={"evaluate": Evaluate(suite="none")})
    with pytest.raises(UserError, match="gptq in the layout 'marlin'; give its weights dequantized, or as 'gptq'"):
        job_of(recipe, tmp_path, "train")
    config = json.loads((reference / "config.json").read_text()) | {"quantization_config": {"quant_method": "hqq"}}
    (tmp_path / "marlin" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="quantized with hqq; give its weights dequantized"):
        job_of(recipe, tmp_path, "train")


@pytest.mark.parametrize(
    ("bits", "more"),
    [
        (2, {}),
        (3, {"sym": True}),
        (8, {"checkpoint_format": "gptq"}),
        (3, {"checkpoint_format": "gptq_v2"}),
        (4, {"format": "gptq_v2"}),
    ],
)
def test_gptq_of_every_width(reference: Path, tmp_path: Path, bits: int, more: dict[str, Any]):
    meant = write_integers(reference, tmp_path / "packed", "gptq", bits, **more)
    found = dict(model_at(tmp_path / "packed").named_parameters())
    assert len(meant) == 14
    for name, weight in meant.items():
        assert torch.equal(found[name], weight), name


def test_experts_packed_one_by_one_are_put_together(models: dict[str, Path], tmp_path: Path):
    meant = write_integers(models["mixtral"], tmp_path / "gptq", "gptq")
    experts = model_at(tmp_path / "gptq").model.layers[0].mlp.experts
    first = "model.layers.0.block_sparse_moe.experts.0"
    assert torch.equal(experts.gate_up_proj[0], torch.cat([meant[f"{first}.{part}.weight"] for part in ("w1", "w3")]))
    assert torch.equal(experts.down_proj[0], meant[f"{first}.w2.weight"])


def test_parts_that_fit_no_packed_matrix_are_named(reference: Path, tmp_path: Path):
    write_integers(reference, tmp_path / "awq", "awq")
    file, up = tmp_path / "awq" / "model.safetensors", "model.layers.1.mlp.up_proj"
    whole = load_file(file)
    # Scales of activations, as AutoAWQ puts them beside some architectures' MLPs; a part missing; words of 16 bits.
    narrow = {f"{up}.{part}": whole[f"{up}.{part}"].view(torch.int16) for part in ("qweight", "qzeros")}
    for change, gone, found in (
        ({"model.layers.0.mlp.act.scales": torch.ones(8)}, "", "mlp.act.scales belongs to no packed matrix"),
        ({}, f"{up}.scales", r"up_proj cannot be unpacked: it has qweight \(64, 12\) torch.int32"),
        (narrow, "", "up_proj cannot be unpacked"),
    ):
        stored = {name: tensor for name, tensor in (whole | change).items() if name != gone}
        save_file(stored, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match=found):
            model_at(tmp_path / "awq")
