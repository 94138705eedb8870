"""Pieces and shards: the same shards whatever the order, cuts, doubles and restarts."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import datagen.pieces
from datagen.pieces import Pieces, drop_damaged, locate, seal
from recovery.corpus import Sample, read_rows
from recovery.errors import DamagedArtifact
from recovery.teacher_signal import TopLogprobs, check_signal

COUNT = 23


def make(index: int, signal: bool = False) -> Sample:
    tokens = np.arange(index, index + 2 + index % 5, dtype=np.int32)
    new = len(tokens) - 1
    top = TopLogprobs(
        np.full((new, 2), index, np.int32),
        np.full((new, 2), -1.5, np.float32),
        np.full(new, -1.5, np.float32),
        np.arange(new) >= 1,
    )
    return Sample(index, 2**64 - 1 - index, index, "length", tokens, top if signal else None)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datagen.pieces.seal, "__defaults__", (None, 5, lambda _: None))
    monkeypatch.setattr(datagen.pieces, "CACHE_BYTES", 1)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    order=st.permutations(range(COUNT)), cuts=st.sets(st.integers(1, COUNT - 1)), doubles=st.sets(st.integers(0, 22))
)
def test_the_same_shards_whatever_the_order(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], cuts: set[int], doubles: set[int]
):
    folder = tmp_path_factory.mktemp("corpus")
    edges = [0, *sorted(cuts), COUNT]
    pieces = Pieces(folder / "pieces")
    for first, last in itertools.pairwise(edges):
        pieces.write([make(index) for index in order[first:last]])
    pieces.write([make(index) for index in sorted(doubles)] or [make(0)])
    seal(pieces.paths(), range(COUNT), folder / "train")
    rows = [row for shard in sorted((folder / "train").iterdir()) for row in read_rows(shard)]
    assert [row["index"] for row in rows] == list(range(COUNT))
    assert [row["tokens"] for row in rows] == [np.asarray(make(index).tokens).tolist() for index in range(COUNT)]
    assert [row["seed"] for row in rows] == [2**64 - 1 - index for index in range(COUNT)]

    straight = Pieces(folder / "straight")
    straight.write([make(index) for index in range(COUNT)])
    seal(straight.paths(), range(COUNT), folder / "expected")
    assert content(folder / "train") == content(folder / "expected")


def test_a_missing_index_is_named_and_can_be_filled(tmp_path: Path):
    pieces = Pieces(tmp_path / "pieces")
    pieces.write([make(index) for index in range(COUNT) if index != 13])
    assert locate(pieces.paths()).missing(range(COUNT)).tolist() == [13]
    with pytest.raises(DamagedArtifact, match=r"1 samples of 10\.\.14 are missing"):
        seal(pieces.paths(), range(COUNT), tmp_path / "train")
    assert [path.name for path in sorted((tmp_path / "train").iterdir())] == [
        "shard-00000.parquet",
        "shard-00001.parquet",
    ]
    again = Pieces(tmp_path / "pieces")
    again.write([make(13)])
    seal([*sorted((tmp_path / "train").iterdir()), *again.paths()], range(COUNT), tmp_path / "train")
    assert len(list((tmp_path / "train").iterdir())) == 5


def test_a_damaged_piece_counts_as_missing(tmp_path: Path):
    pieces = Pieces(tmp_path / "pieces")
    pieces.write([make(index) for index in range(10)])
    pieces.write([make(index) for index in range(10, COUNT)])
    damaged = pieces.paths()[0]
    content = bytearray(damaged.read_bytes())
    content[len(content) // 3] ^= 0xFF  # one bit pattern in the pages: only their checksums tell
    damaged.write_bytes(content)
    said: list[str] = []
    drop_damaged(pieces.paths(), said.append)
    assert said == ["piece-000000.parquet is damaged; its samples are made again"]
    assert locate(pieces.paths()).missing(range(COUNT)).tolist() == list(range(10))
    # The number of the dropped piece is not given again while later ones stand.
    Pieces(tmp_path / "pieces").write([make(0)])
    assert [path.name for path in pieces.paths()] == ["piece-000001.parquet", "piece-000002.parquet"]


def test_the_signal_goes_with_its_rows(tmp_path: Path):
    pieces = Pieces(tmp_path / "pieces")
    pieces.write([make(index, signal=True) for index in reversed(range(COUNT))])
    seal(pieces.paths(), range(COUNT), tmp_path / "train", tmp_path / "signal", 5)
    for shard in sorted((tmp_path / "train").iterdir()):
        rows = read_rows(shard)
        index, tokens = [row["index"] for row in rows], [np.array(row["tokens"], np.int32) for row in rows]
        path = tmp_path / "signal" / f"{shard.stem}.safetensors"
        tensors = check_signal(path, index, tokens)
        assert tensors["top_ids"][:, 0].tolist() == [row["index"] for row in rows for _ in row["tokens"][1:]]
        assert tensors["first"].tolist() == [1] * len(rows)
        assert np.allclose(tensors["rest"], 1 - 2 * np.exp(-1.5))
        first = int(tensors["offsets"][1])
        assert tensors["drawn"][:first].tolist() == [0] + [1] * (first - 1)
        tokens[1][0] += 1
        with pytest.raises(DamagedArtifact, match=f"row {index[1]} has other tokens than its shard"):
            check_signal(path, index, tokens)


def test_a_packed_signal_is_read_back():
    signal = make(4, signal=True).signal
    assert signal is not None
    read = TopLogprobs.unpack(signal.pack())
    for name in ("ids", "logprobs", "emitted", "drawn"):
        assert np.array_equal(getattr(read, name), getattr(signal, name))
        assert getattr(read, name).dtype == getattr(signal, name).dtype
