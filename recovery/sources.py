"""Where a model is read from: a folder or hub id of safetensors, or a GGUF file; how a quantized one is unpacked."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recovery.errors import UserError
from recovery.files import read_json

GGUF = ".gguf"
PACKAGES = {"gguf": "gguf", "bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed_tensors"}
"""What unpacks a format, beside transformers itself."""
INTEGERS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}
"""Formats that recovery.integers unpacks, and the layouts it knows of each; the first is meant where none is named."""
GPTQ_BITS = (2, 3, 4, 8)
FORMATS = ("fp8", "mxfp4", *INTEGERS, *PACKAGES)


def is_gguf(path: str) -> bool:
    return path.endswith(GGUF)


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads; others beside them (consolidated.safetensors) hold the same weights again.

    Raises UserError for an index that names a file which is not there, or not in this folder.
    """
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if whole.is_file():  # which transformers takes before an index
        return [whole]
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    content = read_json(index)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise UserError(str(index), "no weight_map in it", "copy or export the model again")
    present = {path.name: path for path in folder.glob("*.safetensors")}
    named = set(map(str, shards.values()))
    if missing := sorted(named - set(present)):
        raise UserError(str(index), f"names {missing[0]!r}, which is not in the folder", "copy the model again, whole")
    return [present[name] for name in sorted(named)]


def pretrained(path: str, revision: str | None = None) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` takes for this model: a folder or hub id, and its own arguments.

    Left out, trust_remote_code would have transformers ask on a terminal whether to run a model's own code.
    """
    safe = {"trust_remote_code": False}
    if is_gguf(path):
        file = Path(path)
        return str(file.parent), {"gguf_file": file.name, **safe}
    return path, {"revision": revision, **safe}


def load_tokenizer(path: str, revision: str | None = None) -> Any:
    """The model's own tokenizer, without a check."""
    from transformers import AutoTokenizer

    place, arguments = pretrained(path, revision)
    return AutoTokenizer.from_pretrained(place, **arguments)


def check_packing(path: str, config: Any) -> Mapping[str, Any]:
    """How the weights are quantized (`quant_method` and what belongs to it); empty for plain ones.

    Raises UserError for a format that is not unpacked here, or where its package is missing.
    """
    given: Any = {"quant_method": "gguf"} if is_gguf(path) else getattr(config, "quantization_config", None) or {}
    packing: Mapping[str, Any] = given if isinstance(given, Mapping) else given.to_dict()
    if not packing:
        return {}
    method = str(packing.get("quant_method"))
    if method not in FORMATS:
        known = ", ".join(FORMATS)
        raise UserError(path, f"quantized with {method}", f"give its weights dequantized; unpacked here are {known}")
    package = PACKAGES.get(method)
    if package is not None and importlib.util.find_spec(package) is None:
        raise UserError(path, f"quantized with {method}, whose package is missing", f"pip install {method}")
    if method == "fp8" and packing.get("weight_block_size") and Path(path).is_dir():
        _check_blocks(Path(path), tuple(packing["weight_block_size"]))
    if method in INTEGERS:
        _check_integers(path, method, packing)
    return packing


def layout_of(packing: Mapping[str, Any]) -> str:
    """Of a GPTQ or AWQ checkpoint, by whichever name its maker gave that field."""
    named = (packing.get(key) for key in ("checkpoint_format", "version", "format"))
    return next((str(one).lower() for one in named if one), INTEGERS[packing["quant_method"]][0])


def _check_integers(path: str, method: str, packing: Mapping[str, Any]) -> None:
    layouts, remedy = INTEGERS[method], "give its weights dequantized"
    if (layout := layout_of(packing)) not in layouts:
        raise UserError(path, f"quantized with {method} in the layout {layout!r}", f"{remedy}, or as {layouts[0]!r}")
    bits = packing.get("bits", packing.get("w_bit", 4))
    if bits not in (GPTQ_BITS if method == "gptq" else (4,)):
        raise UserError(path, f"quantized with {method} to {bits} bits", remedy)


def _check_blocks(folder: Path, block: tuple[int, ...]) -> None:
    """transformers takes the blocks of an FP8 matrix for equal parts of it: wrong where the last one is smaller."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                if not name.endswith("_scale_inv"):
                    continue
                matrix = name.removesuffix("_scale_inv")
                shape = file.get_slice(matrix).get_shape() if matrix in file.keys() else ()  # noqa: SIM118
                if any(size % side for size, side in zip(shape[-2:], block, strict=False)):
                    found = f"its FP8 matrix {matrix} is {tuple(shape)}, no multiple of its blocks of {block}"
                    raise UserError(str(folder), found, "give its weights dequantized: transformers misreads such ones")


def unpacking(packing: Mapping[str, Any], *, placed: bool) -> dict[str, Any]:
    """The arguments with which transformers unpacks such a checkpoint while it loads it, where it can."""
    match packing.get("quant_method"):
        case "gguf":
            from transformers import GgufConfig

            return {"quantization_config": GgufConfig(dequantize=True)}
        case "fp8":
            from transformers import FineGrainedFP8Config

            block: Any = packing.get("weight_block_size")
            return {"quantization_config": FineGrainedFP8Config(dequantize=True, weight_block_size=block)}
        case "mxfp4":
            from transformers.utils.quantization_config import Mxfp4Config

            return {"quantization_config": Mxfp4Config(dequantize=True)}
        case "compressed-tensors":
            from transformers import CompressedTensorsConfig

            return {"quantization_config": CompressedTensorsConfig(run_compressed=False)}
        case "bitsandbytes" if not placed:
            return {"device_map": {"": "cpu"}}  # it would take a GPU by itself
        case _:
            return {}
