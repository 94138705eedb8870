"""Servers and works: what the pool keeps of each, and what can be wrong with a server's answer."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from recovery.corpus import Split


class Busy(Exception):
    """The server is there but takes no more (429, 503). pause: seconds it asked for, if any."""

    def __init__(self, status: int, pause: float | None) -> None:
        super().__init__(f"HTTP {status}")
        self.pause = pause


class Refused(Exception):
    """The server says that the request itself is wrong; when a second one says so too, it is."""


class Unfit(Exception):
    """The server answers, and is not what the recipe asks for."""


@dataclass(eq=False)
class Server:
    url: str
    usable: bool = False
    why: str = "not examined yet"
    model: str = ""
    tokens_out: int = 0
    """Tokens that its outstanding requests may still bring."""
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    failures: int = 0
    """In a row."""
    limit: float = 0.0
    """Requests that it may have in flight: fewer after it said that it is busy, growing again with every sample."""
    resting_until: float = 0.0
    rest: float = 0.0
    busy_since: float | None = None
    probe_pause: float = 0.1
    """Seconds until the next examination; doubles until a sample comes."""
    samples: int = 0
    tokens: int = 0
    errors: int = 0


@dataclass(eq=False)
class Work:
    split: Split
    index: int
    seed: int
    start_token: int
    tokens: int
    """The most that it can bring."""
    tries: int = 0
    avoid: Server | None = None
    refused_by: set[Server] = field(default_factory=set)
    started: float = 0.0
    running: dict[asyncio.Task[None], Server] = field(default_factory=dict)
