"""What is said to a server and what is accepted from it: OpenAI's completions, in token ids. No input or output here.

One prompt a request, so that each has its own seed; every sampling field set, as a server's defaults cannot be read.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from datagen.config import Generate, Mode
from recovery.corpus import FinishReason
from recovery.teacher_signal import TopLogprobs

SEED_BITS = 63  # servers take a signed 64-bit integer
PREFIX = "token_id:"


class BadReply(Exception):
    """A server's answer that is no answer to the request: damaged, cut off, or of something else."""


class Phantom(BadReply):
    """The reply holds an id that the vocabulary does not have: a padding row of the head was drawn."""


@dataclass(frozen=True)
class Sampling:
    """The fields that all requests of a corpus share. stops: ids that end a text; width: logits in use."""

    model: str
    settings: Generate
    mode: Mode
    stops: frozenset[int]
    width: int
    fixed: Mapping[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        fixed: dict[str, Any] = {
            "model": self.model,
            "n": 1,
            "stream": False,
            "echo": False,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "min_tokens": 0,
            "stop": [],
            "stop_token_ids": sorted(self.stops),
            # The ids above alone end a text, not what the server takes from the model's files.
            "ignore_eos": True,
            "add_special_tokens": False,
            "skip_special_tokens": False,
            "return_token_ids": True,
        }
        if self.settings.capture_logprobs:
            fixed |= {"logprobs": self.settings.capture_logprobs, "return_tokens_as_token_ids": True}
        object.__setattr__(self, "fixed", fixed)

    def hybrid(self, prompt: list[int], seed: int) -> bytes:
        """The request body of a whole sample, for servers with our logits processor."""
        arguments = {"greedy_tokens": self.settings.greedy_tokens, "vocabulary": self.width}
        return self._body(prompt, seed, self.settings.max_length - len(prompt), {"vllm_xargs": arguments})

    def greedy(self, prompt: list[int], tokens: int) -> bytes:
        """The first of two requests: the model's first choices."""
        return self._body(prompt, 0, tokens, {"temperature": 0.0})

    def drawn(self, prompt: list[int], seed: int) -> bytes:
        """The second of two requests: the rest, drawn. prompt: with the greedy tokens."""
        return self._body(prompt, seed, self.settings.max_length - len(prompt), {})

    def _body(self, prompt: list[int], seed: int, max_tokens: int, more: dict[str, Any]) -> bytes:
        own = {
            "prompt": prompt,
            "seed": seed % (1 << SEED_BITS),
            "max_tokens": max_tokens,
            "temperature": self.settings.temperature,
        }
        return orjson.dumps({**self.fixed, **own, **more})


@dataclass(frozen=True)
class Reply:
    tokens: NDArray[np.int32]
    finish_reason: FinishReason
    signal: TopLogprobs | None


def parse_reply(body: bytes, prompt: list[int], max_tokens: int, sampling: Sampling, greedy_tokens: int) -> Reply:
    """The new tokens of a reply that answers this request. Raises BadReply for anything else.

    greedy_tokens: that many of the new tokens are first choices, not draws; recorded with the signal.
    """
    try:
        (choice,) = orjson.loads(body)["choices"]
        ids, reason = choice["token_ids"], choice["finish_reason"]
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise BadReply(f"no completion in the reply ({type(error).__name__})") from error
    if choice.get("prompt_token_ids") not in (None, prompt):
        raise BadReply("the reply belongs to another prompt")
    if not isinstance(ids, list) or not 0 < len(ids) <= max_tokens:
        raise BadReply(f"{len(ids) if isinstance(ids, list) else 'no'} token ids, asked for at most {max_tokens}")
    try:
        # A C array takes whole numbers of 32 bits only, and is filled five times faster than one of NumPy.
        tokens = np.frombuffer(array("i", ids), dtype=np.int32)
    except (TypeError, OverflowError) as error:
        raise BadReply("its token ids are not whole numbers") from error
    largest = int(tokens.view(np.uint32).max())  # a negative id is larger than any other
    if largest >= 1 << 31:
        raise BadReply("a token id is negative")
    if largest >= sampling.width:
        raise Phantom(f"token id {largest}, the vocabulary has {sampling.width}")
    last = ids[-1]
    if any(ids.count(stop) > (stop == last) for stop in sampling.stops):
        raise BadReply("it goes on after a token that ends a text")
    if reason == "stop":
        if last not in sampling.stops:
            raise BadReply("it stopped at a token that ends no text")
    elif reason != "length" or len(tokens) != max_tokens or last in sampling.stops:
        raise BadReply(f"finish reason {reason!r} after {len(tokens)} of {max_tokens} tokens")
    signal = None
    if k := sampling.settings.capture_logprobs:
        signal = parse_signal(choice.get("logprobs"), ids, k, greedy_tokens)
    return Reply(tokens, reason, signal)


def parse_signal(logprobs: Any, ids: list[int], k: int, greedy_tokens: int) -> TopLogprobs:
    """The k largest log-probabilities of each token and its own. Raises BadReply when any is missing."""
    top_ids = np.empty((len(ids), k), dtype=np.int32)
    top = np.empty((len(ids), k), dtype=np.float32)
    emitted = np.empty(len(ids), dtype=np.float32)
    try:
        for place, (token, entries) in enumerate(zip(ids, logprobs["top_logprobs"], strict=True)):
            emitted[place] = entries[f"{PREFIX}{token}"]
            # The emitted token is listed besides the k largest; where it is one of them there are just k.
            largest = sorted(((value, -int(name[len(PREFIX) :])) for name, value in entries.items()), reverse=True)[:k]
            top[place] = [value for value, _ in largest]
            top_ids[place] = [-negative for _, negative in largest]
    except (TypeError, KeyError, ValueError) as error:
        raise BadReply(f"the log-probabilities asked for are not all there ({error!r})") from error
    drawn = np.arange(len(ids)) >= greedy_tokens
    return TopLogprobs(top_ids, top, emitted, drawn)
