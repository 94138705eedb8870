"""The `generate` section of a recipe and the job of the stage. Imports no torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from recovery.config import Config, Dtype, Job, ModelInput

BosMode = Literal["auto", "always", "never"]


class Generate(Config):
    engine: Literal["embedded"] = "embedded"
    """embedded: transformers in this process, batched, with a KV cache; the same bits again on the same machine."""
    samples: PositiveInt = 120_000
    """Training samples; a smaller corpus is a prefix of a larger one."""
    held_out_samples: PositiveInt = 64
    """Samples of a stream of their own, for measuring only."""
    greedy_tokens: NonNegativeInt = 5
    """Tokens after the start token that are the model's first choice; the rest is drawn (hybrid sampling)."""
    max_length: int = Field(default=2048, ge=2)
    """Most tokens of a sample, all counted: beginning of text, start token, greedy and drawn ones."""
    temperature: PositiveFloat = 1.0
    bos: BosMode = "auto"
    """auto: a beginning-of-text id in front where the tokenizer puts one itself; it carries no loss."""
    model: str | None = None
    """Folder or hub id of the generating model, when it is not the reference; it must have the same vocabulary."""
    batch_samples: PositiveInt = 32
    """Samples decoded together by the embedded engine; part of the corpus' identity, as rounding depends on it."""


class GenerateJob(Job):
    stage: ClassVar[str] = "generate"
    schema_version: ClassVar[int] = 1
    seed: int
    dtype: Dtype
    model: ModelInput
    generate: Generate
