"""The batch plan: every sample once, budgets kept, the same on any number of ranks."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from recovery.batches import collate, idle_share, loss_positions, plan_epoch
from recovery.corpus import Tokens

LENGTHS = st.lists(st.integers(2, 60), min_size=1, max_size=60)


@settings(deadline=None)
@given(
    lengths=LENGTHS,
    seed=st.integers(0, 9),
    budget=st.integers(1, 300),
    micro=st.integers(1, 120),
    skip=st.integers(0, 1),
)
def test_every_sample_once_within_budgets(lengths: list[int], seed: int, budget: int, micro: int, skip: int):
    sizes = np.array(lengths)
    plan = plan_epoch(sizes, skip, seed, 0, budget, micro)
    rows = [row for step in plan for batch in step.micro_batches for row in batch]
    assert sorted(rows) == list(range(len(lengths)))
    for step in plan:
        members = [row for batch in step.micro_batches for row in batch]
        assert len(members) == 1 or sizes[members].sum() <= budget
        assert step.loss_tokens == sum(loss_positions(int(sizes[row]), skip) for row in members)
        for batch in step.micro_batches:
            assert len(batch) == 1 or sizes[list(batch)].sum() <= micro


@settings(deadline=None)
@given(lengths=LENGTHS, ranks=st.integers(1, 5))
def test_ranks_share_a_step(lengths: list[int], ranks: int):
    for step in plan_epoch(np.array(lengths), 0, 0, 0, 200, 50):
        shares = [step.of_rank(rank, ranks) for rank in range(ranks)]
        assert len({len(share) for share in shares}) == 1
        assert sorted(batch for share in shares for batch in share if batch) == sorted(step.micro_batches)


def test_epochs_and_seeds_differ_and_repeat():
    sizes = np.full(50, 10)
    first = plan_epoch(sizes, 0, 0, 0, 100, 100)
    assert first == plan_epoch(sizes, 0, 0, 0, 100, 100)
    assert first != plan_epoch(sizes, 0, 0, 1, 100, 100)
    assert first != plan_epoch(sizes, 0, 1, 0, 100, 100)


def test_collate_packs_samples_one_behind_the_other():
    tokens = Tokens(np.arange(2), np.array([0, 4, 6]), np.array([7, 8, 9, 10, 5, 6], dtype=np.int32), skip=1)
    batch = collate(tokens, (1, 0))
    assert batch.ids_T.tolist() == [5, 6, 7, 8, 9, 10]
    assert batch.positions_T.tolist() == [0, 1, 0, 1, 2, 3]
    assert batch.bounds == (0, 2, 6)
    assert batch.loss_N.tolist() == [3, 4]  # of the second sample, without its first and its last position
    assert batch.next_N.tolist() == [9, 10]
    assert len(batch.without_loss().loss_N) == 0


def test_packing_leaves_little_room_unused():
    """Lengths as hybrid sampling makes them: most samples reach the limit, the others end anywhere before it."""
    random = np.random.default_rng(0)
    lengths = np.where(random.random(4000) < 0.8, 512, random.integers(8, 512, 4000))
    plan = plan_epoch(lengths, 0, 0, 0, 65536, 4096)
    assert idle_share(plan, lengths, 4096) < 0.02
    padded = sum(len(rows) * lengths[list(rows)].max() for step in plan for rows in step.micro_batches)
    assert lengths.sum() < 0.95 * padded  # what padding each micro-batch to its longest sample would have cost
