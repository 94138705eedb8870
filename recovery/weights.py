"""A checkpoint's weights, a tensor at a time: what transformers would load, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from recovery.config import ModelInput
from recovery.errors import UserError
from recovery.files import read_json
from recovery.sources import is_gguf, weight_files

BUFFERS = ("inv_freq", "masked_bias", "attn.bias")
"""Ends of the names of tensors that old checkpoints hold and no model needs."""


class Checkpoint:
    """The tensors of a folder of safetensors, by name, read when they are asked for.

    loaded: as transformers loads and names them, all at once; for quantized folders and GGUF files.
    """

    def __init__(self, path: Path, *, loaded: bool = False) -> None:
        self._files: dict[str, Path] = {}
        self._unpacked: Mapping[str, Tensor] = {}
        if loaded:
            self._unpacked = loaded_weights(path)
            return
        for file in weight_files(path):
            try:
                with safe_open(file, framework="pt") as opened:
                    self._files |= {name: file for name in opened.keys() if not name.endswith(BUFFERS)}  # noqa: SIM118 - no mapping
            except (SafetensorError, OSError) as error:
                found = f"not a whole safetensors file ({error})"
                raise UserError(str(file), found, "copy or export it again") from error
        if not self._files:
            raise UserError(str(path), "no .safetensors file in it", "give the folder of a complete model")

    @property
    def names(self) -> list[str]:
        return sorted({**self._files, **self._unpacked})

    def __contains__(self, name: str) -> bool:
        return name in self._files or name in self._unpacked

    def __getitem__(self, name: str) -> Tensor:
        if name in self._unpacked:
            return self._unpacked[name]
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)

    def shape_of(self, name: str) -> tuple[int, ...]:
        if name in self._unpacked:
            return tuple(self._unpacked[name].shape)
        with safe_open(self._files[name], framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())


def is_packed(path: Path) -> bool:
    config = path / "config.json"
    return is_gguf(str(path)) or (config.is_file() and "quantization_config" in read_json(config))


def checkpoints(*paths: Path) -> tuple[Checkpoint, ...]:
    """Of models that are compared: where one is quantized all are loaded, as files may name tensors otherwise."""
    loaded = any(map(is_packed, paths))
    return tuple(Checkpoint(path, loaded=loaded) for path in paths)


def loaded_weights(path: Path) -> dict[str, Tensor]:
    from recovery.models import load_model

    model = load_model(ModelInput(path=str(path), digest=""), None, placed=False)
    weights: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:  # a tied one has two names
            weights[name] = tensor.detach()
        seen.add(id(tensor))
    return weights
