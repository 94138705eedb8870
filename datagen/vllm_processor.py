"""Hybrid sampling inside the vLLM server: the first tokens of a request greedy, the rest drawn, in one request.

    vllm serve MODEL --logits-processors datagen.vllm_processor:HybridSampling     # with this checkout on PYTHONPATH

    {"prompt": [504], "temperature": 1.0, "seed": 7, "vllm_xargs": {"greedy_tokens": 5, "vocabulary": 49152}}

greedy_tokens: that many of the first new tokens are the model's first choice. vocabulary: logits from this row on are
padding of the head, which no token id stands for, and are never drawn. A request without them is left alone; a bad
value is refused (HTTP 400).

vLLM has two interfaces for this, of the V1 runner and of Model Runner V2; each accepts only subclasses of its own base,
so one class has both bases. This module runs in the server's environment: it imports nothing but torch and vLLM.

R rows of the logits, V their width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

BASES: list[type] = []
try:
    from vllm.v1.sample.logits_processor import LogitsProcessor as V1Processor  # pyright: ignore[reportMissingImports]

    BASES.append(V1Processor)
except ImportError:
    pass
try:
    from vllm.v1.worker.gpu.sample.logits_processor import (  # pyright: ignore[reportMissingImports]
        LogitsProcessor as V2Processor,
    )

    BASES.append(V2Processor)
except ImportError:  # before Model Runner V2
    pass

GREEDY, VOCABULARY = "greedy_tokens", "vocabulary"
MOST_GREEDY_TOKENS = 1 << 20


class Plan(NamedTuple):
    """What one request asked for. vocabulary 0: all of the head."""

    greedy_tokens: int
    vocabulary: int


def plan_of(sampling_params: Any) -> Plan | None:
    """The request's own arguments, or None where it has none. Raises ValueError for a bad value."""
    arguments = getattr(sampling_params, "extra_args", None) or {}
    if GREEDY not in arguments and VOCABULARY not in arguments:
        return None
    greedy, vocabulary = arguments.get(GREEDY, 0), arguments.get(VOCABULARY, 0)
    if isinstance(greedy, bool) or not isinstance(greedy, int) or not 0 <= greedy <= MOST_GREEDY_TOKENS:
        raise ValueError(f"{GREEDY} must be a whole number from 0 to {MOST_GREEDY_TOKENS}, found {greedy!r}")
    if isinstance(vocabulary, bool) or not isinstance(vocabulary, int) or vocabulary < 0:
        raise ValueError(f"{VOCABULARY} must be a whole number, found {vocabulary!r}")
    return Plan(greedy, vocabulary)


def keep_first_choice(logits_RV: Tensor, rows: Tensor) -> None:
    """Leave just the largest logit of the chosen rows, in place. rows: int64 (held,), on the logits' device."""
    top = logits_RV[rows].argmax(-1)
    logits_RV.index_fill_(0, rows, float("-inf"))
    logits_RV[rows, top] = 0.0


def drop_padding(logits_RV: Tensor, rows: Tensor, vocabulary: int) -> None:
    """Take the head's padding rows out of the chosen rows' distributions, in place."""
    logits_RV[rows, vocabulary:] = float("-inf")


class HybridSampling(*BASES):
    """Both interfaces; vLLM constructs it either as (config, device, is_pin_memory) or as (config, request states)."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        plan_of(sampling_params)

    def __init__(self, vllm_config: Any, *rest: Any) -> None:
        # V1: batch index -> plan and the request's running list of output ids. V2: request slot -> plan.
        self._rows: dict[int, tuple[Plan, list[int]]] = {}
        self._slots: dict[int, Plan] = {}
        self._states = rest[0] if len(rest) == 1 else None
        self._width = vllm_config.model_config.get_vocab_size()

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        plans = self._of_batch() if ctx is None else self._of_context(logits, ctx)
        padded: dict[int, list[int]] = {}
        for row, (plan, _) in plans.items():
            if self._is_padded(plan):
                padded.setdefault(plan.vocabulary, []).append(row)
        for vocabulary, rows in padded.items():
            drop_padding(logits, self._index(rows, logits), vocabulary)
        if held := [row for row, (plan, done) in plans.items() if done < plan.greedy_tokens]:
            keep_first_choice(logits, self._index(held, logits))
        return logits

    def _is_padded(self, plan: Plan) -> bool:
        return 0 < plan.vocabulary < self._width

    def _is_over(self, plan: Plan, done: int) -> bool:
        """Nothing is left to do for this request, so that a batch costs no more than its young requests."""
        return done >= plan.greedy_tokens and not self._is_padded(plan)

    @staticmethod
    def _index(rows: list[int], logits: Tensor) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64).to(logits.device, non_blocking=True)

    # ---- V1 runner: rows of the logits are batch indices, which move ----

    def is_argmax_invariant(self) -> bool:
        """False, as padding may hold the largest logit; so it runs before temperature, in every batch."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow the batch: removed, added, moved, in this order (vLLM's own rule)."""
        if batch_update is None:
            return
        rows = self._rows
        for index in batch_update.removed:
            rows.pop(index, None)
        for index, sampling_params, _, output_ids in batch_update.added:
            plan = plan_of(sampling_params)
            rows.pop(index, None)
            if plan is not None:
                # A list that vLLM itself appends to; after a preemption it holds the earlier tokens again.
                rows[index] = (plan, output_ids)
        for first, second, direction in batch_update.moved:
            moving, other = rows.pop(first, None), rows.pop(second, None)
            if moving is not None:
                rows[second] = moving
            if other is not None and direction.name == "SWAP":
                rows[first] = other

    def _of_batch(self) -> dict[int, tuple[Plan, int]]:
        plans = {row: (plan, len(output_ids)) for row, (plan, output_ids) in self._rows.items()}
        for row in [row for row, state in plans.items() if self._is_over(*state)]:
            # Forgotten for good: after a preemption vLLM adds the request again.
            del self._rows[row], plans[row]
        return plans

    # ---- Model Runner V2: rows belong to slots, which stay ----

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Take over a slot. Returns whether this request's logits are changed."""
        plan = plan_of(sampling_params)
        self._slots.pop(req_idx, None)
        if plan is None:
            return False
        self._slots[req_idx] = plan
        return True

    def _of_context(self, logits: Tensor, ctx: Any) -> dict[int, tuple[Plan, int]]:
        """Row -> plan and tokens sampled before it; the host knows the lengths without speculative decoding."""
        if not self._slots:
            return {}
        slots = ctx.idx_mapping_np.tolist()
        assert self._states is not None
        assert len(slots) == len(logits), "speculative decoding has several rows a request and is not supported"
        prompts, lengths = self._states.prompt_len.np, ctx.seq_lens_upper_bound_np
        plans = {}
        for row, slot in enumerate(slots):
            if (plan := self._slots.get(slot)) is None:
                continue
            done = int(lengths[row]) - int(prompts[slot])
            if self._is_over(plan, done):
                del self._slots[slot]
            else:
                plans[row] = (plan, done)
        return plans
