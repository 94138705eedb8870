"""Readers of files from outside, on ten thousand damaged ones each: they return or raise UserError, and write nothing.

Cases are edits of a good file: of its bytes, and of the structure behind them with every checksum made right again, as
one who wants to do harm would. The same cases every time.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from recovery.artifacts import MANIFEST, verify
from recovery.batches import loss_positions
from recovery.checkpoint import load_checkpoint, save_checkpoint
from recovery.corpus import SCHEMA, SUMMARY, Sample, Tokens, read_split, shards_of, write_shard, write_table
from recovery.errors import UserError
from recovery.files import sha256_of
from recovery.head import Head
from recovery.teacher_cache import HIDDEN, SPARSE, Blocks, block_path, read_head, write_block, write_head
from recovery.teacher_signal import TopLogprobs, read_signal, signal_path, write_signal

CASES = 5_000
"""Of each of the two ways in which recipes, manifests and corpora are damaged."""
FILE_CASES = 1_000
"""Of each of the three ways in which each of five kinds of files with tensors is."""
many = settings(
    max_examples=CASES,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

# ---- damage ----

Edit = tuple[int, int, bytes]
"""(place, bytes that go, bytes that come); a place beyond the end counts from the beginning again."""
edits = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 40), st.binary(max_size=12)), min_size=1, max_size=4)


def edited(data: bytes, changes: list[Edit]) -> bytes:
    for place, gone, come in changes:
        at = place % (len(data) + 1)
        data = data[:at] + come + data[at + gone :]
    return data


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["../x", "/etc/passwd", "a\x00b", ".", "", "\ud800", "1e400", "=1+1"])
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)
ways = st.lists(st.integers(0, 50), min_size=1, max_size=6)
"""Down into a structure: at every level one of its entries."""


def replaced(content: Any, way: list[int], value: Any) -> Any:
    """A copy of a structure of dicts and lists with something else at the end of the way."""
    if not way or not isinstance(content, dict | list) or not content:
        return value
    keys = list(content) if isinstance(content, dict) else list(range(len(content)))
    chosen = keys[way[0] % len(keys)]
    copy: Any = content.copy()
    copy[chosen] = replaced(content[chosen], way[1:], value)
    return copy


def listing(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_size for path in folder.rglob("*")}


def holds(read: Callable[[], object], folder: Path) -> bool:
    """Whether it was read without complaint; fails for any other error than the user's, and for a write."""
    before, complaint = listing(folder), ""
    try:
        read()
    except UserError as error:
        complaint = str(error)
    assert listing(folder) == before
    assert all(line.isprintable() for line in complaint.split("\n"))
    return not complaint


# ---- recipes ----

RECIPE = """\
name: one
seed: 3
models: {reference: a, degraded: null, dtype: auto}
degrade: {kind: rounding, modules: [kv, "model.layers.*"], bits: 4, group: 64}
generate:
  samples: 10
  held_out_samples: 4
  max_length: 64
adapter: {placement: [gate_proj, up_proj], rank: 8, init: closed_form_sequential}
teacher: {kind: sparse_logits, top: 8, tail: 2}
train: {learning_rate: 1.0e-3, epochs: 2, loss: {kind: forward_kl, temperature: 1}}
evaluate: {suite: paper, limit: 5, data_dir: b}
"""
CONTENT = yaml.safe_load(RECIPE)


@many
@given(changes=edits)
def test_recipes_of_damaged_text(tmp_path: Path, changes: list[Edit]):
    from launch.recipe import load_recipe

    path = tmp_path / "recipe.yaml"
    path.write_bytes(edited(RECIPE.encode(), changes))
    holds(lambda: load_recipe(path), tmp_path)


@many
@given(way=ways, value=values)
def test_recipes_of_other_content(tmp_path: Path, way: list[int], value: Any):
    from launch.recipe import Recipe, check_config

    content = replaced(CONTENT, way, value)
    if isinstance(content, dict):
        holds(lambda: check_config(Recipe, content, tmp_path / "recipe.yaml"), tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000,
        "a: " + "{b: " * 5000,
        "a: &a [1, 1]\n"
        + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in itertools.pairwise("abcdefghijklmnop")),
        "seed: &a [*a]",
        "? {a: 1}\n: 2",
        "seed: 2001-99-99",
        "seed: !!int x",
        "seed: !!bool x",
        "seed: !!timestamp x",
        "seed: " + "9" * 5000,
        "seed: !!python/object/apply:os.system [touch x]",
        "1: 2",
        "\x00",
    ],
)
def test_recipes_that_would_do_harm(tmp_path: Path, text: str):
    from launch.recipe import load_recipe

    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as raised:
        load_recipe(path)
    assert len(str(raised.value)) < 5000


