"""The sampling plan: what a sample is made from, as a pure function of (seed, split, index).

Hybrid sampling (LLM-QAT, arXiv 2305.17888; Recover-LoRA, section 4.2): a start token, then a few tokens chosen
greedily, then the rest drawn at random. Start tokens run through a seeded permutation of all eligible ids, so that any
prefix of a corpus is a fair sample of them.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datagen.config import BosMode
from recovery.corpus import Split
from recovery.errors import UserError

KEPT_ROUNDS = 8  # permutations in memory
RESERVED = re.compile(
    r"^[<\[(]\|?_*(reserved|unused|extra|pad|placeholder|dummy|special)[\w\s-]*\|?[>\])]$", re.IGNORECASE
)


def eligible_ids(tokenizer: Any, width: int) -> NDArray[np.int64]:
    """Sorted ids below `width` that may start a text: in the tokenizer's map, not special, unused or reserved."""
    special = set(tokenizer.all_special_ids)
    special |= {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = [
        index
        for token, index in tokenizer.get_vocab().items()
        if index < width and index not in special and not RESERVED.match(token)
    ]
    if not ids:
        raise UserError("models.reference", "its tokenizer has no ordinary tokens", "give a complete tokenizer")
    return np.array(sorted(ids), dtype=np.int64)


def stop_ids(model_config: Any, generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that end a text: of the generation config, the model config and the tokenizer together."""
    found: set[int] = set()
    for value in (
        getattr(generation_config, "eos_token_id", None),
        getattr(model_config, "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
        found.update([value] if isinstance(value, int) else value or [])
    return frozenset(found)


def bos_id(tokenizer: Any, mode: BosMode) -> int | None:
    """The id put in front of every sample, or None."""
    if mode == "never":
        return None
    if mode == "auto":
        ids = tokenizer("a").input_ids
        own = tokenizer.bos_token_id
        return own if own is not None and ids and ids[0] == own else None
    if tokenizer.bos_token_id is None:
        raise UserError("generate.bos", "always, but the tokenizer has no beginning-of-text id", "use auto or never")
    return int(tokenizer.bos_token_id)


@dataclass(frozen=True)
class Start:
    index: int
    seed: int
    token: int


class SamplingPlan:
    """Start token and seed of every index of one split. Both streams are endless and do not depend on each other."""

    def __init__(self, seed: int, split: Split, eligible: NDArray[np.int64]) -> None:
        self._seed = seed
        self._split = split
        self._eligible = eligible
        self._permutations: dict[int, NDArray[np.int64]] = {}

    def start(self, index: int) -> Start:
        """Index i takes the i-th id of the permutation; each further round through all ids has its own order."""
        cycle, place = divmod(index, len(self._eligible))
        if cycle not in self._permutations:
            if len(self._permutations) > KEPT_ROUNDS:
                self._permutations.pop(next(iter(self._permutations)))
            generator = np.random.Generator(np.random.Philox(self._key("permutation", cycle)))
            self._permutations[cycle] = generator.permutation(self._eligible)
        return Start(index, self._key("sample", index), int(self._permutations[cycle][place]))

    @staticmethod
    def next_seed(seed: int) -> int:
        """The seed of a sample's next attempt, where the first drew an id that the vocabulary does not have."""
        return int.from_bytes(hashlib.sha256(f"again/{seed}".encode()).digest()[:8], "little")

    def _key(self, purpose: str, number: int) -> int:
        text = f"{self._seed}/{self._split}/{purpose}/{number}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def uniforms(seed: int, count: int) -> NDArray[np.float64]:
    """The numbers in [0, 1) that draw a sample's tokens, one a position, from its own seed alone."""
    return np.random.Generator(np.random.Philox(seed)).random(count)
