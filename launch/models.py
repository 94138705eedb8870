"""Model inputs: a folder or hub id from a recipe, checked and identified before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recovery.config import ModelInput
from recovery.errors import UserError, first_line
from recovery.files import HashMemory, digest_of, read_json
from recovery.sources import is_gguf, weight_files

TOKENIZER_AND_CONFIG = ("*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def resolve_model(value: str, revision: str | None, where: str, memory: HashMemory) -> ModelInput:
    """A local folder is identified by the hashes of its files, a hub model by its commit.

    Raises UserError: no such folder or model, no config, no safetensors weights (pickled ones are never read).
    """
    folder = Path(value).expanduser()
    if is_gguf(value):
        return _gguf(folder, where, memory)
    if folder.is_dir():
        return _local(folder, where, memory)
    if value.startswith((".", "/", "~")) or value.count("/") != 1 or value.endswith("/"):
        raise UserError(where, f"no folder {value}", "give a model folder, or a hub id such as amd/AMD-OLMo-1B-SFT")
    return _hub(value, revision, where)


def _local(folder: Path, where: str, memory: HashMemory) -> ModelInput:
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(where, f"no config.json in {folder}", "give the folder of a transformers model")
    read_json(config)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = [path.name for pattern in PICKLED for path in folder.glob(pattern)]
        if pickled:
            raise UserError(
                where,
                f"only pickled weights in {folder} ({pickled[0]}), which can run code when read",
                "save the model as safetensors",
            )
        raise UserError(where, f"no *.safetensors in {folder}", "save the model as safetensors")
    weight_files(folder)  # an index that is there must name what is there
    for path in weights:
        _check_safetensors(path, where)
    files = sorted([*weights, *(path for pattern in TOKENIZER_AND_CONFIG for path in folder.glob(pattern))])
    listing = {path.name: memory.sha256(path) for path in files if path.name != "manifest.json"}
    return ModelInput(path=str(folder.resolve()), digest=digest_of(listing))


def _gguf(path: Path, where: str, memory: HashMemory) -> ModelInput:
    if not path.is_file():
        raise UserError(where, f"no file {path}", "give the path of a GGUF file, or a model folder")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(where, f"{path} is not a GGUF file", "copy or convert it again")
    return ModelInput(path=str(path.resolve()), digest=f"gguf:{memory.sha256(path)}")


def _check_safetensors(path: Path, where: str) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise UserError(where, f"{path} is not a whole safetensors file ({error})", "copy or save it again") from error


def _hub(value: str, revision: str | None, where: str) -> ModelInput:
    from huggingface_hub import HfApi, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound, HfHubHTTPError

    try:
        info: Any = HfApi().model_info(value, revision=revision, timeout=10)
        names = [file.rfilename for file in info.siblings or []]
        if names and not any(name.endswith(".safetensors") for name in names):
            raise UserError(where, f"{value} has no safetensors weights on the hub", "choose a model that has")
        commit = str(info.sha)
    except HfHubHTTPError as error:
        first = first_line(error)
        raise UserError(
            where,
            f"neither a folder here nor a model the hub gives: {value} ({first})",
            "check the name and your access",
        ) from error
    except Exception as error:
        try:
            cached = [repo for repo in scan_cache_dir().repos if repo.repo_id == value and repo.repo_type == "model"]
        except (OSError, CacheNotFound):
            cached = []
        if not cached:
            raise UserError(
                where,
                f"no folder {value} here, and the model hub cannot be reached ({type(error).__name__})",
                "check the path, or connect, or download the model first",
            ) from error
        wanted = revision or "main"
        commits = [r.commit_hash for r in cached[0].revisions if wanted in r.refs or r.commit_hash == wanted]
        if not commits:
            raise UserError(where, f"{value} is cached, but not at {wanted}", "connect to the hub") from error
        commit = commits[0]
    return ModelInput(path=value, revision=commit, digest=f"hub:{value}@{commit}")
