"""The examination of a server before it is used: is it the recipe's model, whole, and how can it sample?

Model list, context length, vocabulary and fingerprint must be the recipe's, and it must give token ids. A server that
differs in any is refused with what was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from datagen.config import Generate, Mode
from datagen.fingerprint import NEW_TOKENS, Probe, difference
from datagen.protocol import PREFIX
from datagen.server import Refused, Unfit
from recovery.config import Dtype, ModelInput

TEXT = "Tokens, 12345 jetons — Wörter, слова, 词语 🙂\n\tdef f(x): return x ** 2"
PROBE_LOGPROBS = 5


class Wire(Protocol):
    """How a request is sent: an answer's status and body. Raises Busy and aiohttp's errors."""

    async def __call__(self, path: str, body: bytes | None = None) -> tuple[int, bytes]: ...


@dataclass(frozen=True)
class Expected:
    """What a server must be. tokens_of_text: TEXT in ids; fingerprint: None when the first server sets it."""

    model: ModelInput
    dtype: Dtype
    settings: Generate
    tokens_of_text: list[int]
    prompts: Sequence[Sequence[int]]
    fingerprint: list[Probe] | None


@dataclass(frozen=True)
class Findings:
    model: str
    """The name to ask for."""
    mode: Mode
    """The best that it can do."""
    fingerprint: list[Probe]
    version: str


async def examine(wire: Wire, expected: Expected) -> Findings:
    """What one server is. Raises Unfit when it is not the recipe's, or answers in no form that is known."""
    try:
        return await _examine(wire, expected)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise Unfit(f"its answers cannot be read ({type(error).__name__}: {error})") from error


async def _examine(wire: Wire, expected: Expected) -> Findings:
    name, length = await _served_model(wire, expected.model)
    if length is not None and length < expected.settings.max_length:
        raise Unfit(f"its context holds {length} tokens, generate.max_length is {expected.settings.max_length}")
    await _check_vocabulary(wire, name, expected.tokens_of_text)
    mode: Mode = "one_request" if await _has_our_processor(wire, name) else "two_requests"
    fingerprint = [await _probe(wire, name, list(prompt)) for prompt in expected.prompts]
    if expected.fingerprint is not None:
        different = difference(expected.fingerprint, fingerprint, expected.dtype)
        if different is not None:
            raise Unfit(f"it serves another model than {expected.model.path}: {different}")
    status, body = await wire("/version")
    version = str(_json(body).get("version", "unknown")) if status == 200 else "unknown"
    return Findings(name, mode, fingerprint, version)


async def _served_model(wire: Wire, model: ModelInput) -> tuple[str, int | None]:
    """Name and context length of the one base model that can be the recipe's."""
    status, body = await wire("/v1/models")
    if status in (401, 403):
        raise Unfit(f"HTTP {status}: it wants a key; name its environment variable in servers.api_key_env")
    listed = _json(body).get("data") if status == 200 else None
    if not isinstance(listed, list) or not listed:
        raise Unfit(f"no model list (HTTP {status})")
    own = [entry for entry in listed if not entry.get("parent")]
    named = [entry for entry in own if model.path in (entry.get("id"), entry.get("root"))]
    if not named and len(own) != 1:
        raise Unfit(f"it lists {', '.join(str(entry.get('id')) for entry in own)}; none is {model.path}")
    (entry, *_) = named or own
    length = entry.get("max_model_len")
    return str(entry["id"]), int(length) if length is not None else None


async def _check_vocabulary(wire: Wire, name: str, expected: list[int]) -> None:
    """A fixed text must become the same ids; servers without a tokenizer endpoint are known by the fingerprint."""
    status, body = await wire("/tokenize", orjson.dumps({"model": name, "prompt": TEXT, "add_special_tokens": False}))
    if status == 200 and (found := _json(body).get("tokens")) != expected:
        raise Unfit(f"another vocabulary: a fixed text becomes {str(found)[:60]}..., expected {str(expected)[:60]}...")


async def _has_our_processor(wire: Wire, name: str) -> bool:
    """Whether it refuses a bad greedy_tokens in our logits processor's words. Others ignore what they do not know, or
    refuse it in words of their own."""
    arguments = {"greedy_tokens": -1}
    body = {"model": name, "prompt": [1], "max_tokens": 1, "temperature": 0.0, "vllm_xargs": arguments}
    status, answer = await wire("/v1/completions", orjson.dumps(body))
    if status not in (200, 400, 422):
        raise Unfit(f"a completion was refused (HTTP {status}): {answer[:200].decode(errors='replace')}")
    return status == 400 and b"greedy_tokens must be" in answer


async def _probe(wire: Wire, name: str, prompt: list[int]) -> Probe:
    body = {
        "model": name,
        "prompt": prompt,
        "max_tokens": NEW_TOKENS,
        "temperature": 0.0,
        "logprobs": PROBE_LOGPROBS,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "ignore_eos": True,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }
    status, answer = await wire("/v1/completions", orjson.dumps(body))
    if status != 200:
        raise Unfit(f"the probe was refused (HTTP {status}): {answer[:200].decode(errors='replace')}")
    try:
        (choice,) = _json(answer)["choices"]
        if choice.get("token_ids") is None:
            raise Unfit("it gives no token ids (return_token_ids), and text cannot be turned back into them")
        tokens = tuple(int(token) for token in choice["token_ids"])
        top = tuple(
            {int(key[len(PREFIX) :]): float(value) for key, value in entries.items()}
            for entries in choice["logprobs"]["top_logprobs"]
        )
        if len(tokens) != NEW_TOKENS or len(top) != NEW_TOKENS or any(t not in e for t, e in zip(tokens, top)):  # noqa: B905
            raise ValueError("tokens and log-probabilities do not match")
    except (KeyError, TypeError, ValueError) as error:
        raise Unfit(f"its probe cannot be read ({type(error).__name__}: {error})") from error
    return Probe(tuple(prompt), tokens, top)


def _json(body: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def refusal_of(status: int, body: bytes) -> Refused:
    """The server's own words for a request that it calls wrong."""
    error = _json(body).get("error")
    message = error.get("message") if isinstance(error, dict) else body[:200].decode(errors="replace")
    return Refused(f"HTTP {status}: {str(message)[:300]}")
