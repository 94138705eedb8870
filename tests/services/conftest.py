"""An MLflow server, PostgreSQL and a browser, each started here on loopback and ended here."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

START_S = 120.0
PAGE_S = 90.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class MlflowServer:
    """store: SQLAlchemy's address of what the server keeps its runs in."""

    store: str
    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", self.store, "--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--workers", "1"], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return
            assert self.process.poll() is None, (self.folder / "server.log").read_text()
            time.sleep(0.5)
        raise AssertionError(f"no answer within {START_S} s: {(self.folder / 'server.log').read_text()}")

    def kill(self) -> None:
        """As a machine that fails: no goodbye."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The address of an empty database."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not found:
        pytest.skip("no PostgreSQL in /usr/lib/postgresql (tests/services/install.sh as root)")
    folder = Path("/tmp") / f"recover-lora-postgresql-{os.getpid()}"
    folder.mkdir(mode=0o700)
    user = None  # PostgreSQL refuses to be root
    if os.getuid() == 0:
        user = pwd.getpwnam("postgres")
        os.chown(folder, user.pw_uid, user.pw_gid)

    def run(*command: str | Path) -> None:
        subprocess.run(
            [str(part) for part in command],
            check=True,
            capture_output=True,
            user=user.pw_uid if user else None,
            cwd="/",
        )

    port, data = free_port(), folder / "data"
    run(found[-1] / "initdb", "-D", data, "-U", "recover", "--auth=trust", "--no-sync")
    settings = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    run(found[-1] / "pg_ctl", "-D", data, "-w", "-l", folder / "log", "-o", settings, "start")
    try:
        run(found[-1] / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "recover", "mlflow")
        yield f"postgresql://recover@127.0.0.1:{port}/mlflow"
    finally:
        run(found[-1] / "pg_ctl", "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MlflowServer]:
    folder = tmp_path / "server"
    folder.mkdir()
    store = f"sqlite:///{folder / 'mlflow.db'}"
    if request.param == "postgresql":
        store = request.getfixturevalue("postgresql")
    server = MlflowServer(store, folder, free_port())
    try:
        server.start()
        yield server
    finally:
        server.kill()


@dataclass
class Browser:
    """Headless Chromium, driven through its own DevTools protocol."""

    socket: aiohttp.ClientWebSocketResponse
    complaints: list[str] = field(default_factory=list)
    """What pages logged as errors."""
    _count: int = 0

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        await self.socket.send_json({"id": self._count, "method": method, "params": parameters})
        while True:
            message = await self.socket.receive_json(timeout=PAGE_S)
            if message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
                self.complaints.append(message["params"]["entry"]["text"])
            if message.get("id") == self._count:
                assert "error" not in message, message
                return message["result"]

    async def see(self, url: str, *texts: str) -> tuple[str, bytes]:
        """Open a page, wait until it is loaded and shows these texts; returns its document and a picture (PNG)."""
        await self.call("Page.navigate", url=url)
        deadline = time.monotonic() + PAGE_S
        while True:
            # A page that is still read in has an outerHTML too, closed as if it ended there.
            loaded = "document.readyState === 'complete' ? document.documentElement.outerHTML : ''"
            answer = await self.call("Runtime.evaluate", expression=loaded)
            document = str(answer["result"].get("value"))
            if document and all(text in document for text in texts):
                break
            assert time.monotonic() < deadline, f"{url} does not show {texts}: {document[:2000]}"
            await asyncio.sleep(0.3)
        picture = await self.call("Page.captureScreenshot", format="png")
        return document, base64.b64decode(picture["data"])


@contextlib.asynccontextmanager
async def chromium(folder: Path) -> AsyncIterator[Browser]:
    """folder: an empty one for its profile."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium here (tests/services/install.sh as root)")
    command = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command += [f"--user-data-dir={folder}", "--remote-debugging-port=0", "--window-size=1100,1800"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"]  # tests send nothing elsewhere
    with (folder.parent / "chromium.log").open("wb") as log:
        process = subprocess.Popen([*command, "about:blank"], stderr=log, stdout=log, start_new_session=True)
    try:
        note, deadline = folder / "DevToolsActivePort", time.monotonic() + PAGE_S
        while not (note.exists() and note.read_text().count("\n")):
            assert time.monotonic() < deadline, (folder.parent / "chromium.log").read_text()
            await asyncio.sleep(0.1)
        port = note.read_text().split()[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                (page,) = [target for target in await answer.json() if target["type"] == "page"]
            async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as connection:
                browser = Browser(connection)
                await browser.call("Page.enable")
                await browser.call("Log.enable")
                yield browser
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
