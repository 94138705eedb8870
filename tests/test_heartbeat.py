"""The heartbeat: whatever happens to one rank, all end soon, the missing one is named, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.processes import children_of, wait_until

LIMIT_S = 5.0
RANK = """
import os, sys, time
from recovery.heartbeat import Heart, Settings
rank, folder, agent = int(sys.argv[1]), sys.argv[2], os.getppid()
note = os.path.join(folder, "port")
while rank and not os.path.exists(note):
    time.sleep(0.05)
hub = ("127.0.0.1", int(open(note).read())) if rank else None
heart = Heart(Settings("key", rank, 3, f"node-{rank}", agent, hub, "127.0.0.1", float(sys.argv[3]), True))
if not rank:
    with open(note + ".new", "w") as file:
        file.write(str(heart.port))
    os.rename(note + ".new", note)
print("beating", flush=True)
for line in sys.stdin:
    heart.leave(line.strip())
    break
"""
AGENT = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', *sys.argv[1:]]).returncode)"


@dataclass
class Rank:
    agent: subprocess.Popen[str]
    process: int
    watcher: int
    errors: Path


def is_alive(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[list[Rank]]:
    """Three ranks as a launcher's agents would start them, one a host."""
    started: list[subprocess.Popen[str]] = []
    for number in range(3):
        with (tmp_path / f"stderr-{number}").open("w") as errors:
            arguments = [RANK, str(number), str(tmp_path), str(LIMIT_S)]
            started.append(
                subprocess.Popen(
                    [sys.executable, "-c", AGENT, *arguments],
                    cwd=REPOSITORY,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
            )
    found = []
    for number, agent in enumerate(started):
        assert agent.stdout is not None
        assert agent.stdout.readline() == "beating\n"
        (process,) = children_of(agent.pid)
        (watcher,) = children_of(process)
        found.append(Rank(agent, process, watcher, tmp_path / f"stderr-{number}"))
    time.sleep(2)  # the hub has heard of all
    yield found
    for rank in found:
        for process in (rank.watcher, rank.process, rank.agent.pid):
            if is_alive(process):
                os.kill(process, signal.SIGKILL)
        rank.agent.wait()


def wait_for_the_end(ranks: list[Rank], but: tuple[int, ...] = ()) -> str:
    """Until nothing of them is left; what they said."""
    left = [process for rank in ranks for process in (rank.process, rank.watcher) if process not in but]
    # Beats of a second weigh more against these few seconds than against the default limit.
    wait_until(lambda: not any(is_alive(process) for process in left), LIMIT_S + 3)
    return "".join(rank.errors.read_text() for rank in ranks)


@pytest.mark.parametrize("number", [0, 1])
def test_a_killed_rank_ends_all_and_is_named(ranks: list[Rank], number: int):
    os.kill(ranks[number].process, signal.SIGKILL)
    assert f"rank {number} on node-{number} was killed" in wait_for_the_end(ranks)


@pytest.mark.parametrize("number", [0, 2])
def test_a_frozen_rank_ends_all_itself_too(ranks: list[Rank], number: int):
    os.kill(ranks[number].process, signal.SIGSTOP)
    assert f"rank {number} on node-{number} has not answered for 4 s" in wait_for_the_end(ranks)


def test_a_frozen_host_ends_the_others_and_itself_when_it_goes_on(ranks: list[Rank]):
    frozen = ranks[1]
    for process in (frozen.agent.pid, frozen.process, frozen.watcher):
        os.kill(process, signal.SIGSTOP)
    said = wait_for_the_end(ranks, but=(frozen.process, frozen.watcher))
    assert "rank 1 on node-1 has not answered for 4 s" in said
    for process in (frozen.watcher, frozen.process, frozen.agent.pid):
        os.kill(process, signal.SIGCONT)
    wait_for_the_end(ranks)


def test_a_frozen_hub_ends_the_others(ranks: list[Rank]):
    hub = ranks[0]
    for process in (hub.process, hub.watcher):
        os.kill(process, signal.SIGSTOP)
    said = wait_for_the_end(ranks, but=(hub.process, hub.watcher))
    assert "the host of rank 0 has not answered for 4 s" in said


def test_a_killed_watcher_ends_all(ranks: list[Rank]):
    os.kill(ranks[2].watcher, signal.SIGKILL)
    assert "rank 2 on node-2 has not answered" in wait_for_the_end(ranks)


def test_a_killed_agent_ends_all(ranks: list[Rank]):
    os.kill(ranks[1].agent.pid, signal.SIGKILL)
    assert "the launcher is gone; ending the ranks on node-1" in wait_for_the_end(ranks)


def say(rank: Rank, word: str) -> None:
    assert rank.agent.stdin is not None
    rank.agent.stdin.write(f"{word}\n")
    rank.agent.stdin.flush()


def test_ranks_that_are_done_leave_the_others_alone(ranks: list[Rank]):
    say(ranks[1], "done")
    wait_until(lambda: not is_alive(ranks[1].watcher))
    time.sleep(LIMIT_S)
    assert is_alive(ranks[0].process)
    assert is_alive(ranks[2].process)
    say(ranks[2], "done")
    say(ranks[0], "done")
    assert wait_for_the_end(ranks) == ""
    assert [rank.agent.wait() for rank in ranks] == [0, 0, 0]


def test_a_rank_that_fails_gives_the_others_a_moment(ranks: list[Rank]):
    say(ranks[2], "failed")
    time.sleep(2)
    assert is_alive(ranks[1].process)
    assert "rank 2 on node-2 failed" in wait_for_the_end(ranks)
