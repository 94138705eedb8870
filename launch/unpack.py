"""Turn downloaded archives into what an asset's folder holds: members, whole files, a checkpoint."""

from __future__ import annotations

import shutil
import stat
import sys
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO


class AssetError(Exception):
    """An asset cannot be had; the message is one line that says why and what to do."""


def say(line: str) -> None:
    print(f"assets: {line}", flush=True)


def unpack(archive: Path, members: Mapping[str, str], into: Path) -> None:
    """Write the chosen members beneath `into`, and nothing outside it.

    Raises:
        AssetError: a member would land outside `into`, or a name in `members` matches nothing.
    """
    if archive.suffix == ".gz":
        _unpack_tar(archive, members, into)
    else:
        _unpack_zip(archive, members, into)


def _unpack_zip(archive: Path, members: Mapping[str, str], into: Path) -> None:
    with zipfile.ZipFile(archive) as bundle:
        files = {info.filename: info for info in bundle.infolist() if not info.is_dir()}
        for name, path in _targets(archive, list(files), members, into).items():
            if stat.S_ISLNK(files[name].external_attr >> 16):
                raise _leads_out(archive, name)
            with bundle.open(files[name]) as source:
                _write(source, into / path)


def _unpack_tar(archive: Path, members: Mapping[str, str], into: Path) -> None:
    with tarfile.open(archive) as bundle:
        files = {info.name: info for info in bundle if not info.isdir()}
        for name, path in _targets(archive, list(files), members, into).items():
            source = bundle.extractfile(files[name]) if files[name].isfile() else None
            if source is None:
                raise _leads_out(archive, name)
            with source:
                _write(source, into / path)


def _write(source: IO[bytes], target: Path) -> None:
    """Contents alone: owners, modes and times of an archive are nobody's here."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as sink:
        shutil.copyfileobj(source, sink)


def _targets(archive: Path, names: Sequence[str], members: Mapping[str, str], into: Path) -> dict[str, str]:
    """Where each chosen file of an archive goes, by its name there; paths are relative to `into`.

    Raises AssetError for a name in `members` that matches none, and for a file that would lie outside `into`.
    """
    root, found, unmatched = into.resolve(), dict[str, str](), set(members)
    for name in names:
        member = next((member for member in members if _covers(member, name)), None)
        if member is None:
            continue
        unmatched.discard(member)
        found[name] = members[member] + name.removeprefix(member)
        if not (root / found[name]).resolve().is_relative_to(root):
            raise _leads_out(archive, name)
    if unmatched:
        there = ", ".join(sorted({name.rpartition("/")[0] for name in names})[:10])
        raise AssetError(f"{archive.name} lacks {', '.join(sorted(unmatched))}; it has: {there}, ...")
    return found


def _covers(member: str, name: str) -> bool:
    return name.startswith(member) if member.endswith("/") else name == member


def _leads_out(archive: Path, name: str) -> AssetError:
    return AssetError(f"{archive.name}: member {name!r} leads out of the folder; refused")


def join_parts(folder: Path, name: str) -> None:
    """Put the files <name>.part* together again, in their order, as <name>."""
    with (folder / name).open("wb") as sink:
        for part in sorted(folder.glob(f"{name}.part*")):
            with part.open("rb") as source:
                shutil.copyfileobj(source, sink)
            part.unlink()


def unpack_gguf(folder: Path, name: str, origin: str, probe: tuple[str, str]) -> None:
    """Turn the GGUF in `folder` into a bf16 safetensors checkpoint that plain Auto classes load.

    origin: model, author and licence, for the notice; probe: a text and what the model is known to go on with.

    Raises:
        AssetError: the checkpoint does not say what the model is known to say.
    """
    say(f"unpacking {name} to bf16")
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    # Without `dequantize` the weights stay packed and cannot be saved.
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.config.__dict__.pop("_model_name_or_path", None)  # the GGUF's title, which is no path
    tokenizer.save_pretrained(folder)
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # a full disk, most often; not an OSError there
        raise AssetError(f"{name} could not be saved as a checkpoint: {error}") from error
    (folder / name).unlink()
    (folder / "NOTICE").write_text(
        f"{origin}.\n\nUnpacked to bf16 from {name} of the packages in SOURCE.json. These weights went through 4 bits\n"
        "once and are not bit for bit those that the author published. Here they serve as a full-precision reference.\n"
    )
    check_model(folder, *probe)


def check_model(folder: Path, text: str, answer: str) -> None:
    """Load the saved checkpoint as anyone would and let it continue a known text, greedily.

    Raises:
        AssetError: the next token is not the known answer.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits_V = model(**tokenizer(text, return_tensors="pt")).logits[0, -1]
    continuation = tokenizer.decode(logits_V.argmax())
    if answer not in continuation:
        raise AssetError(
            f"the unpacked model continues {text!r} with {continuation!r} instead of {answer!r}: "
            "the installed transformers or gguf misreads the file; install requirements/core.txt"
        )
    say(f"checked: {text!r} -> {continuation!r}")
