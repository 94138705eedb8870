"""Accuracy recovery against independent references: equation 3 by hand, and a bootstrap that draws items by index."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.accuracy import (
    CERTAIN,
    FEWEST,
    Outcomes,
    Recovery,
    align,
    ar_percent,
    kl_recovery,
    recovery,
    resample,
    resample_tasks,
)
from eval.benchmarks import averaged, benchmarks_of, weights_of
from eval.config import KNOWN, PAPER
from recovery.errors import UserError

items = st.lists(st.tuples(*[st.integers(0, 1)] * 3), min_size=2, max_size=40)


def outcomes_of(rows: list[tuple[int, int, int]]) -> Outcomes:
    columns = np.array(rows).T
    return Outcomes(*columns)


def whole(outcomes: Outcomes, draws: int = 2000, seed: int = 0) -> Recovery:
    return recovery({"t": outcomes}, resample_tasks({"t": outcomes}, draws, seed), {"t": 1.0})


@given(items)
def test_gap_and_its_paired_error(rows: list[tuple[int, int, int]]):
    found = whole(outcomes_of(rows), draws=10)
    lost = [reference - degraded for reference, degraded, _ in rows]
    mean = sum(lost) / len(lost)
    variance = sum((value - mean) ** 2 for value in lost) / (len(lost) - 1)
    error = math.sqrt(variance / len(lost))
    assert found.gap == pytest.approx(mean)
    assert found.gap_se == pytest.approx(error)
    assert found.measurable == (len(lost) >= FEWEST and mean > 1e-12 and mean >= CERTAIN * error)


@given(items)
def test_value_is_equation_three(rows: list[tuple[int, int, int]]):
    found = whole(outcomes_of(rows), draws=10)
    reference, degraded, recovered = (sum(column) for column in zip(*rows, strict=True))
    if found.measurable:
        assert found.value == pytest.approx(100 * (recovered - degraded) / abs(degraded - reference))
        assert found.low is not None
        assert found.high is not None
    else:
        assert (found.value, found.low, found.high) == (None, None, None)


def test_resampling_has_the_exact_distribution_of_resampled_items():
    """All 4^4 ways to draw four items, each as likely as the other, against the shares of many draws."""
    rows = [(1, 0, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)]
    exact: dict[tuple[float, ...], float] = {}
    for picks in itertools.product(rows, repeat=4):
        means = tuple(sum(column) / 4 for column in zip(*picks, strict=True))
        exact[means] = exact.get(means, 0) + 1 / 4**4
    draws = resample(outcomes_of(rows), 200_000, np.random.default_rng(1))
    values, counts = np.unique(draws, axis=0, return_counts=True)
    seen = {tuple(value): count / len(draws) for value, count in zip(values.tolist(), counts, strict=True)}
    assert set(seen) == set(exact)
    for means, share in exact.items():
        assert seen[means] == pytest.approx(share, abs=5 * math.sqrt(share / len(draws)))


def test_interval_agrees_with_a_bootstrap_by_index_over_two_tasks():
    generator = np.random.default_rng(3)
    tasks = {}
    for name, count in (("a", 300), ("b", 150)):
        reference = (generator.random(count) < 0.7).astype(int)
        degraded = np.where(generator.random(count) < 0.6, generator.integers(0, 2, count) // 2, reference)
        recovered = np.where(generator.random(count) < 0.4, degraded, reference)
        tasks[name] = Outcomes(reference, degraded, recovered)
    weights = {"a": 0.5, "b": 0.5}
    found = recovery(tasks, resample_tasks(tasks, 20_000, 0), weights)
    drawn = []
    for _ in range(20_000):
        means = np.zeros(3)
        for outcome in tasks.values():
            rows = generator.integers(0, len(outcome.reference), len(outcome.reference))
            means += 0.5 * np.array(
                [outcome.reference[rows].mean(), outcome.degraded[rows].mean(), outcome.recovered[rows].mean()]
            )
        drawn.append(100 * (means[2] - means[1]) / abs(means[1] - means[0]))
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.6)
    assert found.high == pytest.approx(high, abs=0.6)


def test_no_gap_has_no_ar():
    assert np.isnan(ar_percent(np.array([0.4, 0.4, 0.7])))
    same = outcomes_of([(1, 1, 1), (0, 0, 0), (1, 1, 0)] * 20)
    assert whole(same) == Recovery(None, None, None, 0.0, 0.0, False)


def test_a_degraded_model_that_scores_better_is_not_measurable():
    better = whole(outcomes_of([(0, 1, 0)] * 50 + [(1, 1, 1)] * 50))
    assert better.gap == pytest.approx(-0.5)
    assert not better.measurable


def test_full_and_no_recovery_and_worse():
    base = [(1, 1)] * 30 + [(1, 0)] * 30 + [(0, 0)] * 40
    assert whole(outcomes_of([(ref, deg, ref) for ref, deg in base])).value == pytest.approx(100)
    assert whole(outcomes_of([(ref, deg, deg) for ref, deg in base])).value == pytest.approx(0)
    assert whole(outcomes_of([(ref, deg, 0) for ref, deg in base])).value == pytest.approx(-100)


def test_a_few_items_are_not_certain_though_all_were_lost():
    lost = [(1, 0, 1)]
    assert not whole(outcomes_of(lost * (FEWEST - 1))).measurable
    assert whole(outcomes_of(lost * FEWEST)).measurable


def test_one_item_cannot_be_measured():
    assert whole(outcomes_of([(1, 0, 1)])) == Recovery(None, None, None, 1.0, None, False)


@settings(max_examples=20)
@given(items, items, st.integers(0, 2**32))
def test_draws_of_a_task_do_not_depend_on_the_other_tasks(
    one: list[tuple[int, int, int]], two: list[tuple[int, int, int]], seed: int
):
    both = {"one": outcomes_of(one), "two": outcomes_of(two)}
    alone = resample_tasks({"two": both["two"]}, 20, seed)["two"]
    np.testing.assert_array_equal(resample_tasks(both, 20, seed)["two"], alone)


def test_ten_thousand_draws_of_thousands_of_items_are_cheap():
    generator = np.random.default_rng(0)
    tasks = {name: Outcomes(*generator.integers(0, 2, (3, 10_000))) for name in PAPER}
    draws = resample_tasks(tasks, 10_000, 0)
    assert sum(array.nbytes for array in draws.values()) < 4e6


def test_mmlu_counts_once():
    assert list(benchmarks_of(PAPER)) == [
        *("hellaswag", "mmlu", "arc_challenge", "winogrande", "piqa", "openbookqa", "boolq")
    ]
    assert averaged(KNOWN) == tuple(benchmarks_of(PAPER))
    assert averaged(["sciq", "arc_easy"]) == ("sciq", "arc_easy")
    assert averaged(["sciq", "mmlu_astronomy"]) == ("mmlu",)
    weights = weights_of(PAPER, averaged(PAPER))
    assert weights["hellaswag"] == pytest.approx(1 / 7)
    assert weights["mmlu_astronomy"] == pytest.approx(1 / 21)
    assert sum(weights.values()) == pytest.approx(1)


def record(doc_id: int, doc_hash: str = "h", acc: int = 1) -> dict[str, object]:
    return {"doc_id": doc_id, "doc_hash": doc_hash, "acc": acc, "acc_norm": None}


def test_other_items_are_refused():
    good = [record(0), record(4, acc=0)]
    aligned = align("piqa", good, good, [record(0, acc=0), record(4)])
    assert aligned.recovered.tolist() == [0, 1]
    for other in ([record(0)], [record(4), record(0)], [record(0), record(4, "changed")]):
        with pytest.raises(UserError, match="recovered model was scored on other items"):
            align("piqa", good, good, other)


def test_kl_recovery_is_resampled_by_whole_samples():
    generator = np.random.default_rng(3)
    counts = generator.integers(5, 200, size=40)
    before = generator.gamma(4.0, 1.0, size=40) * counts
    after = 0.1 * before * generator.uniform(0.5, 1.5, size=40)
    rows = [[(float(kl), int(count)) for kl, count in zip(kls, counts, strict=True)] for kls in (before, after)]
    low, high = kl_recovery(rows[0], rows[1], 20000, 0)
    drawn = generator.integers(0, 40, size=(20000, 40))
    found = np.quantile(1 - after[drawn].sum(1) / before[drawn].sum(1), [0.025, 0.975])
    assert (low, high) == pytest.approx(tuple(found), abs=1e-3)
    assert low < 1 - after.sum() / before.sum() < high
    assert kl_recovery(rows[0], rows[1], 20000, 0) == (low, high)
    assert kl_recovery(rows[0][:1], rows[1][:1], 20000, 0) == (None, None)
