"""The corpus format: what is written is read, and what is not a whole corpus is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recovery.corpus import SUMMARY, Sample, check_ids, read_split, write_shard
from recovery.corpus_statistics import summarize
from recovery.errors import DamagedArtifact, UserError
from recovery.files import write_json

ROWS = st.lists(st.lists(st.integers(0, 200_000), min_size=1, max_size=20), min_size=1, max_size=30)


def write(folder: Path, rows: list[list[int]], size: int, skip: int = 0) -> Path:
    for number, first in enumerate(range(0, len(rows), size)):
        samples = [
            Sample(first + place, 2**64 - 1 - place, row[0], "length", tuple(row))
            for place, row in enumerate(rows[first : first + size])
        ]
        write_shard(folder / "train" / f"shard-{number:05d}.parquet", samples)
    write_json(folder / SUMMARY, {"skip": skip})
    return folder


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, size=st.integers(1, 10), skip=st.integers(0, 1))
def test_round_trip_whatever_the_shards(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[int]], size: int, skip: int
):
    tokens = read_split(write(tmp_path_factory.mktemp("corpus"), rows, size, skip), "train")
    assert [tokens.row(position).tolist() for position in range(len(tokens))] == rows
    assert tokens.lengths.tolist() == [len(row) for row in rows]
    assert tokens.index.tolist() == list(range(len(rows)))
    assert tokens.skip == skip
    assert [row.tolist() for row in map(tokens.head(3).row, range(min(3, len(rows))))] == rows[:3]


def test_equal_samples_give_equal_bytes(tmp_path: Path):
    for name in "ab":
        write(tmp_path / name, [[1, 2, 3], [4, 5]], 2)
    shards = [next((tmp_path / name).rglob("*.parquet")).read_bytes() for name in "ab"]
    assert shards[0] == shards[1]


def test_empty_truncated_doubled_and_foreign_corpora_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="the corpus has no samples"):
        read_split(tmp_path, "train")
    corpus = write(tmp_path / "c", [[1, 2], [3, 4], [5, 6]], 2)
    shard = corpus / "train" / "shard-00000.parquet"
    whole = shard.read_bytes()
    (corpus / "train" / "shard-00002.parquet").write_bytes(whole)
    with pytest.raises(DamagedArtifact, match="an index is held twice"):
        read_split(corpus, "train")
    (corpus / "train" / "shard-00002.parquet").unlink()
    for cut in (0, 3, len(whole) // 2, len(whole) - 1):
        shard.write_bytes(whole[:cut])
        with pytest.raises(DamagedArtifact, match=r"shard-00000\.parquet: not a readable Parquet shard"):
            read_split(corpus, "train")


def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path):
    tokens = read_split(write(tmp_path, [[1, 999]], 1), "train")
    check_ids(tokens, 1000, "corpus")
    with pytest.raises(UserError, match="token id 999, the vocabulary has 999"):
        check_ids(tokens, 999, "corpus")


def test_summary_counts_repeats():
    summary = summarize([[1, 2, 3, 4, 1, 2, 3, 4], [5, 6, 7, 8]], stopped=1)
    assert summary["tokens"] == 12
    assert summary["end_of_text_rate"] == 0.5
    assert summary["distinct_1"] == round(8 / 12, 4)
    assert summary["repeats_4"] == round(float(np.mean([1 - 4 / 5, 0])), 4)
