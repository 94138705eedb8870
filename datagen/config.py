"""The `generate` section of a recipe, how a pool of servers is reached, and the job of the stage. Imports no torch."""

from __future__ import annotations

import os
from typing import ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from recovery.config import Dtype, Job, LooseInput, ModelInput, Runtime
from recovery.errors import UserError
from recovery.settings import Config

BosMode = Literal["auto", "always", "never"]
Mode = Literal["one_request", "two_requests"]


class Generate(Config):
    engine: Literal["embedded", "vllm"] = "embedded"
    """embedded: transformers in this process, batched, with a KV cache; the same bits again on the same machine.
    vllm: the servers of the cluster file, or any servers that speak the OpenAI protocol in token ids."""
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
    mode: Literal["auto"] | Mode = "auto"
    """vllm: one_request needs our logits processor in the server, two_requests (greedy, then drawn) does not; auto
    asks the servers. The two draw different samples of the same distribution; the manifest names the one used."""
    capture_logprobs: NonNegativeInt = 0
    """vllm: store this many of the reference's largest log-probabilities a token, as a teacher signal; 0: none."""

    def of_its_engine(self) -> Generate:
        """The same without what does not decide about the samples: the other engine's fields, and the name of a model
        that the job knows by its hash."""
        other = ("batch_samples",) if self.engine == "vllm" else ("mode",)
        defaults = {name: type(self).model_fields[name].default for name in ("model", *other)}
        return self.model_copy(update=defaults)

    @model_validator(mode="after")
    def _capture_is_possible(self) -> Generate:
        if self.capture_logprobs and self.engine != "vllm":
            raise ValueError("capture_logprobs needs engine: vllm")
        if self.capture_logprobs and self.model is not None:
            raise ValueError("capture_logprobs needs the reference as generator; leave out generate.model")
        if self.capture_logprobs and self.temperature != 1:
            raise ValueError("capture_logprobs needs temperature 1, at which a drawn token is an unbiased sample")
        return self


class ServerAccess(Config):
    """How the client reaches and uses a pool of servers: never part of a corpus' identity."""

    urls: tuple[str, ...] = Field(default=(), max_length=1024)
    """Base addresses, such as http://127.0.0.1:8100; requests go to <url>/v1/completions."""
    api_key_env: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Name of the environment variable that holds the key. The key itself is written down nowhere."""
    requests_per_server: PositiveInt = 256
    """Requests in flight at one server; a little above what it batches keeps it from waiting for the client."""
    timeout_s: PositiveFloat = 1800.0
    """Seconds until a request is given up and sent to another server."""
    patience_s: PositiveFloat = 120.0
    """Seconds without any usable server after which the run stops, to be gone on with later."""
    fingerprint: Literal["reference", "agreement"] = "reference"
    """reference: every server's greedy probe must match the model as transformers computes it here, once a model.
    agreement: it must match the first server's, for models too large to load where the client runs."""

    def key(self) -> str | None:
        """The servers' key, from the environment; None where they want none. Raises UserError when it is not set."""
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env)
        if not key:
            raise UserError("servers.api_key_env", f"{self.api_key_env} is not set", "export it with the servers' key")
        return key

    @field_validator("urls")
    @classmethod
    def _plain_addresses(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            if not url.startswith(("http://", "https://")) or "@" in url:
                raise ValueError(f"{url.rpartition('@')[2]} is not an http(s) address without a password in it")
        plain = tuple(url.rstrip("/").removesuffix("/v1") for url in urls)
        if len(set(plain)) != len(plain):
            raise ValueError("an address is given twice")
        return plain


class Partition(Config):
    """The i-th of n equal parts of a corpus, made by a client of its own and merged afterwards."""

    part: NonNegativeInt
    of: PositiveInt

    @property
    def name(self) -> str:
        """`0-of-2`, for labels and links."""
        return f"{self.part}-of-{self.of}"

    @model_validator(mode="after")
    def _inside(self) -> Partition:
        if self.part >= self.of:
            raise ValueError(f"part {self.part} of {self.of}: parts are numbered from 0 to {self.of - 1}")
        return self

    def indices(self, count: int) -> range:
        """This part of the indices 0..count-1: contiguous, so that merging reads every part once, in order."""
        return range(count * self.part // self.of, count * (self.part + 1) // self.of)


class GenerateRuntime(Runtime):
    servers: ServerAccess | None = None


class GenerateJob(Job):
    stage: ClassVar[str] = "generate"
    schema_version: ClassVar[int] = 2
    runtime: GenerateRuntime  # pyright: ignore[reportIncompatibleVariableOverride] - narrower, and frozen
    seed: int
    dtype: Dtype
    model: ModelInput
    generate: Generate
    partition: Partition | None = None


class Labelled(Config):
    """Recipe section `labelled`: text written by people, with answers, in place of the synthetic corpus."""

    sets: tuple[str, ...] = Field(min_length=1)
    """Hub ids of data sets (`id@revision` for a commit), or folders with their Arrow files. Rows are known by their
    columns: messages, conversations, question with choices and answer, question or instruction with answer."""
    samples: PositiveInt = 24_000
    """Rows in all, as many of each set as it has room for, drawn by the recipe's seed."""
    max_length: int = Field(default=2048, ge=2)
    """Tokens of a row; the rest is cut off."""


class LabelledJob(Job):
    stage: ClassVar[str] = "labelled"
    schema_version: ClassVar[int] = 1
    seed: int
    tokenizer: ModelInput
    labelled: Labelled
    folders: dict[str, LooseInput]
    """Those of the sets that are folders, by the name in `labelled.sets`."""
