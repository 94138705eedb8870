"""The corpus of a job that makes adapters, checked against both of its models."""

from __future__ import annotations

from dataclasses import dataclass

from recovery.config import AdapterJob
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
    train = read_split(corpus, "train")
    check_ids(train, width, str(corpus))
    return Texts(train, read_split(corpus, "held_out"), width)
