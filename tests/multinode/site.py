"""A recipe on a folder that both hosts see, and what became of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from tests.multinode.hosts import Host, Hosts
from tests.pipeline import tiny_recipe
from tests.processes import wait_until

HEARTBEAT_S = 10
RUN_S = 240
STEPS = {"epochs": 20, "evaluate_every": 60, "checkpoint_every": 4, "learning_rate": 1e-3}
"""240 steps, 10 to 30 seconds on two hosts: long enough for something to happen on the way."""


class Site:
    """A folder that both hosts see, with a recipe whose earlier stages are done."""

    def __init__(self, folder: Path, hosts: Hosts) -> None:
        self.folder, self.hosts = folder, hosts
        self.output = folder / "output.log"

    @classmethod
    def make(
        cls,
        folder: Path,
        prepared: tuple[Path, Path, Path],
        hosts: Hosts,
        teacher: dict[str, Any] | None = None,
        **train: Any,
    ) -> Site:
        """train: fields of the recipe's section, beside STEPS."""
        model, data, source = prepared
        shutil.copytree(source, folder / "runs")
        recipe = tiny_recipe(model, data, teacher=teacher or {"kind": "online"}, train={**STEPS, **train})
        (folder / "recipe.yaml").write_text(yaml.safe_dump(json.loads(recipe.model_dump_json())))
        return cls(folder, hosts)

    def copy(self, folder: Path) -> Site:
        """As it is now, somewhere else."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return Site(folder, self.hosts)

    def cluster(self, *names: str, **more: Any) -> Path:
        path = self.folder / f"{'-'.join(names) or 'here'}.yaml"
        content = {
            "name": path.stem,
            "device": "cpu",
            "nodes": list(names),
            "heartbeat_s": HEARTBEAT_S,
            "environment": {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"},
            **more,
        }
        path.write_text(yaml.safe_dump(content))
        return path

    def arguments(self, cluster: Path, *more: str) -> tuple[str, ...]:
        where = ("--cluster", str(cluster), "--runs-dir", str(self.folder / "runs"))
        return ("train", str(self.folder / "recipe.yaml"), *where, *more)

    def said(self) -> str:
        return self.output.read_text()

    @property
    def adapter(self) -> Path:
        (found,) = (self.folder / "runs" / "artifacts").glob("train-*")
        return found

    def history(self) -> list[dict[str, float]]:
        (found,) = (self.folder / "runs" / "artifacts").glob("*train-*/history.jsonl")
        return [json.loads(line) for line in found.read_text().splitlines() if line.endswith("}")]

    def wait_for_step(self, step: int) -> None:
        def reached() -> bool:
            files = list((self.folder / "runs" / "artifacts").glob(".train-*/.checkpoints/step-*.json"))
            return any(int(file.stem.removeprefix("step-")) >= step for file in files)

        wait_until(reached, RUN_S)


def equal(one: Path, other: Path) -> None:
    """The same adapter, to the tolerance of another order of summation."""
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert (tensor - second[name]).norm() <= 0.02 * tensor.norm(), name


def same_as_alone(site: Site, alone: Site) -> None:
    for one, other in zip(site.history(), alone.history(), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-3)
    equal(site.adapter, alone.adapter)


def nothing_left(host: Host) -> bool:
    """Whether no process but its sshd runs there."""
    listening = 1
    return len(host.processes()) <= listening


def is_rank(process: int) -> bool:
    """Whether this is one of the training processes, rather than a launcher or a watcher."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
        return b"recovery.train" in words and b"deepspeed.launcher.launch" not in words and words[2:3] == [b"-m"]
    except OSError:
        return False
