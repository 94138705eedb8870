"""A folder's weights, a tensor at a time, from safetensors: what transformers would load, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from recovery.errors import UserError
from recovery.files import read_json

BUFFERS = ("inv_freq", "masked_bias", "attn.bias")
"""Ends of the names of tensors that old checkpoints hold and no model needs."""


@dataclass
class Checkpoint:
    """The tensors of a folder, by name, read when they are asked for."""

    folder: Path
    files: dict[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path in weight_files(self.folder):
            try:
                with safe_open(path, framework="pt") as file:
                    self.files |= dict.fromkeys(file.keys(), path)
            except (SafetensorError, OSError) as error:
                found = f"not a whole safetensors file ({error})"
                raise UserError(str(path), found, "copy or export it again") from error
        self.files = {name: path for name, path in self.files.items() if not name.endswith(BUFFERS)}
        if not self.files:
            raise UserError(str(self.folder), "no .safetensors file in it", "give the folder of a complete model")

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name)

    def shape_of(self, name: str) -> tuple[int, ...]:
        with safe_open(self.files[name], framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads; others beside them (consolidated.safetensors) hold the same weights again."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return sorted({folder / name for name in read_json(index)["weight_map"].values()})
    whole = folder / "model.safetensors"
    return [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
