"""How fast the pool works: tokens and requests a second, queue depth, each server's share, the servers' own numbers.

Those come from `/metrics` (Prometheus text), where a server has it: time to first token, running and waiting requests,
share of the KV cache in use, preemptions.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from datagen.client import Pool

LINE = re.compile(rb"^vllm:(\w+?)(?:_total)?(?:\{[^}]*\})? ([0-9.eE+-]+)$", re.MULTILINE)
COUNTERS = ("time_to_first_token_seconds_sum", "time_to_first_token_seconds_count", "num_preemptions")
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


def parse_metrics(text: bytes) -> dict[str, float]:
    """The numbers we use from a server's metrics page; over several engines of a server, their sum."""
    found: dict[str, float] = {}
    for name, value in LINE.findall(text):
        key = name.decode()
        if key in COUNTERS or key in GAUGES:
            found[key] = found.get(key, 0.0) + float(value)
    return found


@dataclass
class Throughput:
    """Rates since the first request of this process and since the last look."""

    pool: Pool
    first: dict[str, Mapping[str, float]] = field(default_factory=dict)
    latest: dict[str, Mapping[str, float]] = field(default_factory=dict)
    _last: tuple[float, int, int] = (0.0, 0, 0)

    def saw(self, url: str, page: bytes) -> None:
        if numbers := parse_metrics(page):
            self.first.setdefault(url, numbers)
            # A server that was restarted counts from zero again.
            if numbers.get(COUNTERS[1], 0) < self.first[url].get(COUNTERS[1], 0):
                self.first[url] = numbers
            self.latest[url] = numbers

    def look(self) -> dict[str, float]:
        """Metrics for tracking: rates since the last look."""
        now = time.monotonic()
        samples, tokens = self.pool.samples, self.pool.tokens
        then, samples_then, tokens_then = self._last
        seconds = max(now - max(then, self.pool.began), 1e-9)
        self._last = (now, samples, tokens)
        metrics = {
            "perf/tokens_per_second": (tokens - tokens_then) / seconds,
            "perf/requests_per_second": (samples - samples_then) / seconds,
            "perf/outstanding_requests": float(self.pool.outstanding),
            "perf/usable_servers": float(self.pool.usable),
            "perf/retries": float(self.pool.retries),
            **{f"perf/share_of_server_{n}": share for n, share in enumerate(self._shares())},
            **{f"perf/{name}": value for name, value in self._of_servers().items()},
        }
        return {name: round(value, 4) for name, value in metrics.items()}

    def _shares(self) -> Iterable[float]:
        total = max(self.pool.samples, 1)
        return [server.samples / total for server in self.pool.servers]

    def _of_servers(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for name in GAUGES:
            if seen := [numbers[name] for numbers in self.latest.values() if name in numbers]:
                values[name] = sum(seen) / (len(seen) if name == "kv_cache_usage_perc" else 1)
        gained = {
            name: sum(numbers.get(name, 0) - self.first[url].get(name, 0) for url, numbers in self.latest.items())
            for name in COUNTERS
        }
        if gained[COUNTERS[1]]:
            values["time_to_first_token_seconds"] = gained[COUNTERS[0]] / gained[COUNTERS[1]]
        if self.latest:
            values["preemptions"] = gained["num_preemptions"]
        return values

    def record(self) -> dict[str, object]:
        """What the manifest keeps: totals of this process."""
        seconds = max(time.monotonic() - self.pool.began, 1e-9)
        return {
            "seconds": round(seconds, 1),
            "tokens_per_second": round(self.pool.tokens / seconds, 1),
            "requests_per_second": round(self.pool.samples / seconds, 2),
            "retries": self.pool.retries,
            "servers": {
                server.url: {"samples": server.samples, "tokens": server.tokens, "errors": server.errors}
                for server in self.pool.servers
            },
            **{name: round(value, 4) for name, value in self._of_servers().items()},
        }
