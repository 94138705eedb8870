"""Artifacts: a finished stage's folder, whole or not at all, with its evidence in `manifest.json`.

A stage works in a hidden sibling `.<stage>-<hash>.partial/`, which survives a kill so that long stages go on where
they stopped, and which is renamed to `<stage>-<hash>/` when everything in it has been hashed.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from pydantic import BaseModel, ValidationError

from recovery.config import Job
from recovery.errors import DamagedArtifact, UserError
from recovery.files import HashMemory, digest_of, read_json, sync_file, sync_folder, write_json
from recovery.settings import Config

RECIPE, CLUSTER = "recipe.yaml", "cluster.yaml"
"""In a run's folder: the recipe with all overrides and where it ran, which together make the run again."""
MANIFEST = "manifest.json"
MANIFEST_SCHEMA = 1
LOCK_SECONDS = 5.0
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "deepspeed",
    "datasets",
    "lm_eval",
    "mlflow",
    "pyarrow",
    "safetensors",
    "numpy",
)
REPOSITORY = Path(__file__).resolve().parent.parent


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def package_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_state() -> dict[str, Any]:
    """Revision and whether tracked files differ from it; recorded, never part of an identity."""

    def git(*arguments: str) -> str:
        result = subprocess.run(["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, check=True)
        return result.stdout.strip()

    try:
        diff = git("diff", "HEAD")
        state: dict[str, Any] = {"revision": git("rev-parse", "HEAD"), "dirty": bool(diff)}
        if diff:
            state["diff_sha256"] = hashlib.sha256(diff.encode()).hexdigest()
        return state
    except (OSError, subprocess.CalledProcessError):
        return {"revision": None, "dirty": None}


def content_digest(files: dict[str, dict[str, Any]]) -> str:
    """One hash for all payload files of a manifest, but for the metrics, which hold times and speeds."""
    listing = {name: entry["sha256"] for name, entry in files.items() if name != "metrics.jsonl"}
    return digest_of(listing)


def is_artifact(folder: Path) -> bool:
    """Whether this folder has a manifest of ours; a model from elsewhere may hold another tool's manifest.json."""
    try:
        return "manifest_schema" in json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError, TypeError, RecursionError):
        return False


class _File(Config):
    sha256: str
    bytes: int


class _Manifest(BaseModel):
    """What readers rely on; there is more in it."""

    stage: str
    identity: str
    job: dict[str, Any]
    inputs: dict[str, dict[str, Any]]
    files: dict[str, _File]
    content: str
    details: dict[str, Any]
    seconds: float


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(str(folder), "no manifest.json in it", "give the folder of a finished artifact")
    manifest, remedy = read_json(path), f"remove {folder} to make it anew"
    if not isinstance(manifest, dict) or manifest.get("manifest_schema") != MANIFEST_SCHEMA:
        raise DamagedArtifact(str(path), "not a manifest of this version", remedy)
    try:
        _Manifest.model_validate(manifest, strict=True)
    except ValidationError as error:
        fault = error.errors()[0]
        raise DamagedArtifact(str(path), f"{'.'.join(map(repr, fault['loc']))}: {fault['msg']}", remedy) from error
    return manifest


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether a file is the folder's own, behind all links; false for what no file can be called."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # a name too long, with a zero byte, a loop of links
        return False


def verify(folder: Path, memory: HashMemory | None = None) -> dict[str, Any]:
    """The manifest of a finished artifact whose files were checked against it. Raises DamagedArtifact."""
    manifest = read_manifest(folder)
    memory = memory or HashMemory(None)
    remedy = f"remove {folder} and run the same command to make it anew"
    for name, entry in manifest["files"].items():
        path = folder / name
        if not _lies_in(path, folder):
            raise DamagedArtifact(str(folder / MANIFEST), f"names {name!r}, which lies outside", remedy)
        if not path.is_file():
            raise DamagedArtifact(str(path), "the file is missing", remedy)
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise DamagedArtifact(str(path), f"{size} bytes, the manifest says {entry['bytes']}", remedy)
        if memory.sha256(path) != entry["sha256"]:
            raise DamagedArtifact(str(path), "its hash differs from the manifest's", remedy)
    for path in folder.rglob("*"):
        if not path.is_dir() and path != folder / MANIFEST and not _hidden(path, folder):
            name = str(path.relative_to(folder))
            if name not in manifest["files"]:
                raise DamagedArtifact(str(path), "the manifest does not name it", "move it out of the artifact")
    return manifest


def _lock_soon(file: IO[str], busy: UserError) -> None:
    """Lock within seconds: a stage whose launcher was just killed needs a moment to notice and end. Raises `busy` where
    another process holds it for longer."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise busy from error
            time.sleep(0.2)


def _lock_of(final: Path) -> Path:
    return final.with_name(f".{final.name}.lock")


def is_being_built(final: Path) -> bool:
    """Whether a process works on this artifact now."""
    return is_locked(_lock_of(final))


def is_locked(path: Path) -> bool:
    """Whether a process holds a lock on this file now, shared or for itself."""
    if not path.exists():
        return False
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@contextlib.contextmanager
def alone(path: Path, busy: UserError) -> Iterator[None]:
    """While no other process holds this path, to the end of the block or process. Raises `busy` where one does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        _lock_soon(file, busy)
        yield


@contextlib.contextmanager
def turn(path: Path, on_wait: Callable[[], object]) -> Iterator[None]:
    """Wait until no other process has its turn at this path, and keep it to the end of the block or process.

    on_wait: called where there is one to wait for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def partial_of(final: Path) -> Path:
    return final.with_name(f".{final.name}.partial")


def folder_of(job: Job) -> Path:
    """Where the job's files are: in its artifact, or, while it is not finished, where they are made."""
    return job.runtime.output if job.runtime.output.exists() else partial_of(job.runtime.output)


class Workspace:
    """The folder in which a stage builds its artifact.

    with Workspace(job) as workspace: ... files into workspace.path ...; workspace.finish(details)

    resumable: keep what was built when the stage fails, for the same command to go on with; a stage that cannot go
    on (it is short) leaves nothing. Raises UserError when another process builds the same artifact.
    """

    def __init__(self, job: Job, *, resumable: bool) -> None:
        self.job = job
        self.final = job.runtime.output
        self.path = partial_of(self.final)
        self.resumable = resumable
        self._lock: IO[str] | None = None
        self._started = now()
        self._clock = time.monotonic()
        self._earlier = 0.0

    def __enter__(self) -> Workspace:
        self.final.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _lock_of(self.final).open("a")
        busy = UserError(str(self.final), "another process is building it", "wait for that one to end")
        _lock_soon(self._lock, busy)
        if self.path.exists() and not self.resumable:
            shutil.rmtree(self.path)
        self.path.mkdir(exist_ok=True)
        elapsed = self.path / ".elapsed.json"
        if elapsed.exists():
            earlier = read_json(elapsed)
            self._earlier, self._started = float(earlier["seconds"]), str(earlier["started"])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.path.exists() and not (any(self.path.iterdir()) and (kind is None or self.resumable)):
            shutil.rmtree(self.path)
        if self._lock is not None:
            self._lock.close()  # the empty file stays: removing it could let two others lock different files

    @property
    def seconds(self) -> float:
        """Time spent on this artifact, in earlier processes too as far as they told."""
        return self._earlier + time.monotonic() - self._clock

    def tick(self) -> None:
        """Remember the time spent so far; called whenever a piece of work has been kept."""
        write_json(self.path / ".elapsed.json", {"seconds": self.seconds, "started": self._started})

    def finish(self, details: dict[str, Any]) -> Path:
        """Hash the files, write the manifest and give the artifact its name. details: the stage's own record."""
        memory = HashMemory(None)
        # What it was made from goes once it has its name: by then it lies on the disk, whatever happens to the host.
        payload = [
            path
            for path in sorted(self.path.rglob("*"))
            if path.is_file() and path != self.path / MANIFEST and not _hidden(path, self.path)
        ]
        for path in payload:
            sync_file(path)
        files = {
            str(path.relative_to(self.path)): {"sha256": memory.sha256(path), "bytes": path.stat().st_size}
            for path in payload
        }
        inputs = {}
        for name, given in self.job.inputs().items():
            inputs[name] = {"path": str(given.path), "digest": given.digest}
            if is_artifact(Path(given.path)):
                inputs[name]["content"] = content_digest(read_manifest(Path(given.path))["files"])
        write_json(
            self.path / MANIFEST,
            {
                "manifest_schema": MANIFEST_SCHEMA,
                "stage": self.job.stage,
                "schema_version": self.job.schema_version,
                "identity": self.job.identity,
                "job": self.job.model_dump(mode="json", exclude={"runtime"}),
                "inputs": inputs,
                "files": files,
                "content": content_digest(files),
                "details": details,
                "versions": package_versions(),
                "git": git_state(),
                "started": self._started,
                "finished": now(),
                "seconds": round(self.seconds, 3),
            },
        )
        if self.final.exists():
            raise UserError(str(self.final), "it exists already", "remove it to make it anew")
        sync_folder(self.path)
        self.path.rename(self.final)
        sync_folder(self.final.parent)
        for path in self.final.glob(".*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return self.final


def _hidden(path: Path, root: Path) -> bool:
    """Working files (checkpoints, elapsed time): not payload, dropped only once the artifact has its name."""
    return any(part.startswith(".") for part in path.relative_to(root).parts)
