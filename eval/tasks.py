"""Benchmarks: lm-eval's task definitions over the hub's datasets or over local Arrow folders, zero-shot.

A local folder is laid out as `<data_dir>/<path>/<config>/<split>/data-*.arrow`, which is what
`Dataset.save_to_disk` writes. It is read, never written to, and nothing is copied into a dataset cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.config import KNOWN, BenchmarkData
from recovery.errors import UserError, UserErrors, first_line
from recovery.files import HashMemory, arrow_files, digest_of

if TYPE_CHECKING:
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask


@dataclass(frozen=True)
class Benchmark:
    """One task: lm-eval's definition of it and where its data lie in a local folder."""

    definition: str
    """YAML file below lm_eval/tasks/."""
    folder: str
    """`<path>/<config>` below data_dir."""
    splits: tuple[str, ...] = ("validation",)
    """Splits in the order of lm-eval's preference; the first that is there is scored."""
    local: dict[str, Any] = field(default_factory=dict)
    """Fields of the definition that differ for the local data's columns."""


def _mmlu(subject: str) -> Benchmark:
    return Benchmark(f"mmlu/default/mmlu_{subject}.yaml", f"hails/mmlu_no_train/{subject}", ("test",))


TASKS: dict[str, Benchmark] = {
    "hellaswag": Benchmark("hellaswag/hellaswag.yaml", "hellaswag/none"),
    "mmlu_philosophy": _mmlu("philosophy"),
    "mmlu_management": _mmlu("management"),
    "mmlu_astronomy": _mmlu("astronomy"),
    "arc_challenge": Benchmark("arc/arc_challenge.yaml", "ai2_arc/ARC-Challenge", ("test", "validation")),
    "winogrande": Benchmark("winogrande/default.yaml", "winogrande/winogrande_xl"),
    "piqa": Benchmark("piqa/piqa.yaml", "piqa/plain_text"),
    "openbookqa": Benchmark("openbookqa/openbookqa.yaml", "openbookqa/main", ("test", "validation")),
    "boolq": Benchmark("super_glue/boolq/default.yaml", "boolq/none", local={"doc_to_target": "{{answer|int}}"}),
    "arc_easy": Benchmark("arc/arc_easy.yaml", "ai2_arc/ARC-Easy", ("test", "validation")),
    "sciq": Benchmark("sciq/sciq.yaml", "sciq/none", ("test", "validation")),
}


@dataclass(frozen=True)
class Items:
    """The chosen items of one task."""

    task: ConfigurableTask
    documents: list[dict[str, Any]]
    doc_ids: list[int]
    """The row of each document in its whole split."""
    split: str

    def prompt(self, position: int) -> str | list[str]:
        """What is shown before the answer: one text, or one for each choice (WinoGrande)."""
        return self.task.fewshot_context(self.documents[position], num_fewshot=0)


def local_files(data_dir: Path, name: str) -> tuple[str, list[Path]]:
    """The split that is scored and its Arrow files. Raises UserError naming the folder that is missing."""
    benchmark = TASKS[name]
    folders = [data_dir / benchmark.folder / split for split in benchmark.splits]
    for split, folder in zip(benchmark.splits, folders, strict=True):
        if files := arrow_files(folder):
            return split, files
    raise UserError(
        "evaluate.data_dir",
        f"no data of {name}: no data-*.arrow in {' or '.join(str(folder) for folder in folders)}",
        "complete the folder, choose other tasks, or leave data_dir out to use the hub's datasets",
    )


def benchmark_data(data_dir: Path, tasks: Sequence[str], memory: HashMemory) -> BenchmarkData:
    """The input that a job names: the folder, and one hash over the files that `tasks` read.

    Raises UserErrors, one line for each task whose data are missing.
    """
    data_dir = data_dir.expanduser().resolve()
    if not data_dir.is_dir():
        raise UserError("evaluate.data_dir", f"no folder {data_dir}", "give the folder of the data or leave it out")
    listing: dict[str, str] = {}
    missing: list[UserError] = []
    for name in tasks:
        try:
            _, files = local_files(data_dir, name)
        except UserError as error:
            missing.append(error)
            continue
        listing |= {str(path.relative_to(data_dir)): memory.sha256(path) for path in files}
    if missing:
        raise UserErrors(missing)
    return BenchmarkData(path=data_dir, digest=digest_of(listing))


def sample_rows(seed: int, name: str, rows: int, limit: int | None) -> list[int]:
    """Which rows of a task are scored, ascending. They depend on (seed, task, rows) alone, whatever other tasks there
    are, and those of a smaller limit are among those of a larger one."""
    if limit is None or limit >= rows:
        return list(range(rows))
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big")
    return sorted(np.random.default_rng(key).permutation(rows)[:limit].tolist())


def load_items(name: str, seed: int, limit: int | None, data_dir: Path | None) -> Items:
    """lm-eval's task `name` over its seeded sample of `limit` items (None: all).

    Raises UserError when the data cannot be read.
    """
    from lm_eval.api.task import ConfigurableTask

    benchmark = TASKS[name]
    definition = _definition(benchmark)
    if data_dir is None:
        dataset, split = _hub_split(name, definition)
    else:
        dataset, split = _local_split(name, data_dir)
        definition |= benchmark.local
    doc_ids = sample_rows(seed, name, len(dataset), limit)
    chosen = dataset.select(doc_ids)
    # Only the chosen rows reach the task, under the one split it scores, so that nothing else is prepared.
    definition |= {
        "dataset_path": None,
        "custom_dataset": lambda **_: {split: chosen},
        "training_split": None,
        "validation_split": None,
        "test_split": split,
        "fewshot_split": None,
        "num_fewshot": 0,
    }
    with _hushed():
        task: Any = ConfigurableTask(config=definition)
    return Items(task, list(task.task_docs), doc_ids, split)


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """No advice of lm-eval on custom data sets and default aggregations, no bar for a map of a hundred rows."""
    from datasets.utils import disable_progress_bars, enable_progress_bars

    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        enable_progress_bars()


def _definition(benchmark: Benchmark) -> dict[str, Any]:
    # The definitions are read one by one: lm-eval's index of all its tasks takes 13 s to build.
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    definition = load_yaml(Path(lm_eval.tasks.__file__).parent / benchmark.definition)
    for structural in ("tag", "group", "task_list"):
        definition.pop(structural, None)
    return definition


def _local_split(name: str, data_dir: Path) -> tuple[Dataset, str]:
    from datasets import Dataset, concatenate_datasets

    split, files = local_files(data_dir, name)
    try:
        # In memory: what lm-eval maps over would otherwise be cached beside the user's files.
        parts = [Dataset.from_file(str(path), in_memory=True) for path in files]
    except (OSError, ValueError) as error:
        raise UserError(str(files[0].parent), f"not readable as Arrow ({error})", "fetch it again") from error
    dataset = concatenate_datasets(parts)
    if not len(dataset):
        raise UserError(str(files[0].parent), "no items in it", "fetch it again")
    return dataset, split


def _hub_split(name: str, definition: dict[str, Any]) -> tuple[Dataset, str]:
    from datasets import load_dataset

    split = definition.get("test_split") or definition["validation_split"]
    path = definition["dataset_path"]
    try:
        dataset = load_dataset(
            path, definition.get("dataset_name"), split=split, **(definition.get("dataset_kwargs") or {})
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"evaluate.tasks ({name})",
            f"its dataset {path} cannot be had from the hub ({first_line(error)})",
            "name a folder with the data in evaluate.data_dir",
        ) from error
    return dataset, split


assert tuple(sorted(TASKS)) == tuple(sorted(KNOWN))
