"""A checkpoint as a GGUF file, by llama.cpp's own converter."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

from recovery.config import Dtype
from recovery.errors import Unavailable

log = logging.getLogger("recover-lora")
CONVERTER = "convert_hf_to_gguf.py"
TYPES: dict[str, str] = {"bfloat16": "bf16", "float32": "f32"}
"""llama.cpp's names of the types that keep the weights as they are."""


def write_gguf(model: Path, file: Path, llama_cpp: Path, dtype: Dtype) -> None:
    """model: folder of a checkpoint. llama_cpp: folder with the converter. Raises Unavailable with the converter's last
    words where it fails."""
    command = [
        sys.executable,
        str(llama_cpp / CONVERTER),
        str(model),
        "--outfile",
        str(file),
        "--outtype",
        TYPES[dtype],
    ]
    file.parent.mkdir(exist_ok=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if result.returncode != 0 or not file.exists():
        lines = [line for line in (result.stderr or result.stdout).splitlines() if line.strip()]
        raise Unavailable(f"{CONVERTER} ended with {result.returncode}: {lines[-1] if lines else 'no word'}")
    log.info("%s: %.1f MB", file.name, file.stat().st_size / 1e6)
