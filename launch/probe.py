"""What one host is and does, measured on it: `recover-lora preflight` runs this on every host of a cluster.

    python -m launch.probe < settings.json

Prints one line of JSON. As one of several ranks, which torchrun started, it measures the network between them instead.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recovery.artifacts import REPOSITORY, package_versions
from recovery.config import Dtype

ROOMS = ("launch", "recovery", "datagen", "eval", "ds_configs")
MEASURE_S = 2.0
"""Of every rate."""
DISK_BYTES = 256 << 20
REDUCED_BYTES = {"cuda": 1 << 30, "cpu": 16 << 20}


def code_digest() -> str:
    """One hash of everything that runs of this checkout."""
    digest = hashlib.sha256()
    for room in ROOMS:
        for path in sorted((REPOSITORY / room).rglob("*")):
            if path.suffix in (".py", ".json", ".j2"):
                digest.update(f"{path.relative_to(REPOSITORY)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def rate_of(work: Callable[[], object], wait: Callable[[], object], amount: float) -> float:
    """amount a second, at best: the fastest of a few rounds of calls."""
    work()
    wait()
    best, ends = 0.0, time.perf_counter() + MEASURE_S
    calls = 1
    while time.perf_counter() < ends:
        began = time.perf_counter()
        for _ in range(calls):
            work()
        wait()
        took = time.perf_counter() - began
        best = max(best, amount * calls / took)
        calls = max(1, min(64, int(0.2 * calls / took)))
    return best


@dataclass(frozen=True)
class Product:
    """A matrix product to time: [rows, inner] times [inner, columns]."""

    rows: int
    inner: int
    columns: int
    dtype: Dtype


BARS = {"cuda": Product(8192, 8192, 8192, "bfloat16"), "cpu": Product(1536, 1536, 1536, "float32")}
"""What the bars of preflight mean."""


def devices(kind: str, product: Product | None = None) -> list[dict[str, Any]]:
    """Every device that torch sees: name, memory in GiB, TFLOP/s of a matrix product, GB/s of a copy."""
    import torch

    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        found = [torch.device("cpu")]
    else:
        found = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    return [_device(device, product or BARS[device.type]) for device in found]


def _device(device: Any, timed: Product) -> dict[str, Any]:
    import torch

    on_gpu = device.type == "cuda"

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize(device)

    dtype = getattr(torch, timed.dtype)
    one = torch.randn(timed.rows, timed.inner, device=device).to(dtype)
    other = torch.randn(timed.inner, timed.columns, device=device).to(dtype)
    product = torch.empty(timed.rows, timed.columns, device=device, dtype=dtype)
    operations = 2.0 * timed.rows * timed.inner * timed.columns
    flops = rate_of(lambda: torch.mm(one, other, out=product), wait, operations)
    source = torch.zeros((1 << 30) if on_gpu else (1 << 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = rate_of(lambda: target.copy_(source), wait, 2.0 * source.numel())  # read and written
    if on_gpu:
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, properties.total_memory
    else:
        name, memory = f"{torch.get_num_threads()} threads", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"name": name, "memory_gib": memory / 2**30, "gemm_tflops": flops / 1e12, "memory_gb_s": bandwidth / 1e9}


def disk(folder: Path) -> dict[str, Any]:
    """Free GiB where runs are to lie, and GB/s of a synced write; an error in words where nothing can be written."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".recover-lora-preflight-") as file:
            block = os.urandom(1 << 22)
            began = time.perf_counter()
            for _ in range(DISK_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            took = time.perf_counter() - began
        return {"free_gib": shutil.disk_usage(folder).free / 2**30, "write_gb_s": DISK_BYTES / took / 1e9}
    except OSError as error:
        return {"error": f"{folder}: {error.strerror}"}


def tracking(uri: str | None) -> str | None:
    """Why the MLflow store at an address does not answer, or None. Files are looked at by the first rank alone."""
    if uri is None or not uri.startswith("http"):
        return None
    try:
        parts = urllib.parse.urlsplit(uri)
        # Without a name and password in it: the server is there whether it lets us in or not.
        bare = parts._replace(netloc=parts.netloc.rpartition("@")[2], path=f"{parts.path.rstrip('/')}/health")
        with urllib.request.urlopen(urllib.parse.urlunsplit(bare), timeout=10):
            return None
    except urllib.error.HTTPError as error:
        return None if error.code in (401, 403, 404) else f"HTTP {error.code}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        return type(error).__name__


def probe(settings: dict[str, Any]) -> dict[str, Any]:
    asked = time.time()
    unseen = [
        path for path in map(Path, settings["models"]) if not (path.is_file() or (path / "config.json").is_file())
    ]
    found = {
        "host": socket.gethostname(),
        "clock": asked,
        "code": code_digest(),
        "versions": package_versions(),
        "missing_models": [str(path) for path in unseen],
        "tracking": tracking(settings["tracking"]),
        "disk": disk(Path(settings["runs_dir"])),
        "devices": devices(settings["device"]),
    }
    return {**found, "seconds": time.time() - asked}


def network() -> None:
    """All-reduce bandwidth (NCCL's bus bandwidth) in GB/s, inside this host and over all; rank 0 prints it."""
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, ranks, local = dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"])
    tensor = torch.ones(REDUCED_BYTES["cuda" if on_gpu else "cpu"] // 4, device="cuda" if on_gpu else "cpu")
    inside = [dist.new_group(list(range(first, first + local))) for first in range(0, ranks, local)]

    def bandwidth(group: Any, size: int) -> float | None:
        if size == 1:
            return None
        seconds = []
        for _ in range(5):
            dist.barrier(group)
            began = time.perf_counter()
            dist.all_reduce(tensor, group=group)
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        # Every byte is sent (n - 1) / n times to be summed and as often to be spread.
        return 2 * (size - 1) / size * tensor.numel() * 4 / min(seconds) / 1e9

    mine = {"host": socket.gethostname(), "inside_gb_s": bandwidth(inside[rank // local], local)}
    hosts: list[Any] = [None] * ranks
    dist.all_gather_object(hosts, mine)
    across = bandwidth(None, ranks) if ranks > local else None
    if rank == 0:
        print(json.dumps({"hosts": hosts[::local], "across_gb_s": across}), flush=True)
    dist.destroy_process_group()


def main() -> None:
    if "RANK" in os.environ and "LOCAL_WORLD_SIZE" in os.environ:
        network()
    else:
        print(json.dumps(probe(json.load(sys.stdin))), flush=True)


if __name__ == "__main__":
    main()
