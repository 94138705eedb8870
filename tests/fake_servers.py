"""Fake vLLM servers over loopback: the protocol of the real ones, without a model, with faults on demand.

    python -m tests.fake_servers --count 64 --latency 1.0 --fault 0.002       # prints one address a line

The tokens of a sample are a function of its prompt and seed (`tokens_of`), so that a reader can tell whether any was
altered. They stand in for servers only where the client is tested, never for a model.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import orjson
import uvloop
from numpy.typing import NDArray

FAULTS = ("busy", "error", "drop", "cut", "garbage", "foreign", "altered", "stall")
TEXT = "x" * 2000  # real replies carry the decoded text, which the client does not need
STALL_S = 3600.0


@dataclass
class Behaviour:
    """What the servers of one process are like."""

    model: str = "fake"
    width: int = 49152
    latency: float = 0.0
    """Mean seconds until a reply, exponentially distributed over a half of it."""
    fault: float = 0.0
    """Chance that a sample's request meets a fault."""
    faults: tuple[str, ...] = FAULTS[:-1]
    processor: bool = True
    """Whether our logits processor is loaded."""
    max_model_len: int = 4096
    weights: int = 0
    """Another number is another model behind the same name."""
    stops: int | None = None
    """The id that ends a text."""
    ends: bool = True
    """Whether every fourth text ends after a third of the most tokens."""
    key: str | None = None
    loading: float = 0.0
    """Seconds from the first request in which everything is answered by 503."""
    begun: float = 0.0
    seen: int = 0
    served: dict[int, int] = field(default_factory=dict)


