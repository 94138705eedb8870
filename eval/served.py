"""An adapter on a vLLM server: what it says of held-out text, against what PEFT says of it."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recovery.errors import Unavailable

LARGEST = 20
"""Log-probabilities of a place that are asked for: vLLM's default limit."""
TIMEOUT_S = 600.0
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Server:
    """One vLLM server. name: of the adapter there. key_variable: of the environment, with the server's key."""

    def __init__(self, url: str, name: str, key_variable: str | None) -> None:
        self._url, self._name = url, name
        self._key = os.environ.get(key_variable) if key_variable else None

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(self._url + path, None if body is None else json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        if self._key is not None:
            request.add_header("Authorization", f"Bearer {self._key}")
        try:
            with DIRECT.open(request, timeout=TIMEOUT_S) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:300]
            raise Unavailable(f"{self._url}{path}: status {error.code}: {said}") from error
        except (OSError, ValueError) as error:
            raise Unavailable(f"{self._url}{path}: {error}") from error

    def check_name(self) -> None:
        """Raises Unavailable for a server of something else."""
        models = [model["id"] for model in self._ask("/v1/models")["data"]]
        if self._name not in models:
            raise Unavailable(
                f"{self._url} serves {', '.join(models)}, not {self._name}: stop it, or take another port"
            )

    def largest(self, ids: Sequence[int]) -> list[dict[int, float]]:
        """Log-probabilities of the likeliest tokens after each of ids[:-1], by token."""
        body = {"model": self._name, "prompt": list(ids), "max_tokens": 1, "temperature": 0.0}
        answer = self._ask("/v1/completions", {**body, "prompt_logprobs": LARGEST})
        places = answer["choices"][0]["prompt_logprobs"]
        return [{int(token): float(entry["logprob"]) for token, entry in place.items()} for place in places[1:]]


def compare_served(
    places: Sequence[dict[int, float]], adapted: Tensor, reference: Tensor, rounding: float
) -> tuple[float, int, int, int]:
    """(nats by which the server's KL to the reference is above PEFT's, places, greedy tokens that differ, those of them
    whose two candidates are more than `rounding` apart).

    adapted, reference: float32 [places, width], logits. The difference of the two KLs is E_reference[log p_peft - log
    p_served]; of it, the terms of the tokens that the server names are summed: the rest has next to no weight.
    """
    ours, theirs = torch.log_softmax(adapted, -1), torch.softmax(reference, -1)
    extra, different, beyond = 0.0, 0, 0
    for row, place in enumerate(places):
        named = {token: value for token, value in place.items() if token < adapted.shape[1]}
        tokens = torch.tensor(list(named))
        served = torch.tensor(list(named.values()))
        extra += float((theirs[row, tokens] * (ours[row, tokens] - served)).sum())
        chosen, instead = int(adapted[row].argmax()), max(named, key=lambda token: named[token])
        different += chosen != instead
        beyond += bool(adapted[row, chosen] - adapted[row, instead] > rounding)
    return extra / len(places), len(places), different, beyond
