"""The logits processor in the server's environment, against vLLM's own classes; run by test_real_server.py.

Model Runner V2 itself needs a GPU: of it, the loader, the base class and the context are real here, the runner is not.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
from vllm.v1.sample.logits_processor import (  # pyright: ignore[reportMissingImports]
    BatchUpdate,
    MoveDirectionality,
    _load_logitsprocs_by_fqcns,
)
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext  # pyright: ignore[reportMissingImports]
from vllm.v1.worker.gpu.sample.logits_processor.loader import (  # pyright: ignore[reportMissingImports]
    _load_v2_logitsprocs_by_fqcns,
)

from datagen.vllm_processor import HybridSampling

WIDTH, USED = 12, 9
NAME = "datagen.vllm_processor:HybridSampling"
CONFIG: Any = SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: WIDTH))


def params(greedy: Any = None, vocabulary: Any = None) -> SamplingParams:
    given = {"greedy_tokens": greedy, "vocabulary": vocabulary}
    return SamplingParams(extra_args={name: value for name, value in given.items() if value is not None} or None)


def expected(row: torch.Tensor, greedy: int | None, vocabulary: int | None, done: int) -> torch.Tensor:
    """The oracle for one row of logits."""
    row = row.clone()
    if vocabulary is not None:
        row[vocabulary:] = float("-inf")
    if greedy is not None and done < greedy:
        top = int(row.argmax())
        row[:] = float("-inf")
        row[top] = 0.0
    return row


def same(ours: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.equal(torch.softmax(ours, -1), torch.softmax(wanted, -1))


def test_both_loaders_take_the_one_class():
    assert _load_logitsprocs_by_fqcns([NAME]) == [HybridSampling]
    assert _load_v2_logitsprocs_by_fqcns([NAME]) == [HybridSampling]


@pytest.mark.parametrize("bad", [-1, 1.5, "5", True, 1 << 21, [3]])
def test_bad_values_are_refused(bad: Any):
    with pytest.raises(ValueError, match="greedy_tokens must be a whole number"):
        HybridSampling.validate_params(params(greedy=bad))


def test_good_values_and_none_pass():
    for good in (params(), params(0), params(5), params(5, USED), SamplingParams()):
        HybridSampling.validate_params(good)
    with pytest.raises(ValueError, match="vocabulary must be"):
        HybridSampling.validate_params(params(5, -2))


class Runner:
    """A V1 batch as vLLM keeps it: requests in slots, and the updates it would send."""

    def __init__(self) -> None:
        self.processor = HybridSampling(CONFIG, torch.device("cpu"), False)
        self.slots: list[tuple[int | None, int | None, list[int]]] = []

    def update(self, **changes: Any) -> None:
        fields = {"removed": [], "added": [], "moved": [], **changes}
        self.processor.update_state(BatchUpdate(batch_size=len(self.slots), **fields))

    def step(self, seed: int) -> None:
        logits = torch.randn(len(self.slots), WIDTH, generator=torch.Generator().manual_seed(seed))
        wanted = [
            expected(row, greedy, vocabulary, len(out))
            for row, (greedy, vocabulary, out) in zip(logits, self.slots, strict=True)
        ]
        ours = self.processor.apply(logits)
        for row, want in zip(ours, wanted, strict=True):
            assert same(row, want)
        for _, _, out in self.slots:
            out.append(seed)


REQUEST = st.tuples(st.none() | st.integers(0, 4), st.none() | st.just(USED) | st.just(WIDTH), st.integers(0, 3))
ACTION = st.one_of(
    st.tuples(st.just("add"), REQUEST),
    st.tuples(st.just("remove"), st.integers(0, 20)),
    st.tuples(st.just("replace"), st.tuples(st.integers(0, 20), REQUEST)),
    st.tuples(st.just("swap"), st.tuples(st.integers(0, 20), st.integers(0, 20))),
    st.tuples(st.just("step"), st.integers(0, 1000)),
)


@settings(deadline=None, max_examples=150)
@given(actions=st.lists(ACTION, max_size=40))
def test_it_follows_the_batch_whatever_moves(actions: list[tuple[str, Any]]):
    """Adds (also with earlier outputs, as after a preemption), removals with the last row moved into the gap,
    replacements in one update, swaps; before each step every row must be what its own request asked for."""
    runner = Runner()

    def fresh(request: tuple[int | None, int | None, int]) -> tuple[int | None, int | None, list[int]]:
        return (*request[:2], [7] * request[2])

    for action, value in actions:
        slots = runner.slots
        if action == "add":
            slots.append(fresh(value))
            greedy, vocabulary, out = slots[-1]
            runner.update(added=[(len(slots) - 1, params(greedy, vocabulary), None, out)])
        elif action == "step" and slots:
            runner.step(value)
        elif action == "remove" and slots:
            index = value % len(slots)
            last = len(slots) - 1
            slots[index] = slots[last]
            slots.pop()
            moved = [(last, index, MoveDirectionality.UNIDIRECTIONAL)] if index != last else []
            runner.update(removed=[index], moved=moved)
        elif action == "replace" and slots:
            index = value[0] % len(slots)
            slots[index] = fresh(value[1])
            greedy, vocabulary, out = slots[index]
            runner.update(removed=[], added=[(index, params(greedy, vocabulary), None, out)])
        elif action == "swap" and len(slots) > 1:
            first, second = value[0] % len(slots), value[1] % len(slots)
            if first != second:
                slots[first], slots[second] = slots[second], slots[first]
                runner.update(moved=[(first, second, MoveDirectionality.SWAP)])
    if runner.slots:
        runner.step(0)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_rows_of_the_second_interface(data: st.DataObject):
    """Slots are taken again by others, rows are reordered every step, and a chunk of a prompt gives no token."""
    count = 5
    prompts = np.zeros(count, dtype=np.int32)
    states = SimpleNamespace(prompt_len=SimpleNamespace(np=prompts))
    processor = HybridSampling(CONFIG, states)
    slots: dict[int, tuple[int | None, int | None, int]] = {}
    for number in range(data.draw(st.integers(1, 12))):
        slot = data.draw(st.integers(0, count - 1))
        if slot not in slots or data.draw(st.booleans()):
            greedy, vocabulary, _ = data.draw(REQUEST)
            prompts[slot] = data.draw(st.integers(1, 6))
            slots[slot] = (greedy, vocabulary, 0)
            touched = processor.add_request(slot, params(greedy, vocabulary))
            assert touched == (greedy is not None or vocabulary is not None)
        order = data.draw(st.permutations(sorted(slots)))
        lengths = np.array([prompts[s] + slots[s][2] for s in order], dtype=np.int32)
        context: Any = LogitsContext(
            **{name: torch.empty(0) for name in ("expanded_idx_mapping", "idx_mapping", "expanded_local_pos", "pos")},
            input_ids=torch.empty(0),
            idx_mapping_np=np.array(order),
            seq_lens_upper_bound_np=lengths,
        )
        logits = torch.randn(len(order), WIDTH, generator=torch.Generator().manual_seed(number))
        wanted = [expected(row, *slots[s]) for row, s in zip(logits, order, strict=True)]
        for row, want in zip(processor.apply(logits, context), wanted, strict=True):
            assert same(row, want)
        for s in order:
            slots[s] = (*slots[s][:2], slots[s][2] + 1)
