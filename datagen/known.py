"""Samples that need not be made again: finished corpora of the same settings hold them.

A sample depends on its index, never on how many others there are, so the 30k, 60k and 120k samples of a study are
prefixes of one corpus, and one that is to grow keeps what it has.
"""

from __future__ import annotations

import logging
from pathlib import Path

from datagen.config import GenerateJob
from recovery.artifacts import MANIFEST, verify
from recovery.errors import UserError, first_line
from recovery.files import read_json

log = logging.getLogger("recover-lora")


def _identity(job: GenerateJob) -> str:
    """Of the samples: how many of them there are does not count."""
    sized = job.generate.model_copy(update={"samples": 1, "held_out_samples": 1})
    return job.model_copy(update={"generate": sized, "partition": None}).identity


def known_corpora(job: GenerateJob) -> list[Path]:
    """The finished corpora beside the job's own that differ from it in size alone; a damaged one is left out."""
    found: list[Path] = []
    for folder in sorted(job.runtime.output.parent.glob(f"{job.stage}-*")):
        try:
            manifest = read_json(folder / MANIFEST)
            if manifest["schema_version"] != job.schema_version:
                continue
            other = GenerateJob.model_validate({**manifest["job"], "runtime": {"output": folder}})
            if folder != job.runtime.output and _identity(other) == _identity(job):
                verify(folder)
                found.append(folder)
        except (OSError, UserError, ValueError, LookupError, TypeError) as error:
            log.warning("%s is not taken from: %s", folder.name, first_line(error))
    return found
