"""What the student is compared with, token by token: the teacher's distribution, whole or sparse.

N tokens, G the teacher's hidden width, K entries of the largest probabilities, M entries drawn from the tail.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from recovery.head import Head


@dataclass(frozen=True)
class DenseTargets:
    """The whole distribution: the teacher's final hidden states and its head."""

    hidden_NG: Tensor
    head: Head

    def __len__(self) -> int:
        return len(self.hidden_NG)

    def __getitem__(self, part: slice) -> DenseTargets:
        return DenseTargets(self.hidden_NG[part], self.head)


@dataclass(frozen=True)
class SparseTargets:
    """The largest probabilities, and an estimate of the rest (the tail) from tokens drawn from it.

    The estimate of the tail is its exact mass, spread as the student spreads its own tail, plus for every drawn token
    `weight * (that token - the student's tail)`. Where the weights' expectation over the draws is the teacher's tail
    (M tokens drawn from it, each of weight rest / M: Sparse Logit Sampling, arXiv 2503.16870; or the token that
    stands in the text, of weight 1 where it lies in the tail and 0 elsewhere), gradient and value are unbiased.
    Where nothing was drawn (all weights 0) the tail is one bucket: only its mass is learned.
    """

    top_ids_NK: Tensor
    """int64"""
    top_logprobs_NK: Tensor
    """float32, nats"""
    rest_N: Tensor
    """float32: probability outside the K"""
    tail_ids_NM: Tensor
    """int64, outside the K; any id where the weight is 0"""
    tail_logprobs_NM: Tensor
    """float32, nats"""
    tail_weights_NM: Tensor
    """float32"""

    @classmethod
    def of(cls, signal: Mapping[str, Tensor]) -> SparseTargets:
        """From the tensors of a cache (recovery.teacher_cache), by name."""
        tail_ids_NM = signal["tail_ids"].long()
        return cls(
            signal["top_ids"].long(),
            signal["top_logprobs"].float(),
            signal["rest"],
            tail_ids_NM,
            signal["tail_logprobs"].float(),
            signal["tail_weight"][:, None].expand_as(tail_ids_NM),
        )

    def __len__(self) -> int:
        return len(self.rest_N)

    def __getitem__(self, part: slice) -> SparseTargets:
        return SparseTargets(
            self.top_ids_NK[part],
            self.top_logprobs_NK[part],
            self.rest_N[part],
            self.tail_ids_NM[part],
            self.tail_logprobs_NM[part],
            self.tail_weights_NM[part],
        )


@dataclass(frozen=True)
class NoTargets:
    """For supervised fine-tuning, which learns from the text's own tokens alone."""

    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice) -> NoTargets:
        return NoTargets(len(range(*part.indices(self.count))))


Targets = DenseTargets | SparseTargets | NoTargets
