"""Hybrid sampling: greedy first, then the model's own distribution; the same samples whatever happens in between."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import datagen.generate
from datagen.embedded import EmbeddedEngine, draw
from datagen.sampling import SamplingPlan, bos_id, eligible_ids
from recovery.corpus import read_rows
from recovery.stage import build
from tests.conftest import ARCHITECTURES, WITH_BOS, make_tokenizer
from tests.pipeline import job_of, make_benchmarks, model_at, tiny_recipe


def generate(model: Path, runs: Path, **settings: Any) -> list[dict[str, Any]]:
    """The training rows of a corpus made in `runs`."""
    data = runs.parent / "data"
    if not data.exists():
        make_benchmarks(data)
    recipe = tiny_recipe(model, data, generate={"samples": 20, "batch_samples": 8, "held_out_samples": 8, **settings})
    folder = build(job_of(recipe, runs, "generate"), datagen.generate.produce, resumable=True)
    return [row for shard in sorted((folder / "train").iterdir()) for row in read_rows(shard)]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_first_tokens_are_the_greedy_continuation(kind: str, models: dict[str, Path], tmp_path: Path):
    """Against transformers' own generate, one sample at a time."""
    rows = generate(models[kind], tmp_path / "runs")
    model = model_at(models[kind])
    prefix = 1 if kind in WITH_BOS else 0
    checked = 0
    for row in rows:
        start = torch.tensor([row["tokens"][: prefix + 1]])
        logits_to_259 = [[token] for token in range(259, model.config.vocab_size)]
        greedy = model.generate(
            start,
            attention_mask=torch.ones_like(start),
            do_sample=False,
            max_new_tokens=5,
            bad_words_ids=logits_to_259 or None,
        )[0].tolist()
        length = min(len(greedy), len(row["tokens"]))
        assert row["tokens"][:length] == greedy[:length]
        checked += length
    assert checked > 100


