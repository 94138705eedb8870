"""Where a model is read from: a folder or hub id of safetensors, or a GGUF file. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

GGUF = ".gguf"


def is_gguf(path: str) -> bool:
    return path.endswith(GGUF)


def pretrained(path: str, revision: str | None = None) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` takes for this model: a folder or hub id, and its own arguments."""
    if is_gguf(path):
        file = Path(path)
        return str(file.parent), {"gguf_file": file.name}
    return path, {"revision": revision}