def tokens_of(
    prompt: list[int], seed: int, count: int, width: int, stop: int | None = None, ends: bool = True
) -> NDArray[np.int64]:
    """The new tokens of a request, reproducible from it alone."""
    state = np.random.SeedSequence([seed % (1 << 63), *prompt]).generate_state(2, np.uint64)
    tokens = np.random.Generator(np.random.SFC64(int(state[0]))).integers(0, width, count)
    if stop is not None:
        tokens[tokens == stop] = (stop + 1) % width
        if ends and state[1] % 4 == 0:
            tokens = np.append(tokens[: count // 3], stop)
    return tokens


def expected_sample(
    prompt: list[int], seed: int, max_length: int, width: int, stop: int | None = None, ends: bool = True
) -> list[int]:
    """A whole sample as the one-request mode must return it."""
    return [*prompt, *tokens_of(prompt, seed, max_length - len(prompt), width, stop, ends).tolist()]


class Connection(asyncio.Protocol):
    """One client connection: HTTP/1.1 with keep-alive, requests one after the other."""

    def __init__(self, behaviour: Behaviour, port: int) -> None:
        self._own, self._port, self._buffer = behaviour, port, b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not of that class

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        lines = head.split(b"\r\n")
        headers = {}
        for line in lines[1:]:
            name, _, value = line.partition(b":")
            headers[name.strip().lower()] = value.strip()
        length = int(headers.get(b"content-length", 0))
        if len(rest) < length:
            return
        self._buffer = rest[length:]
        path = lines[0].split()[1].decode()
        if self._own.loading and not self._own.begun:
            self._own.begun = time.monotonic()
        if self._own.begun and time.monotonic() - self._own.begun < self._own.loading:
            self._answer(503, {"error": {"message": "loading"}})
            return
        wanted = None if self._own.key is None or path == "/health" else f"Bearer {self._own.key}".encode()
        if wanted is not None and headers.get(b"authorization") != wanted:
            self._answer(401, {"error": {"message": "no"}})
        else:
            self._route(path, rest[:length])

    def _route(self, path: str, body: bytes) -> None:
        own = self._own
        if path == "/v1/completions":
            self._complete(orjson.loads(body))
        elif path == "/v1/models":
            entry = {"id": own.model, "root": own.model, "parent": None, "max_model_len": own.max_model_len}
            self._answer(200, {"object": "list", "data": [entry]})
        elif path == "/metrics":
            served = own.served.get(self._port, 0)
            lines = [
                f'vllm:time_to_first_token_seconds_count{{engine="0"}} {served}.0',
                f'vllm:time_to_first_token_seconds_sum{{engine="0"}} {served * 0.25}',
                'vllm:num_requests_running{engine="0"} 3.0',
            ]
            self._write(200, "\n".join(lines).encode() + b"\n")
        elif path in ("/health", "/version"):
            self._answer(200, {"version": "fake"})
        else:
            self._answer(404, {"error": {"message": "not found"}})

    def _complete(self, request: dict[str, Any]) -> None:
        own = self._own
        arguments = request.get("vllm_xargs") or {}
        if own.processor and arguments.get("greedy_tokens", 0) < 0:
            return self._answer(400, {"error": {"message": "greedy_tokens must be a whole number"}})
        if request["max_tokens"] < 1 or len(request["prompt"]) + request["max_tokens"] > own.max_model_len:
            return self._answer(400, {"error": {"message": "max_tokens is too large"}})
        if "seed" not in request:
            return self._answer(200, self._probe(request))
        own.seen += 1
        loop = asyncio.get_running_loop()
        delay = own.latency * (0.5 + random.expovariate(2.0)) if own.latency else 0.0
        if random.random() < own.fault:
            fault = random.choice(own.faults)
            loop.call_later(STALL_S if fault == "stall" else delay, self._fail, fault, request)
        elif delay:
            loop.call_later(delay, self._finish, request)
        else:
            self._finish(request)
        return None

    def _probe(self, request: dict[str, Any]) -> dict[str, Any]:
        """A request without a seed: the greedy probe, with log-probabilities that are the weights' own."""
        tokens = tokens_of(request["prompt"], self._own.weights, request["max_tokens"], self._own.width).tolist()
        reply = self._reply(request, np.array(tokens))
        entries = [{f"token_id:{token}": -0.5 - 0.1 * self._own.weights, "token_id:1": -3.0} for token in tokens]
        reply["choices"][0]["logprobs"] = {"top_logprobs": entries}
        return reply

    def _reply(self, request: dict[str, Any], tokens: NDArray[np.int64]) -> dict[str, Any]:
        stopped = self._own.stops is not None and len(tokens) and tokens[-1] == self._own.stops
        choice = {
            "index": 0,
            "text": TEXT,
            "logprobs": None,
            "finish_reason": "stop" if stopped else "length",
            "token_ids": tokens,
            "prompt_token_ids": request["prompt"],
        }
        if k := request.get("logprobs"):
            choice["logprobs"] = {"top_logprobs": [logprobs_of(int(token), k) for token in tokens]}
        return {"id": "cmpl-0", "object": "text_completion", "model": self._own.model, "choices": [choice]}

    def _tokens(self, request: dict[str, Any]) -> NDArray[np.int64]:
        own = self._own
        return tokens_of(request["prompt"], request["seed"], request["max_tokens"], own.width, own.stops, own.ends)

    def _finish(self, request: dict[str, Any]) -> None:
        self._own.served[self._port] = self._own.served.get(self._port, 0) + 1
        self._answer(200, self._reply(request, self._tokens(request)))

    def _fail(self, fault: str, request: dict[str, Any]) -> None:
        assert self._transport is not None
        reply = self._reply(request, self._tokens(request))
        choice = reply["choices"][0]
        if fault == "busy":
            self._answer(503, {"error": {"message": "overloaded"}}, b"Retry-After: 0.1\r\n")
        elif fault == "error":
            self._answer(500, {"error": {"message": "internal"}})
        elif fault == "drop":
            self._transport.abort()
        elif fault == "cut":
            body = orjson.dumps(reply, option=orjson.OPT_SERIALIZE_NUMPY)
            self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body[: len(body) // 2])
            self._transport.close()
        elif fault == "garbage":
            self._write(200, b'{"choices": [{"token_ids": [1, 2')
        elif fault == "foreign":
            choice["prompt_token_ids"] = [token + 1 for token in request["prompt"]]
            self._answer(200, reply)
        elif fault == "altered":
            choice["token_ids"] = choice["token_ids"][:-1]
            choice["finish_reason"] = "length"
            self._answer(200, reply)

    def _answer(self, status: int, value: dict[str, Any], headers: bytes = b"") -> None:
        self._write(status, orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY), headers)

    def _write(self, status: int, body: bytes, headers: bytes = b"") -> None:
        assert self._transport is not None
        if not self._transport.is_closing():
            start = b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n" % (status, len(body))
            self._transport.write(start + headers + b"\r\n" + body)


def logprobs_of(token: int, k: int) -> dict[str, float]:
    """A made-up distribution in which odd tokens lie outside the k largest."""
    largest = {f"token_id:{(token + 1 + place) % 49152}": -1.5 - 0.5 * place for place in range(k)}
    if token % 2:
        return {**largest, f"token_id:{token}": -9.0}
    del largest[f"token_id:{(token + k) % 49152}"]
    return {f"token_id:{token}": -1.0, **largest}


async def run(count: int, behaviour: Behaviour, ports: list[int]) -> None:
    loop = asyncio.get_running_loop()
    for number in range(count):
        server = await loop.create_server(
            lambda: Connection(behaviour, 0), "127.0.0.1", ports[number] if ports else 0, backlog=4096
        )
        print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await asyncio.Event().wait()


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--port", type=int, action="append", default=[])
    for name, kind in (
        ("latency", float),
        ("fault", float),
        ("weights", int),
        ("loading", float),
        ("width", int),
        ("max-model-len", int),
    ):
        parser.add_argument(f"--{name}", type=kind, default=getattr(Behaviour, name.replace("-", "_")))
    parser.add_argument("--faults", nargs="*", default=list(Behaviour.faults))
    parser.add_argument("--no-processor", dest="processor", action="store_false")
    parser.add_argument("--stops", type=int)
    parser.add_argument("--never-end", dest="ends", action="store_false")
    parser.add_argument("--key")
    arguments = vars(parser.parse_args())
    count, ports = arguments.pop("count"), arguments.pop("port")
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    uvloop.run(run(count, Behaviour(**{**arguments, "faults": tuple(arguments["faults"])}), ports))


@contextmanager
def fake_servers(count: int = 1, *arguments: str, core: int | None = None) -> Iterator[tuple[list[str], Any]]:
    """Start a process with that many servers; yields their addresses and the process."""
    pin = [] if core is None else ["taskset", "-c", str(core)]
    command = [*pin, sys.executable, "-m", "tests.fake_servers", "--count", str(count), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield [process.stdout.readline().strip() for _ in range(count)], process
        finally:
            process.kill()


if __name__ == "__main__":
    main()
