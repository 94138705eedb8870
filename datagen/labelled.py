"""Labelled: text with answers written by people, in the form of a corpus, for comparisons with supervised fine-tuning.

    python -m datagen.labelled JOB

A recovery needs no such text. A conversation is written with the tokenizer's chat template where it has one, and all
of its tokens count, as in plain fine-tuning. There is a train split only: what is measured on is synthetic.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datagen.config import LabelledJob
from recovery.artifacts import Workspace
from recovery.corpus import SUMMARY, TOKENIZER, Sample, write_shard
from recovery.corpus_statistics import summarize
from recovery.errors import UserError, first_line
from recovery.files import arrow_files, write_json
from recovery.progress import progress
from recovery.sources import load_tokenizer
from recovery.stage import run_stage

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger("recover-lora")
ROLES = {"human": "user", "gpt": "assistant"}
QUESTIONS = ("question", "instruction", "prompt")
ANSWERS = ("answer", "output", "response")

Turns = list[dict[str, str]]
"""A conversation: role (system, user, assistant) and content of each turn."""


def turns_of(row: Mapping[str, Any], where: str) -> Turns:
    """The conversation in a row. Raises UserError when its columns are none that are known."""
    for name in ("messages", "conversations"):
        if row.get(name):
            return [_turn(turn) for turn in row[name]]
    question = next((str(row[name]) for name in QUESTIONS if row.get(name)), None)
    answer = next((row[name] for name in ANSWERS if row.get(name) is not None), None)
    if question is None or answer is None:
        known = "messages, conversations, question or instruction with answer or output"
        raise UserError(where, f"a row with {', '.join(sorted(row))}", f"give sets with the columns {known}")
    if row.get("input"):
        question += f"\n\n{row['input']}"
    if row.get("choices"):
        lines, place = _choice(row["choices"], answer, where)
        question, answer = "\n".join([question, *lines]), lines[place]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": str(answer)}]


def _choice(choices: Any, answer: Any, where: str) -> tuple[list[str], int]:
    """The lines of the choices, and which of them is right: named by its number, its letter or its text."""
    texts = choices["text"] if isinstance(choices, Mapping) else choices
    letters = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(texts)])
    names = [*map(str, range(len(texts)))], letters, list(map(str, texts))
    place = next((known.index(str(answer)) for known in names if str(answer) in known), None)
    if place is None:
        found = f"answer {answer!r} to choices {texts!r}"
        raise UserError(where, found, "name the right choice by number (from 0), letter or text")
    return [f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True)], place


def _turn(turn: Mapping[str, Any]) -> dict[str, str]:
    role, content = turn.get("role") or turn.get("from"), turn.get("content") or turn.get("value")
    return {"role": ROLES.get(str(role), str(role)), "content": str(content or "")}


def ids_of(turns: Turns, tokenizer: Any, max_length: int) -> list[int]:
    if tokenizer.chat_template:
        text = _templated(turns, tokenizer)
        return tokenizer(text, add_special_tokens=False).input_ids[:max_length]
    text = "\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns)
    return [*tokenizer(text).input_ids, tokenizer.eos_token_id][:max_length]


def _templated(turns: Turns, tokenizer: Any) -> str:
    """With the chat template; where that has no system turn (Gemma), its text goes in front of the first question."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(turns, tokenize=False)
    except TemplateError as error:
        if len(turns) < 2 or turns[0]["role"] != "system":
            raise _refused(error) from error
    first = {**turns[1], "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}
    try:
        return tokenizer.apply_chat_template([first, *turns[2:]], tokenize=False)
    except TemplateError as error:
        raise _refused(error) from error


def _refused(error: Exception) -> UserError:
    found = f"the model's chat template refuses a conversation: {first_line(error)}"
    return UserError("labelled.sets", found, "leave such conversations out: turns of user and assistant in turn")


def open_set(name: str, folder: Path | None) -> Dataset:
    """One data set, from its folder or the hub. Raises UserError when it cannot be had."""
    from datasets import Dataset, concatenate_datasets, load_dataset

    try:
        if folder is not None:
            return concatenate_datasets([Dataset.from_file(str(path)) for path in arrow_files(folder)])
        path, _, revision = name.partition("@")
        return load_dataset(path, split="train", revision=revision or None)
    except (OSError, ValueError) as error:
        first = first_line(error)
        raise UserError(f"labelled.sets ({name})", f"cannot be read ({first})", "name a folder or a hub id") from error


def rounds(sets: dict[str, Dataset], seed: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """One row of every set, in an order of its own, round after round until all are at their end."""
    orders = {
        name: np.random.Generator(np.random.Philox(key=[seed, number])).permutation(len(data)).tolist()
        for number, (name, data) in enumerate(sets.items())
    }
    for places in itertools.zip_longest(*orders.values()):
        for (name, data), place in zip(sets.items(), places, strict=True):
            if place is not None:
                yield name, data[place]


def produce(job: LabelledJob, workspace: Workspace) -> dict[str, Any]:
    settings = job.labelled
    tokenizer = load_tokenizer(job.tokenizer.path, job.tokenizer.revision)
    given = {name: job.folders[name].path if name in job.folders else None for name in settings.sets}
    sets = {name: open_set(name, folder) for name, folder in given.items()}
    counts = dict.fromkeys(sets, 0)
    samples: list[Sample] = []
    bar = progress(settings.samples, "row", "labelled")
    for name, row in itertools.islice(rounds(sets, job.seed), settings.samples):
        ids = ids_of(turns_of(row, f"labelled.sets ({name})"), tokenizer, settings.max_length)
        samples.append(Sample(len(samples), job.seed, ids[0], "stop", tuple(ids)))
        counts[name] += 1
        bar.update()
    bar.close()
    if len(samples) < settings.samples:
        log.warning("%d rows in all sets, not %d: all of them are taken", len(samples), settings.samples)
    write_shard(workspace.path / "train" / "shard-00000.parquet", samples)
    tokenizer.save_pretrained(workspace.path / TOKENIZER)
    summary = summarize([sample.tokens for sample in samples], len(samples))
    write_json(workspace.path / SUMMARY, {"skip": 0, "sets": counts, "train": summary})
    return {"tokens": summary["tokens"], "samples": len(samples), "sets": counts}


if __name__ == "__main__":
    run_stage(LabelledJob, produce, resumable=False, description=__doc__ or "")