# ---- manifests ----


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact")
    (folder / "deep").mkdir()
    files = {"a.bin": b"abc", "deep/b.bin": b"defg"}
    for name, payload in files.items():
        (folder / name).write_bytes(payload)
    manifest = {
        "manifest_schema": 1,
        "stage": "generate",
        "identity": "0" * 64,
        "job": {"stage": "generate", "seed": 1},
        "inputs": {"reference": {"path": "a", "digest": "b"}},
        "files": {name: {"sha256": sha256_of(folder / name), "bytes": len(payload)} for name, payload in files.items()},
        "content": "0" * 64,
        "details": {"tokens": 3},
        "versions": {"torch": "2"},
        "git": {"revision": None, "dirty": None},
        "seconds": 1.5,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


@many
@given(changes=edits)
def test_manifests_of_damaged_text(artifact: Path, changes: list[Edit]):
    _verify_other(artifact, edited((artifact / MANIFEST).read_bytes(), changes))


@many
@given(way=ways, value=values)
def test_manifests_of_other_content(artifact: Path, way: list[int], value: Any):
    content = replaced(json.loads((artifact / MANIFEST).read_text()), way, value)
    _verify_other(artifact, json.dumps(content).encode())


def _verify_other(artifact: Path, data: bytes) -> None:
    good = (artifact / MANIFEST).read_bytes()
    try:
        (artifact / MANIFEST).write_bytes(data)
        holds(lambda: verify(artifact), artifact)
    finally:
        (artifact / MANIFEST).write_bytes(good)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "deep/../../outside", "link"])
def test_a_manifest_names_no_file_outside(artifact: Path, name: str):
    """Not even to hash it: whose bytes it is would be told by the answer."""
    outside = artifact.parent / "outside"
    outside.write_bytes(b"abc")
    if name == "link":
        (artifact / "link").symlink_to(outside)
    content = json.loads((artifact / MANIFEST).read_text())
    content["files"][name] = content["files"]["a.bin"]
    good = (artifact / MANIFEST).read_bytes()
    try:
        (artifact / MANIFEST).write_text(json.dumps(content))
        with pytest.raises(UserError, match="outside"):
            verify(artifact)
    finally:
        (artifact / MANIFEST).write_bytes(good)
        (artifact / "link").unlink(missing_ok=True)


@pytest.mark.parametrize("index", ["[]", '{"weight_map": {}}', '{"weight_map": {"a": "../x.safetensors"}}', "[" * 9000])
def test_a_models_index_names_no_file_outside(tmp_path: Path, index: str):
    from launch.models import resolve_model
    from recovery.files import HashMemory

    model = tmp_path / "model"
    model.mkdir()
    for path in (model / "a.safetensors", tmp_path / "x.safetensors"):
        path.write_bytes(save({"a": torch.zeros(1)}))
    (model / "config.json").write_text("{}")
    (model / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=r"index\.json"):
        resolve_model(str(model), None, "models.reference", HashMemory(None))


# ---- corpora ----

SAMPLES = [Sample(i, 7, i + 3, "length", list(range(i, i + 9))) for i in range(6)]
ROWS = [np.asarray(sample.tokens, dtype=np.int32) for sample in SAMPLES]
INDEX = [sample.index for sample in SAMPLES]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_shard(folder / "train" / "shard-00000.parquet", SAMPLES)
    (folder / SUMMARY).write_text('{"skip": 1}')
    return folder


def _read_other(corpus: Path, data: bytes) -> None:
    (shard,) = shards_of(corpus, "train")
    good = shard.read_bytes()
    try:
        shard.write_bytes(data)
        holds(lambda: _used(read_split(corpus, "train")), corpus)
    finally:
        shard.write_bytes(good)


def _used(tokens: Tokens) -> None:
    """What every reader does with them."""
    for position in range(len(tokens)):
        assert loss_positions(len(tokens.row(position)), tokens.skip) >= 0
        assert tokens.row(position).dtype == np.int32


@many
@given(changes=edits)
def test_shards_of_damaged_bytes(corpus: Path, changes: list[Edit]):
    _read_other(corpus, edited((corpus / "train" / "shard-00000.parquet").read_bytes(), changes))


COLUMN_TYPES = [pa.int64(), pa.uint64(), pa.int32(), pa.float64(), pa.string(), pa.bool_(), pa.list_(pa.int32())]
COLUMN_TYPES += [pa.list_(pa.float32()), pa.list_(pa.list_(pa.int32())), pa.large_list(pa.int32()), pa.null()]
cells = st.none() | st.integers(-(2**31), 2**31 - 1) | st.lists(st.none() | st.integers(-5, 2**31 - 1), max_size=5)
columns = st.tuples(
    st.sampled_from([*SCHEMA.names, "more"]), st.sampled_from(COLUMN_TYPES), st.lists(cells, max_size=6)
)


@many
@given(changes=st.lists(columns, min_size=1, max_size=2))
def test_shards_of_other_tables(corpus: Path, changes: list[tuple[str, pa.DataType, list[Any]]]):
    (shard,) = shards_of(corpus, "train")
    good = shard.read_bytes()
    import pyarrow.parquet as pq

    table = pq.read_table(shard)
    for name, kind, cells in changes:
        filled = (cells + [None] * len(SAMPLES))[: len(SAMPLES)]
        try:
            column = pa.array(filled, kind)
        except (pa.ArrowException, TypeError, OverflowError, ValueError):
            column = pa.nulls(len(SAMPLES), kind)
        place = table.schema.get_field_index(name)
        table = table.append_column(name, column) if place < 0 else table.set_column(place, name, column)
    try:
        write_table(shard, table)
        holds(lambda: _used(read_split(corpus, "train")), corpus)
    finally:
        shard.write_bytes(good)


