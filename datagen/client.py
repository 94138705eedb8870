"""The client of a pool of servers: who gets the next request, what happens when one fails, and when to stop.

A request goes to the usable server with the fewest outstanding tokens. There are no rounds: a server that has room gets
the next index at once, and when no index is left, idle servers take over requests that run for unusually long. What
fails is tried again elsewhere after a jittered pause; a server that says it is busy gets fewer requests. One that loses
a connection or keeps failing is set aside and admitted again only by passing the whole examination anew, as another
model may stand behind its address by then.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator

import aiohttp

from datagen.config import ServerAccess
from datagen.protocol import BadReply
from datagen.server import Busy, Refused, Server, Unfit, Work
from recovery.corpus import Sample
from recovery.errors import Unavailable, UserError

log = logging.getLogger("recover-lora")

FAILURES_IN_A_ROW = 5
MOST_TRIES = 25
PAUSE_S, LONGEST_PAUSE_S = 0.25, 15.0
LONGEST_PROBE_PAUSE_S = 10.0
HEALTH_EVERY_S, HEALTH_TIMEOUT_S, HEALTH_MISSES = 5.0, 20.0, 3
SHOWN = 4  # servers named in a message
TAKE_OVER_AFTER = 3.0  # times the usual duration of a request


RETRIED = (aiohttp.ClientError, asyncio.TimeoutError, OSError, BadReply, Refused)
Connection = (aiohttp.ClientConnectionError, OSError)


class Pool:
    """Serves works from several servers.

    complete: asks one server for one sample; raises Busy, BadReply, Refused or aiohttp's errors.
    examine: raises Unfit, Busy or aiohttp's errors unless the server may be used.
    on_sample: takes a finished sample, once for every work.
    is_full: whether the receiver of samples is behind, so that no new work should start.
    """

    def __init__(
        self,
        access: ServerAccess,
        complete: Callable[[Server, Work], Awaitable[Sample]],
        examine: Callable[[Server], Awaitable[None]],
        is_healthy: Callable[[Server], Awaitable[bool]],
        on_sample: Callable[[Work, Sample], None],
        is_full: Callable[[], bool] = lambda: False,
    ) -> None:
        self.servers = [Server(url, limit=access.requests_per_server) for url in access.urls]
        self.retries = 0
        self.began = time.monotonic()
        """When the first request was sent, after the examination."""
        self._access = access
        self._complete, self._examine, self._is_healthy = complete, examine, is_healthy
        self._on_sample, self._is_full = on_sample, is_full
        self._works: Iterator[Work] = iter(())
        self._exhausted = False
        self._again: deque[Work] = deque()
        self._pausing = 0
        self._active: set[Work] = set()
        self._usual = 0.0
        self._last_usable = 0.0
        self._background: set[asyncio.Task[None]] = set()

    @property
    def outstanding(self) -> int:
        return sum(len(server.tasks) for server in self.servers)

    @property
    def samples(self) -> int:
        return sum(server.samples for server in self.servers)

    @property
    def tokens(self) -> int:
        return sum(server.tokens for server in self.servers)

    @property
    def usable(self) -> int:
        return sum(server.usable for server in self.servers)

    async def run(self, works: Iterator[Work]) -> None:
        """Serve all works. Raises Unavailable when no server is left for `patience_s`, UserError when every server is
        unfit at the start or a request is refused."""
        self._works, self._exhausted = works, False
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            await self._examine_all()
            self.began = time.monotonic()
            self._spawn(self._watch())
            self.pump()
            await self._end
        finally:
            tasks = [*self._background, *(task for server in self.servers for task in server.tasks)]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _examine_all(self) -> None:
        """Examine the servers together; go on with those that pass, wait a while if none can be reached."""
        start = time.monotonic()
        await asyncio.gather(*(self._admit(server) for server in self.servers))
        while not any(server.usable for server in self.servers):
            unfit = [server for server in self.servers if server.why.startswith("unfit")]
            if len(unfit) == len(self.servers) or time.monotonic() - start > self._access.patience_s:
                self._raise_none_left()
            await asyncio.sleep(1.0)
            await asyncio.gather(*(self._admit(server) for server in self.servers if server not in unfit))
        for server in self.servers:
            if not server.usable:
                self._set_aside(server, server.why, examined=True)
        self._last_usable = time.monotonic()

    async def _admit(self, server: Server) -> None:
        try:
            await self._examine(server)
        except Unfit as error:
            server.why = f"unfit: {error}"
        except (*RETRIED, Busy) as error:
            server.why = describe(error)
        else:
            server.usable, server.why, server.failures, server.busy_since = True, "", 0, None

    def _raise_none_left(self) -> None:
        reasons = "; ".join(f"{server.url}: {server.why}" for server in self.servers[:SHOWN])
        if len(self.servers) > SHOWN:
            reasons += f"; and {len(self.servers) - SHOWN} more"
        if all(server.why.startswith("unfit") for server in self.servers):
            raise UserError("servers", reasons, "serve the recipe's model there, or change the cluster file")
        raise Unavailable(f"no server is left ({reasons}); start them and run the same command again to go on")

    # ---- handing out ----

    def pump(self) -> None:
        """Start work wherever there is room. Called whenever something ended."""
        now = time.monotonic()
        waiting: list[Work] = []
        while not self._end.done() and not self._is_full():
            room = [s for s in self.servers if s.usable and len(s.tasks) < s.limit and s.resting_until <= now]
            if not room:
                break
            if self._again:
                work = self._again.popleft()
            elif self._pausing + len(waiting) > len(self.servers) * self._access.requests_per_server:
                break  # so many failed that new ones would only join them
            elif (following := next(self._works, None)) is not None:
                work = following
            else:
                self._exhausted = True
                break
            elsewhere = [server for server in room if server is not work.avoid]
            if not elsewhere and any(server.usable and server is not work.avoid for server in self.servers):
                waiting.append(work)  # for one that did not fail it
                continue
            self._start(min(elsewhere or room, key=_load), work)
        self._again.extendleft(reversed(waiting))
        if self._exhausted and not self._active and not self._again and not self._pausing and not self._end.done():
            self._end.set_result(None)

    def _start(self, server: Server, work: Work) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(server, work))
        work.started = time.monotonic()
        work.running[task] = server
        self._active.add(work)
        server.tasks.add(task)
        server.tokens_out += work.tokens
        task.add_done_callback(lambda done: self._left(server, work, done))

    def _left(self, server: Server, work: Work, task: asyncio.Task[None]) -> None:
        server.tasks.discard(task)
        server.tokens_out -= work.tokens
        work.running.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None and not self._end.done():
            self._end.set_exception(error)
        # Cancelled, perhaps before it ran at all: its server was set aside, or it took too long.
        if work in self._active and not work.running and not self._end.done():
            self._retry(work, server)
        self.pump()

    async def _serve(self, server: Server, work: Work) -> None:
        begun = time.monotonic()
        try:
            sample = await self._complete(server, work)
        except RETRIED as error:
            if work in self._active:
                self._failed(server, work, error)
            return
        except Busy as error:
            if work in self._active:
                self._rest(server, work, error)
            return
        if work not in self._active:
            return
        self._active.discard(work)
        self._leave(work)
        for other in work.running:
            other.cancel()
        server.failures, server.rest, server.busy_since, server.probe_pause = 0, 0.0, None, 0.1
        server.limit = min(server.limit + 1 / server.limit, self._access.requests_per_server)
        server.samples += 1
        server.tokens += len(sample.tokens)
        took = time.monotonic() - begun
        self._usual = took if not self._usual else 0.98 * self._usual + 0.02 * took
        self._on_sample(work, sample)

    # ---- failing ----

    def _failed(self, server: Server, work: Work, error: Exception) -> None:
        server.errors += 1
        server.failures += 1
        work.tries += 1
        log.debug("%s: sample %d: %s", server.url, work.index, describe(error))
        if isinstance(error, Refused):
            work.refused_by.add(server)
            if len(work.refused_by) == min(2, len(self.servers)):
                # Not one server's fault: the request itself is wrong.
                raise UserError(server.url, str(error), "the servers cannot be used with this recipe")
        if isinstance(error, (*Connection, Refused)) or server.failures >= FAILURES_IN_A_ROW:
            self._set_aside(server, describe(error))
        self._check_tries(work, server, describe(error))
        self._leave(work)
        if not work.running:
            self._retry(work, server)

    def _check_tries(self, work: Work, server: Server, why: str) -> None:
        if work.tries >= MOST_TRIES:
            raise Unavailable(
                f"sample {work.index} failed {work.tries} times, at last at {server.url}: {why}; "
                "look at the servers and run the same command again"
            )

    def _rest(self, server: Server, work: Work, error: Busy) -> None:
        """The server has enough: fewer requests from now on, none for a while, and the work goes elsewhere.

        That is no failure, unless nothing else comes from it for `patience_s`.
        """
        now = time.monotonic()
        if server.resting_until <= now:
            server.limit = max(0.75 * len(server.tasks), 1.0)
            server.rest = min(2 * server.rest or PAUSE_S, LONGEST_PAUSE_S)
            pause = (error.pause if error.pause is not None else server.rest) * random.uniform(1.0, 1.5)
            server.resting_until = now + pause
            asyncio.get_running_loop().call_later(pause + 0.001, self.pump)
        server.busy_since = server.busy_since or now
        if now - server.busy_since > self._access.patience_s:
            self._set_aside(server, f"{describe(error)} for {now - server.busy_since:.0f} s")
        self._leave(work)
        if not work.running:
            self.retries += 1
            self._active.discard(work)
            work.avoid = server
            self._again.append(work)

    @staticmethod
    def _leave(work: Work) -> None:
        """This task no longer tries: seen at once by the other copy of the same work."""
        task = asyncio.current_task()
        assert task is not None
        work.running.pop(task, None)

    def _retry(self, work: Work, server: Server) -> None:
        """Queue the work again after a jittered pause that doubles with every try."""
        self.retries += 1
        self._active.discard(work)
        work.avoid = server
        longest = min(PAUSE_S * 2**work.tries, LONGEST_PAUSE_S)
        self._pausing += 1

        def again() -> None:
            self._pausing -= 1
            self._again.append(work)
            self.pump()

        asyncio.get_running_loop().call_later(random.uniform(0, longest), again)

    def _set_aside(self, server: Server, why: str, *, examined: bool = False) -> None:
        if not server.usable and not examined:
            return
        if server.usable:
            self._last_usable = time.monotonic()
        server.usable, server.why = False, why
        log.debug("%s is set aside: %s", server.url, why)
        self._spawn(self._bring_back(server))

    async def _bring_back(self, server: Server) -> None:
        """Examine a server again and again, ever more seldom, until it passes."""
        quiet = True
        while True:
            await asyncio.sleep(server.probe_pause * random.uniform(0.5, 1.0))
            server.probe_pause = min(2 * server.probe_pause, LONGEST_PROBE_PAUSE_S)
            await self._admit(server)
            if server.usable:
                if not quiet:
                    log.info("%s is back", server.url)
                self.pump()
                return
            if quiet and server.probe_pause > 1:
                log.warning("%s is set aside: %s", server.url, server.why)
                quiet = False

    # ---- watching ----

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background_ended)

    def _background_ended(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self._end.done():
            self._end.set_exception(error)

    async def _watch(self) -> None:
        """Every second: is any server left, is a request to be taken over; now and then, does a busy one answer."""
        misses: dict[Server, int] = {}
        next_health = time.monotonic() + HEALTH_EVERY_S
        while True:
            await asyncio.sleep(1.0)
            now = time.monotonic()
            if any(server.usable for server in self.servers):
                self._last_usable = now
            elif now - self._last_usable > self._access.patience_s:
                self._raise_none_left()
            self.pump()
            self._end_overdue(now)
            self._take_over(now)
            if now >= next_health:
                usable = [server for server in self.servers if server.usable]
                answers = await asyncio.gather(*(self._is_healthy(server) for server in usable))
                for server, healthy in zip(usable, answers, strict=True):
                    misses[server] = 0 if healthy else misses.get(server, 0) + 1
                    if misses[server] >= HEALTH_MISSES and server.usable:
                        misses[server] = 0
                        self._set_aside(server, "it does not answer")
                        for task in list(server.tasks):
                            task.cancel()
                next_health = time.monotonic() + HEALTH_EVERY_S

    def _end_overdue(self, now: float) -> None:
        """Give up requests that run for longer than `timeout_s`: looked at here, as a timer for each costs a tenth of
        the client's time."""
        for work in list(self._active):
            if now - work.started > self._access.timeout_s:
                work.tries += 1
                for task, server in list(work.running.items()):
                    server.errors += 1
                    why = f"no reply within {self._access.timeout_s:g} s"
                    self._set_aside(server, why)
                    self._check_tries(work, server, why)
                    task.cancel()

    def _take_over(self, now: float) -> None:
        """With no index left, give requests that run unusually long to servers with room; the first reply counts."""
        if not self._exhausted or self._again or not self._usual:
            return
        slow = [w for w in self._active if len(w.running) == 1 and now - w.started > TAKE_OVER_AFTER * self._usual]
        for work in sorted(slow, key=lambda work: work.started):
            (owner,) = work.running.values()
            idle = [s for s in self.servers if s.usable and s is not owner and s.resting_until <= now]
            room = [server for server in idle if 2 * server.tokens_out < owner.tokens_out]
            if room:
                self._start(min(room, key=_load), work)


def _load(server: Server) -> int:
    return server.tokens_out


def describe(error: BaseException) -> str:
    """One line; aiohttp's errors hold an address at most, never a header."""
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
