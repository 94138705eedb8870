"""The batch plan: every sample once, budgets kept, the same on any number of ranks."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recovery.batches import collate, loss_positions, plan_epoch
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
            assert len(batch) == 1 or len(batch) * sizes[list(batch)].max() <= micro


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


def test_collate_pads_on_the_right_and_masks_what_predicts_nothing():
    tokens = Tokens(np.arange(2), np.array([0, 4, 6]), np.array([7, 8, 9, 10, 5, 6], dtype=np.int32), skip=1)
    batch = collate(tokens, (0, 1), torch.device("cpu"))
    assert batch.ids_BT.tolist() == [[7, 8, 9, 10], [5, 6, 0, 0]]
    assert batch.mask_BT.tolist() == [[False, True, True, False], [False, False, False, False]]
