"""Checkpoints of training: safetensors, verified by hash before use, the last two kept."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from recovery.errors import UserError
from recovery.files import read_json, write_atomic, write_json

KEEP = 2
log = logging.getLogger("recover-lora")


def save_checkpoint(folder: Path, step: int, state: dict[str, Tensor]) -> None:
    """Write the state after `step` steps; its note (`step-N.json`) comes last and makes it count."""
    folder.mkdir(exist_ok=True)
    payload = save(state)
    path = folder / f"step-{step:08d}.safetensors"
    write_atomic(path, payload)
    write_json(path.with_suffix(".json"), {"step": step, "sha256": hashlib.sha256(payload).hexdigest()})
    for old in sorted(folder.glob("step-*.json"))[:-KEEP]:
        old.with_suffix(".safetensors").unlink(missing_ok=True)
        old.unlink()


def load_checkpoint(folder: Path) -> tuple[int, dict[str, Tensor]] | None:
    """(step, state) of the last checkpoint whose hash is right, or None. A damaged one is named and passed over."""
    for note in sorted(folder.glob("step-*.json"), reverse=True):
        path = note.with_suffix(".safetensors")
        with contextlib.suppress(UserError, OSError, KeyError, TypeError, ValueError, SafetensorError):
            about = read_json(note)
            payload = path.read_bytes()
            if hashlib.sha256(payload).hexdigest() == about["sha256"]:
                return int(about["step"]), load(payload)
        log.warning("checkpoint %s is damaged; trying the one before", path)
    return None
