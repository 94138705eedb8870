"""Files: hashing (remembered for large ones), atomic writing, JSON."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recovery.errors import UserError

HISTORY, HELD_OUT = "history.jsonl", "held_out.jsonl"
"""Of an adapter's artifact: one line a step, and one line a measurement."""


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def digest_of(listing: Mapping[str, str]) -> str:
    """One hash of a folder, from those of its files by name."""
    return hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()


def arrow_files(folder: Path) -> list[Path]:
    """What `Dataset.save_to_disk` wrote there."""
    return sorted(folder.glob("data-*.arrow"))


def write_atomic(path: Path, data: bytes | memoryview | str, *, private: bool = False) -> None:
    """Write through a temporary sibling, synced and renamed: `path` holds all of `data` or what it held before.

    private: only the user may read it.
    """
    payload = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # two processes may write the same file
    try:
        if private:
            temporary.unlink(missing_ok=True)  # one with other rights would keep them
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT, 0o600))
        with temporary.open("wb") as stream:
            stream.write(payload)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: object) -> None:
    write_atomic(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file that another process may be writing: one without its end is left out. [] without it."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def held_out_lines(folder: Path) -> list[dict[str, Any]]:
    """The measurements of the held-out text itself, in an adapter's folder, in their order."""
    return [line for line in read_lines(folder / HELD_OUT) if line["split"] == "held_out"]


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(str(path), f"not readable as JSON ({error})", "restore or remove it") from error


def read_notes(path: Path) -> dict[str, Any]:
    """A JSON object that is written when there is first something to note; {} before."""
    return read_json(path) if path.exists() else {}


def sync_file(path: Path) -> None:
    """What was appended to it is on the disk, whatever happens to the host."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make a rename inside `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class HashMemory:
    """Hashes of files, remembered by size and mtime, so that a 140 GB folder is not read at every start.

    path: JSON file that keeps them; None remembers within this process only.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, list[Any]] = {}
        self._changed = False
        if path is not None and path.exists():
            try:
                self._known = json.loads(path.read_text())
            except (OSError, ValueError):
                self._known = {}  # a cache: rebuilt from the files themselves

    def sha256(self, path: Path) -> str:
        resolved = path.resolve()
        status = resolved.stat()
        stamp = [status.st_size, status.st_mtime_ns]
        known = self._known.get(str(resolved))
        if known is not None and known[:2] == stamp:
            return str(known[2])
        digest = sha256_of(resolved)
        self._known[str(resolved)] = [*stamp, digest]
        self._changed = True
        return digest

    def save(self) -> None:
        if self._path is not None and self._changed:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, self._known)
            self._changed = False