# ---- teacher caches, signals, heads, checkpoints ----

TOKENS = Tokens(
    np.array(INDEX, dtype=np.int64),
    np.cumsum([0, *map(len, ROWS)]).astype(np.int64),
    np.concatenate(ROWS),
    1,
)
POSITIONS = sum(loss_positions(len(row), 1) for row in ROWS)


def header_and_data(payload: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(payload[:8], "little")
    return json.loads(payload[8 : 8 + size]), payload[8 + size :]


def with_header(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensors_of(kind: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    if kind == "hidden":
        return {"hidden": torch.randn(POSITIONS, 4).bfloat16()}
    return {
        "top_ids": torch.randint(0, 9, (POSITIONS, 3), dtype=torch.int32),
        "top_logprobs": torch.randn(POSITIONS, 3).half(),
        "tail_ids": torch.randint(0, 9, (POSITIONS, 2), dtype=torch.int32),
        "tail_logprobs": torch.randn(POSITIONS, 2).half(),
        "tail_weight": torch.rand(POSITIONS),
        "rest": torch.rand(POSITIONS),
    }


@pytest.fixture(scope="module", params=["hidden", "sparse", "signal", "head", "checkpoint"])
def tensor_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(a safetensors file that something of ours reads, what reads it)."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param in ("hidden", "sparse"):
        write_block(block_path(folder, 0), TOKENS, range(len(TOKENS)), tensors_of(request.param))
        names = HIDDEN if request.param == "hidden" else SPARSE

        def read_blocks() -> None:
            blocks = Blocks(folder, TOKENS, names)
            for position in range(len(TOKENS)):
                assert all(len(tensor) == loss_positions(9, 1) for tensor in blocks[position])

        return block_path(folder, 0), read_blocks
    if request.param == "signal":
        shard = folder / "train" / "shard-00000.parquet"
        write_shard(shard, SAMPLES)
        one = TopLogprobs(
            np.zeros((5, 2), np.int32), np.full((5, 2), -1, np.float32), np.zeros(5, np.float32), np.ones(5, bool)
        )
        write_signal(signal_path(shard), INDEX, ROWS, [one] * len(ROWS))
        return signal_path(shard), lambda: [one.rest for one in read_signal(shard, INDEX, ROWS)]
    if request.param == "head":
        head = Head(torch.randn(9, 4), torch.randn(9), 1.0, None)
        write_head(folder, head)
        return folder / "head.safetensors", lambda: read_head(folder, head, torch.float32)
    save_checkpoint(folder, 3, {"a": torch.randn(3)})
    return folder / "step-00000003.safetensors", lambda: load_checkpoint(folder)


def _read_tensors(place: tuple[Path, Any], data: bytes) -> None:
    path, read = place
    good = path.read_bytes()
    try:
        path.write_bytes(data)
        holds(read, path.parent)
    finally:
        path.write_bytes(good)


@settings(many, max_examples=FILE_CASES)
@given(changes=edits)
def test_tensors_of_damaged_bytes(tensor_file: tuple[Path, Any], changes: list[Edit]):
    _read_tensors(tensor_file, edited(tensor_file[0].read_bytes(), changes))


DTYPES = st.sampled_from(["BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "F64", "I64", "F8_E4M3", "C64"])
shapes = st.lists(st.integers(0, 60), max_size=3)


@settings(many, max_examples=FILE_CASES)
@given(which=st.integers(0, 9), dtype=DTYPES, shape=shapes, gone=st.booleans())
def test_tensors_of_another_kind(tensor_file: tuple[Path, Any], which: int, dtype: str, shape: list[int], gone: bool):
    """Well-formed files with a tensor too few, or of another dtype and shape."""
    from safetensors.torch import load

    tensors = load(tensor_file[0].read_bytes())
    name = sorted(tensors)[which % len(tensors)]
    if gone:
        tensors.pop(name)
    else:
        names = {"BOOL": "bool", "U8": "uint8", "F8_E4M3": "float8_e4m3fn", "C64": "complex64", "BF16": "bfloat16"}
        wanted = names.get(dtype, dtype.replace("I", "int").replace("F", "float"))
        tensors[name] = torch.ones(shape).to(getattr(torch, wanted))
    _read_tensors(tensor_file, save(tensors))


@settings(many, max_examples=FILE_CASES)
@given(way=ways, value=values)
def test_tensors_of_another_header(tensor_file: tuple[Path, Any], way: list[int], value: Any):
    header, data = header_and_data(tensor_file[0].read_bytes())
    _read_tensors(tensor_file, with_header(replaced(header, way, value), data))
