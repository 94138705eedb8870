"""Forward KL(reference || student) over the full vocabulary, from hidden states.

Three matrix products (the student's logits, the reference's, the gradient to the student's hidden states), a chunk of
tokens at a time, so that no (tokens x vocabulary) tensor exists; the gradient is made in the forward pass and the
frozen heads get none. N valid tokens, H hidden width, V logits in use.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from recovery.models import Head

CHUNK_TOKENS = 128


class _ForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, head: Head, reference_NG: Tensor, reference_head: Head) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden_NH.device)
        gradient_NH = torch.empty_like(hidden_NH) if ctx.needs_input_grad[0] else None
        for part in _chunks(len(hidden_NH)):
            logits_TV = head.logits(hidden_NH[part])
            student_TV = torch.log_softmax(logits_TV, dim=-1)
            teacher_TV = torch.log_softmax(reference_head.logits(reference_NG[part]), dim=-1)
            probabilities_TV = teacher_TV.exp()
            # 0 * (-inf - finite) must be 0: a token the reference excludes costs nothing.
            terms_TV = torch.where(probabilities_TV > 0, probabilities_TV * (teacher_TV - student_TV), 0.0)
            total += terms_TV.sum()
            if gradient_NH is not None:
                difference_TV = student_TV.exp_().sub_(probabilities_TV)
                gradient_NH[part] = head.backward(difference_TV, logits_TV).to(gradient_NH.dtype)
        ctx.save_for_backward(gradient_NH)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_NH,) = ctx.saved_tensors
        return gradient_NH * grad_outputs[0].to(gradient_NH.dtype), None, None, None


def forward_kl(hidden_NH: Tensor, head: Head, reference_NG: Tensor, reference_head: Head) -> tuple[Tensor, int]:
    """Sum over tokens of KL(reference || student) in nats (equation 2 of the paper), and the number of tokens.

    hidden_NH: the student's final hidden states of the valid tokens, any float dtype, differentiable. reference_NG:
    the reference's, of its own width. The sum is float32; divide it once, by the global number of valid tokens.
    """
    assert len(hidden_NH) == len(reference_NG), "both models must see the same tokens"
    return _ForwardKL.apply(hidden_NH, head, reference_NG, reference_head), len(hidden_NH)  # pyright: ignore[reportReturnType]


@torch.no_grad()
def compare(hidden_NH: Tensor, head: Head, reference_NG: Tensor, reference_head: Head, next_N: Tensor) -> Tensor:
    """Sums over tokens (4,) float64: KL in nats, top-1 agreement, the student's and the reference's -log p(next)."""
    sums = torch.zeros(4, dtype=torch.float64, device=hidden_NH.device)
    for part in _chunks(len(hidden_NH)):
        student_TV = torch.log_softmax(head.logits(hidden_NH[part]), dim=-1)
        teacher_TV = torch.log_softmax(reference_head.logits(reference_NG[part]), dim=-1)
        probabilities_TV = teacher_TV.exp()
        terms_TV = torch.where(probabilities_TV > 0, probabilities_TV * (teacher_TV - student_TV), 0.0)
        next_T1 = next_N[part, None].long()
        sums[0] += terms_TV.sum(dtype=torch.float64)
        sums[1] += (student_TV.argmax(-1) == teacher_TV.argmax(-1)).sum()
        sums[2] -= student_TV.gather(1, next_T1).sum(dtype=torch.float64)
        sums[3] -= teacher_TV.gather(1, next_T1).sum(dtype=torch.float64)
    return sums


def _chunks(tokens: int) -> Iterator[slice]:
    for first in range(0, tokens, CHUNK_TOKENS):
        yield slice(first, first + CHUNK_TOKENS)