def test_drawn_tokens_follow_the_distribution():
    """Chi-square of 20000 draws against softmax(logits / temperature)."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, -2.0])
    uniforms = torch.from_numpy(np.random.default_rng(0).random(20_000))
    drawn = draw(logits.expand(20_000, 6), uniforms, 0.7)
    observed = torch.bincount(drawn, minlength=6).numpy()
    expected = torch.softmax(logits.double() / 0.7, -1).numpy() * 20_000
    assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_draws_stay_inside_the_vocabulary():
    logits = torch.tensor([[0.0, -torch.inf, 0.0], [0.0, -torch.inf, -torch.inf]])
    for uniform in (0.0, 0.5, 1.0 - 2**-53):
        drawn = draw(logits, torch.full((2,), uniform, dtype=torch.float64), 1.0)
        assert drawn[0] in (0, 2)
        assert drawn[1] == 0


def test_a_smaller_corpus_is_a_prefix_and_a_restart_changes_nothing(tiny: Path, tmp_path: Path):
    whole = generate(tiny, tmp_path / "a")
    assert generate(tiny, tmp_path / "smaller", samples=13) == whole[:13]

    # As a kill leaves it: one shard done, one torn, the last not begun.
    folder = next(
        path for path in (tmp_path / "a" / "artifacts").glob("generate-*") if len(list(path.glob("train/*"))) == 3
    )
    partial = tmp_path / "b" / "artifacts" / f".{folder.name}.partial"
    shutil.copytree(folder / "train", partial / "train")
    torn = partial / "train" / "shard-00001.parquet"
    torn.write_bytes(torn.read_bytes()[:50])
    (partial / "train" / "shard-00002.parquet").unlink()
    assert generate(tiny, tmp_path / "b") == whole
    for path in folder.rglob("*.parquet"):
        assert (tmp_path / "b" / "artifacts" / folder.name / path.relative_to(folder)).read_bytes() == path.read_bytes()


def corpus_of(runs: Path, shards: int) -> dict[str, bytes]:
    """The bytes of the one corpus there that has so many training shards."""
    [folder] = [
        path for path in (runs / "artifacts").glob("generate-*") if len(list(path.glob("train/*.parquet"))) == shards
    ]
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.parquet")}


def test_what_another_corpus_holds_is_taken_from_there(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    decoded: list[int] = []
    decode = EmbeddedEngine.decode

    def counted(engine: EmbeddedEngine, starts: Any, *rest: Any) -> Any:
        decoded.append(len(starts))
        return decode(engine, starts, *rest)

    monkeypatch.setattr(EmbeddedEngine, "decode", counted)
    generate(tiny, tmp_path / "alone")
    generate(tiny, tmp_path / "smaller", samples=13)
    alone, smaller = corpus_of(tmp_path / "alone", 3), corpus_of(tmp_path / "smaller", 2)
    decoded.clear()
    generate(tiny, tmp_path / "alone", samples=13)
    assert not decoded
    assert corpus_of(tmp_path / "alone", 2) == smaller
    generate(tiny, tmp_path / "smaller")
    assert decoded == [8, 8]  # of train 8 to 15, of which five were known, and 16 to 19
    assert corpus_of(tmp_path / "smaller", 3) == alone
    decoded.clear()
    generate(tiny, tmp_path / "smaller", samples=13, temperature=0.5)
    assert decoded == [8, 8, 8]
    # A damaged one is not taken from.
    runs = tmp_path / "alone"
    for shard in runs.glob("artifacts/generate-*/train/shard-00000.parquet"):
        shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    decoded.clear()
    generate(tiny, runs, samples=9)
    assert decoded == [8, 8, 8]


def test_samples_do_not_depend_on_when_others_end(tiny: Path):
    """Rows that end early leave the batch; those that go on must not notice."""
    model = model_at(tiny)
    from datagen.config import Generate

    settings = Generate(max_length=30, samples=1)
    starts = [SamplingPlan(0, "train", np.arange(3, 259)).start(index) for index in range(12)]
    often = EmbeddedEngine(model, settings, 259, 0, frozenset(range(3, 10))).decode(starts)
    never = EmbeddedEngine(model, settings, 259, 0, frozenset()).decode(starts)
    assert {sample.finish_reason for sample in often} == {"stop", "length"}
    for ended, free in zip(often, never, strict=True):
        assert free.tokens[: len(ended.tokens)] == ended.tokens
        assert ended.finish_reason == (
            "stop" if len(ended.tokens) < 30 or ended.tokens[-1] in range(3, 10) else "length"
        )


def test_start_tokens_run_through_all_eligible_ids():
    tokenizer = make_tokenizer(bos=True, extra=("<|reserved_special_token_7|>", "<unused3>", "[PAD]", "[x]"))
    eligible = eligible_ids(tokenizer, 10_000)
    words = set(tokenizer.convert_ids_to_tokens(eligible.tolist()))
    assert words.isdisjoint({"<s>", "</s>", "<unk>", "<|reserved_special_token_7|>", "<unused3>", "[PAD]"})
    assert "[x]" in words
    plan = SamplingPlan(3, "train", eligible)
    first = [plan.start(index).token for index in range(len(eligible))]
    assert sorted(first) == eligible.tolist()
    assert first != eligible.tolist()
    second = [plan.start(index + len(eligible)).token for index in range(len(eligible))]
    assert sorted(second) == eligible.tolist()
    assert second != first
    other = SamplingPlan(3, "held_out", eligible)
    assert [other.start(index).token for index in range(20)] != first[:20]
    assert len({plan.start(index).seed for index in range(1000)}) == 1000


def test_bos_follows_the_tokenizers_habit():
    assert bos_id(make_tokenizer(bos=True), "auto") == 0
    assert bos_id(make_tokenizer(bos=False), "auto") is None
    assert bos_id(make_tokenizer(bos=False), "always") == 0
    assert bos_id(make_tokenizer(bos=True), "never") is None
