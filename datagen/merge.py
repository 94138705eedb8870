"""Unites the parts of a corpus, made by several clients, into the artifact that one client would have made."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datagen.config import GenerateJob, GenerateRuntime
from datagen.fingerprint import difference, from_json
from datagen.generate import describe, load_sampling_vocabulary, wanted_of
from datagen.pieces import drop_damaged, seal, shard_samples
from datagen.served import AGREEMENT
from recovery.artifacts import Workspace, read_manifest, verify
from recovery.corpus import shards_of
from recovery.errors import UserError
from recovery.files import read_json, write_json
from recovery.progress import progress
from recovery.stage import check_reusable
from recovery.tracking import Tracker

log = logging.getLogger("recover-lora")
KEPT = ("engine", "mode", "batch_invariant", "fingerprint_of", "fingerprint", "model_name")


def read_part(folder: Path) -> tuple[GenerateJob, dict[str, Any]]:
    """The job and the manifest of one part, its files checked. Raises UserError for what is no part."""
    manifest = read_manifest(folder)
    if manifest["stage"] != GenerateJob.stage or manifest["job"].get("partition") is None:
        raise UserError(str(folder), "not a part of a corpus", "give folders that `generate --partition` made")
    if manifest["schema_version"] != GenerateJob.schema_version:
        raise UserError(str(folder), f"schema version {manifest['schema_version']}", "generate it with this version")
    job = GenerateJob.model_validate({**manifest["job"], "runtime": {"output": str(folder.resolve())}})
    return job, verify(folder)


def merge_parts(folders: Sequence[Path], artifacts: Path) -> Path:
    """Build the whole corpus in `artifacts` from all its parts. Returns its folder.

    Raises UserError when the parts are of different jobs or modes, or one is missing or given twice.
    """
    jobs, manifests = zip(*(read_part(folder) for folder in folders), strict=True)
    wholes = [job.model_copy(update={"partition": None}) for job in jobs]
    for folder, job, whole, manifest in zip(folders, jobs, wholes, manifests, strict=True):
        if whole.identity != wholes[0].identity or job.partition.of != jobs[0].partition.of:
            raise UserError(str(folder), f"a part of another corpus than {folders[0]}", "give the parts of one")
        if manifest["details"]["mode"] != manifests[0]["details"]["mode"]:
            raise UserError(
                str(folder),
                f"made in mode {manifest['details']['mode']}, {folders[0]} in {manifests[0]['details']['mode']}",
                "generate one of them anew with servers that all have, or all lack, our logits processor",
            )
        first, own = (from_json(m["details"]["fingerprint"]) for m in (manifests[0], manifest))
        if (different := difference(first, own, whole.dtype)) is not None:
            raise UserError(str(folder), f"made by another model than {folders[0]}: {different}", "give parts of one")
    numbers = [job.partition.part for job in jobs]
    count = jobs[0].partition.of
    if sorted(numbers) != list(range(count)):
        missing = sorted(set(range(count)) - set(numbers))
        found = f"parts {sorted(numbers)} of {count}" + (f"; {missing} are missing" if missing else "")
        raise UserError("PART", found, "give every part once")
    ordered = [folder for _, folder in sorted(zip(numbers, folders, strict=True), key=lambda pair: pair[0])]
    whole = wholes[0]
    job = whole.model_copy(update={"runtime": GenerateRuntime(output=artifacts / whole.artifact_name)})
    if check_reusable(job):
        return job.runtime.output
    with Workspace(job, resumable=True) as workspace, Tracker(None, workspace.path / "metrics.jsonl") as tracker:
        begin(workspace.path, manifests[0]["details"])
        vocabulary = load_sampling_vocabulary(job.model, job.generate.bos)
        wanted = wanted_of(job)
        bar = progress(sum(map(len, wanted.values())), "sample", "merge")
        for split, indices in wanted.items():
            drop_damaged(shards_of(workspace.path, split), log.warning)
            sources = [shard for folder in ordered for shard in shards_of(folder, split)]
            signal = workspace.path / "signal" / split if job.generate.capture_logprobs else None
            seal(sources, indices, workspace.path / split, signal, shard_samples(job.generate), bar.update)
        bar.close()
        summary = describe(workspace.path, vocabulary, tracker)
        first = manifests[0]["details"]
        return workspace.finish(
            {
                **{name: first[name] for name in KEPT},
                "server_versions": sorted({v for m in manifests for v in m["details"]["server_versions"]}),
                "tokens": summary["train"]["tokens"] + summary["held_out"]["tokens"],
                "parts": [m["content"] for m in manifests],
                "throughput": [m["details"]["throughput"] for m in manifests],
            }
        )


def begin(folder: Path, details: dict[str, Any]) -> None:
    """Take over the folder in which a single client may have begun the same corpus; it is of one mode either way."""
    agreement = folder / AGREEMENT
    if agreement.exists() and (mode := read_json(agreement)["mode"]) != details["mode"]:
        remedy = f"remove {folder}, or finish it with `run`"
        raise UserError(str(folder), f"begun in mode {mode}, the parts are of mode {details['mode']}", remedy)
    write_json(agreement, {name: details[name] for name in ("mode", "fingerprint", "fingerprint_of")})
