"""The pool of servers: every sample once, whatever fails; nobody waits for a slow or dead server."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable

import aiohttp
import pytest

import datagen.client
from datagen.client import Pool
from datagen.config import ServerAccess
from datagen.protocol import BadReply
from datagen.server import Busy, Refused, Server, Unfit, Work
from recovery.corpus import Sample
from recovery.errors import Unavailable, UserError

Complete = Callable[[Server, Work], Awaitable[Sample]]


def works(count: int) -> list[Work]:
    return [Work("train", index, index, index, 10) for index in range(count)]


def sample(work: Work) -> Sample:
    return Sample(work.index, work.seed, work.start_token, "length", (work.start_token, 1))


async def passes(_: Server) -> None:
    return None


async def healthy(_: Server) -> bool:
    return True


def run(
    complete: Complete,
    count: int,
    servers: int = 3,
    examine: Callable[[Server], Awaitable[None]] = passes,
    is_healthy: Callable[[Server], Awaitable[bool]] = healthy,
    **access: float,
) -> tuple[Pool, Counter[int]]:
    """Serve `count` works; the pool, and how often each index was delivered."""
    delivered: Counter[int] = Counter()
    urls = tuple(f"http://s{number}" for number in range(servers))
    settings = ServerAccess.model_validate({"urls": urls, "requests_per_server": 4, "patience_s": 1.0, **access})
    pool = Pool(settings, complete, examine, is_healthy, lambda work, _: delivered.update([work.index]))
    asyncio.run(pool.run(iter(works(count))))
    return pool, delivered


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datagen.client, "PAUSE_S", 0.002)
    monkeypatch.setattr(datagen.client, "LONGEST_PAUSE_S", 0.02)


@pytest.mark.parametrize("seed", range(5))
def test_every_sample_once_whatever_fails(seed: int):
    dice = random.Random(seed)
    errors = [
        Busy(503, 0.001),
        BadReply("garbage"),
        aiohttp.ServerDisconnectedError(),
        aiohttp.ClientPayloadError("cut"),
        TimeoutError(),
        ConnectionResetError(),
    ]

    async def complete(_: Server, work: Work) -> Sample:
        await asyncio.sleep(dice.random() * 0.003)
        if dice.random() < 0.2:
            raise dice.choice(errors)
        return sample(work)

    pool, delivered = run(complete, 400)
    assert delivered == Counter(range(400))
    assert pool.retries > 40
    assert sum(server.samples for server in pool.servers) == 400
    assert all(server.tokens_out == 0 and not server.tasks for server in pool.servers)


def test_a_fast_server_gets_more_than_a_slow_one():
    async def complete(server: Server, work: Work) -> Sample:
        await asyncio.sleep(0.05 if server.url == "http://s0" else 0.005)
        return sample(work)

    pool, _ = run(complete, 300)
    slow, *fast = (server.samples for server in pool.servers)
    assert slow < min(fast) / 4


def test_few_samples_are_spread_over_the_servers():
    async def complete(_: Server, work: Work) -> Sample:
        await asyncio.sleep(0.01)
        return sample(work)

    pool, _ = run(complete, 6)
    assert [server.samples for server in pool.servers] == [2, 2, 2]


def test_a_failed_sample_is_tried_on_another_server():
    seen: list[tuple[str, int]] = []

    async def complete(server: Server, work: Work) -> Sample:
        seen.append((server.url, work.index))
        if server.url == "http://s0":
            raise aiohttp.ClientPayloadError("cut")
        return sample(work)

    _, delivered = run(complete, 40, servers=2)
    assert delivered == Counter(range(40))
    failed = {index for url, index in seen if url == "http://s0"}
    assert failed
    assert failed <= {index for url, index in seen if url == "http://s1"}


def test_a_dead_server_is_set_aside_and_used_again_once_it_passes():
    """It dies once admitted, fails two probes and passes the third; at sample 300 the other one waits for it."""
    examined = 0
    back: asyncio.Event

    async def complete(server: Server, work: Work) -> Sample:
        await asyncio.sleep(0.001)
        if server.url == "http://s0":
            if not back.is_set():
                raise aiohttp.ClientConnectionError
        elif work.index >= 300:
            await back.wait()
        return sample(work)

    async def examine(server: Server) -> None:
        nonlocal examined, back
        if server.url != "http://s0":
            return
        examined += 1
        if examined == 1:
            back = asyncio.Event()
        elif examined < 4:
            raise aiohttp.ClientConnectionError
        else:
            back.set()

    pool, delivered = run(complete, 600, servers=2, examine=examine)
    assert delivered == Counter(range(600))
    assert examined == 4
    assert pool.servers[0].samples > 20
    assert pool.servers[0].errors <= 4  # those in flight when it died; none while it was set aside


def test_a_server_that_comes_back_as_another_model_is_not_used():
    async def complete(server: Server, work: Work) -> Sample:
        await asyncio.sleep(0.001)
        if server.url == "http://s0" and server.samples >= 5:
            raise aiohttp.ServerDisconnectedError
        return sample(work)

    async def examine(server: Server) -> None:
        if server.samples >= 5 and server.url == "http://s0":
            raise Unfit("it serves another model")

    pool, delivered = run(complete, 1500, servers=2, examine=examine)
    assert delivered == Counter(range(1500))
    # Requests in flight when it went may still have come back.
    assert 5 <= pool.servers[0].samples < 10
    assert pool.servers[0].why == "unfit: it serves another model"


def test_with_no_server_left_it_says_why_and_stops():
    async def complete(server: Server, work: Work) -> Sample:
        if server.samples >= 3:
            raise aiohttp.ClientConnectionError("refused")
        return sample(work)

    async def examine(server: Server) -> None:
        if server.samples >= 3:
            raise aiohttp.ClientConnectionError("refused")

    with pytest.raises(Unavailable, match=r"no server is left \(http://s0: ClientConnectionError: refused; http://s1"):
        run(complete, 50, servers=2, examine=examine, patience_s=0.5)


def test_unfit_servers_are_the_users_mistake_told_at_once():
    async def examine(_: Server) -> None:
        raise Unfit("its context holds 64 tokens")

    async def complete(_: Server, work: Work) -> Sample:
        return sample(work)

    start = time.monotonic()
    with pytest.raises(UserError, match="http://s0: unfit: its context holds 64 tokens"):
        run(complete, 5, examine=examine, patience_s=60)
    assert time.monotonic() - start < 5


def test_a_sample_that_fails_everywhere_ends_the_run_by_name():
    async def complete(_: Server, work: Work) -> Sample:
        if work.index == 7:
            raise BadReply("cut short")
        return sample(work)

    with pytest.raises(Unavailable, match="sample 7 failed 25 times"):
        run(complete, 10)


def test_a_busy_server_gets_fewer_requests_and_is_no_failure():
    """A gateway that allows two at a time: nothing is lost, no server is set aside, no sample counts tries."""
    running: Counter[str] = Counter()
    refused = 0

    async def complete(server: Server, work: Work) -> Sample:
        nonlocal refused
        if running[server.url] >= 2:
            refused += 1
            raise Busy(429, None)
        running[server.url] += 1
        await asyncio.sleep(0.002)
        running[server.url] -= 1
        assert work.tries == 0
        return sample(work)

    examined: Counter[str] = Counter()

    async def examine(server: Server) -> None:
        examined[server.url] += 1

    _, delivered = run(complete, 500, servers=2, examine=examine, requests_per_server=40)
    assert delivered == Counter(range(500))
    assert set(examined.values()) == {1}
    assert refused < 1000


def test_servers_that_stay_busy_end_the_run():
    async def busy(*_: object) -> Sample:
        raise Busy(503, None)

    seen: set[str] = set()

    async def examine(server: Server) -> None:
        if server.url in seen:
            raise Busy(503, None)
        seen.add(server.url)

    with pytest.raises(Unavailable, match=r"no server is left \(http://s0: Busy: HTTP 503"):
        run(busy, 20, servers=2, examine=examine, patience_s=0.5)


def test_a_request_that_one_server_refuses_is_done_by_another():
    async def complete(server: Server, work: Work) -> Sample:
        await asyncio.sleep(0.001)
        if server.url == "http://s0":
            raise Refused("HTTP 403: no")
        return sample(work)

    async def examine(server: Server) -> None:
        if server.why.startswith("Refused"):
            raise Unfit("it wants a key")

    pool, delivered = run(complete, 200, servers=2, examine=examine)
    assert delivered == Counter(range(200))
    assert pool.servers[0].samples == 0


def test_a_bad_server_that_passes_the_examination_does_not_spoil_the_run():
    async def complete(server: Server, work: Work) -> Sample:
        await asyncio.sleep(0.002)
        if server.url == "http://s0":
            raise aiohttp.ClientPayloadError("HTTP 500")
        return sample(work)

    pool, delivered = run(complete, 800, servers=2)
    assert delivered == Counter(range(800))
    # Admitted again and again, but ever more seldom.
    assert pool.servers[0].errors < 60


def test_work_whose_task_is_cancelled_before_it_ran_is_not_lost():
    async def complete(_: Server, work: Work) -> Sample:
        await asyncio.sleep(0.001)
        return sample(work)

    delivered: Counter[int] = Counter()
    access = ServerAccess(urls=("http://s0", "http://s1"), requests_per_server=4)

    async def main() -> None:
        pool = Pool(access, complete, passes, healthy, lambda work, _: delivered.update([work.index]))
        original = pool._start

        def start(server: Server, work: Work) -> None:
            original(server, work)
            if work.tries == 0 and work.index % 7 == 0:
                work.tries = 1
                next(iter(work.running)).cancel()

        pool._start = start
        await asyncio.wait_for(pool.run(iter(works(100))), 30)

    asyncio.run(main())
    assert delivered == Counter(range(100))


def test_a_request_that_is_wrong_ends_the_run_with_the_servers_words():
    async def complete(_: Server, work: Work) -> Sample:
        if work.index == 3:
            raise Refused("HTTP 400: max_tokens is too large")
        return sample(work)

    with pytest.raises(UserError, match=r"HTTP 400: max_tokens is too large; the servers cannot be used"):
        run(complete, 10)


def test_the_last_request_of_a_stuck_server_is_taken_over():
    async def complete(server: Server, work: Work) -> Sample:
        await asyncio.sleep(3600 if server.url == "http://s0" and work.index < 3 else 0.01)
        return sample(work)

    start = time.monotonic()
    _, delivered = run(complete, 60)
    assert delivered == Counter(range(60))
    assert time.monotonic() - start < 10


def test_a_request_that_takes_too_long_is_given_up_and_sent_elsewhere():
    stuck: set[int] = set()

    async def complete(server: Server, work: Work) -> Sample:
        if server.url == "http://s0" and len(stuck) < 4:
            stuck.add(work.index)
            await asyncio.sleep(3600)
        await asyncio.sleep(0.02)
        return sample(work)

    _, delivered = run(complete, 1500, servers=2, timeout_s=0.5)
    assert delivered == Counter(range(1500))


def test_a_server_that_does_not_answer_loses_its_requests(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datagen.client, "HEALTH_EVERY_S", 0.1)
    monkeypatch.setattr(datagen.client, "TAKE_OVER_AFTER", 1e9)

    async def complete(server: Server, work: Work) -> Sample:
        await asyncio.sleep(3600 if server.url == "http://s0" else 0.01)
        return sample(work)

    async def is_healthy(server: Server) -> bool:
        return server.url != "http://s0"

    async def examine(server: Server) -> None:
        if server.why == "it does not answer":
            raise aiohttp.ClientConnectionError

    pool, delivered = run(complete, 50, examine=examine, is_healthy=is_healthy)
    assert delivered == Counter(range(50))
    assert pool.servers[0].samples == 0


def test_no_new_work_while_the_receiver_is_behind():
    running = 0
    most = 0

    async def complete(_: Server, work: Work) -> Sample:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return sample(work)

    delivered: list[int] = []
    access = ServerAccess(urls=("http://s0",), requests_per_server=50)

    async def drain() -> None:
        blocked = True
        pool = Pool(access, complete, passes, healthy, lambda work, _: delivered.append(work.index), lambda: blocked)
        task = asyncio.create_task(pool.run(iter(works(20))))
        await asyncio.sleep(0.3)
        assert running == 0
        blocked = False
        await task

    asyncio.run(drain())
    assert sorted(delivered) == list(range(20))
    assert most <= 20
