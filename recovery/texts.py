"""The corpus of a job that makes adapters, checked against both of its models."""

from __future__ import annotations

from dataclasses import dataclass

from recovery.config import AdapterJob, TrainJob
from recovery.corpus import TOKENIZER, Tokens, check_ids, read_split
from recovery.vocabulary import compare, load_vocabulary, used_width


@dataclass(frozen=True)
class Texts:
    train: Tokens
    held_out: Tokens
    width: int
    """Logits in use."""


def read_texts(job: AdapterJob) -> Texts:
    """Raises UserError where the vocabularies of models and corpus differ, or an id lies outside."""
    vocabulary = load_vocabulary(job.reference.path, job.reference.revision)
    width = used_width(vocabulary, load_vocabulary(job.degraded.path, job.degraded.revision))
    corpus = job.corpus.path
    compare(vocabulary, load_vocabulary(str(corpus / TOKENIZER), model=False), str(corpus))
    source = job.labelled.path if isinstance(job, TrainJob) and job.labelled is not None else corpus
    train = read_split(source, "train")
    check_ids(train, width, str(source))
    return Texts(train, read_split(corpus, "held_out"), width)
