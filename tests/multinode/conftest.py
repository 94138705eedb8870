from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.multinode.hosts import Hosts, missing
from tests.multinode.site import RUN_S, Site


def require(reason: str | None) -> None:
    """Skip with the reason; in CI nothing is skipped."""
    if reason is not None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    require(missing())
    with Hosts(tmp_path_factory.mktemp("hosts")) as made:
        yield made


@pytest.fixture(scope="session")
def alone(prepared: tuple[Path, Path, Path], hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The recipe trained on one host."""
    site = Site.make(tmp_path_factory.mktemp("alone"), prepared, hosts)
    assert hosts.complete(site.arguments(site.cluster()), site.output, RUN_S) == 0, site.said()
    return site


@pytest.fixture
def site(prepared: tuple[Path, Path, Path], hosts: Hosts, tmp_path: Path) -> Site:
    return Site.make(tmp_path, prepared, hosts)
