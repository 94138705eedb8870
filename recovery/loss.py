"""Distillation losses over the full vocabulary, from hidden states, for frozen heads.

Three matrix products (the student's logits, the reference's, the gradient to the student's hidden states; two with
sparse targets), a chunk of tokens at a time, so that no (tokens x vocabulary) tensor exists. The gradient is made in
the forward pass and the frozen heads get none. N tokens, H hidden width, V logits in use; T tokens of a chunk.

With z the student's logits, p the teacher's distribution and q the student's:

- forward KL (equation 2 of Recover-LoRA): sum p log(p / q), gradient q - p;
- reverse KL: L = sum q log(q / p), gradient q (log(q / p) - L);
- generalized Jensen-Shannon (GKD, arXiv 2306.13649, equation 1), m = beta p + (1 - beta) q:
  beta KL(p || m) + (1 - beta) KL(q || m), gradient (1 - beta) q (g - sum q g) with g = log(q / m).

At a temperature t both distributions are those of z / t, and the loss is multiplied by t^2 (Hinton et al.,
arXiv 1503.02531), so that gradients keep their size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from recovery.config import ForwardKL, JensenShannon, Loss
from recovery.head import Head
from recovery.targets import DenseTargets, NoTargets, SparseTargets, Targets

FORWARD_KL = ForwardKL()
CHUNK_TOKENS = 192
"""Tokens of one chunk: fewer make matrix products slower (a fifth at 64), more only take memory."""
CHUNK_ELEMENTS = 1 << 25
"""Most logits of one chunk: 128 MB of float32 for each model."""
BLOCK_ELEMENTS = 1 << 19
"""Logits that one elementwise pass works on, on a CPU: what stays in its cache from pass to pass."""


def distill(
    hidden_NH: Tensor, head: Head, targets: Targets, loss: Loss = FORWARD_KL, next_N: Tensor | None = None
) -> Tensor:
    """Sum of the loss over tokens, in nats: a scalar of float32 (float64 for float64 states).

    hidden_NH: the student's final hidden states, any float dtype, differentiable; targets: as many tokens; next_N:
    the ids (int64) that follow, for `loss.cross_entropy`. Divide the sum once, by the global number of tokens. The
    gradient has the dtype of `hidden_NH`, and is rounded to it only at the end.
    """
    assert len(hidden_NH) == len(targets), "both models must see the same tokens"
    return _Distillation.apply(hidden_NH, head, targets, loss, next_N)  # pyright: ignore[reportReturnType]


def forward_kl(hidden_NH: Tensor, head: Head, reference_NG: Tensor, reference_head: Head) -> Tensor:
    """Sum over tokens of KL(reference || student) in nats."""
    return distill(hidden_NH, head, DenseTargets(reference_NG, reference_head))


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, head: Head, targets: Targets, loss: Loss, next_N: Tensor | None) -> Tensor:
        wide = torch.promote_types(hidden_NH.dtype, torch.float32)
        total = torch.zeros((), dtype=torch.float64, device=hidden_NH.device)
        gradient_NH = torch.empty_like(hidden_NH) if ctx.needs_input_grad[0] else None
        buffers: list[Tensor] = []
        for part in chunks(len(hidden_NH), head.width):
            if not buffers:  # the first chunk is the largest
                count = 2 if isinstance(targets, DenseTargets) else 1
                shape = (part.stop - part.start, head.width)
                buffers = [torch.empty(shape, dtype=wide, device=hidden_NH.device) for _ in range(count)]
            own = [buffer[: part.stop - part.start] for buffer in buffers]
            logits_TV = head.logits(hidden_NH[part], own[0])
            # The derivative of a soft cap is made from the logits, which the loss overwrites.
            capped_TV = logits_TV.clone() if head.softcap is not None else None
            gradient_TV = _chunk(logits_TV, targets[part], loss, None if next_N is None else next_N[part], own, total)
            if gradient_NH is not None:
                gradient_NH[part] = head.backward(gradient_TV, capped_TV).to(gradient_NH.dtype)
        ctx.save_for_backward(gradient_NH)
        return total.to(wide)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient_NH,) = ctx.saved_tensors
        # The factor, one over a step's tokens, is not rounded to a narrow dtype.
        return (gradient_NH.to(grad_outputs[0].dtype) * grad_outputs[0]).to(gradient_NH.dtype), None, None, None, None


def _chunk(
    student_TV: Tensor, targets: Targets, loss: Loss, next_T: Tensor | None, buffers: list[Tensor], total: Tensor
) -> Tensor:
    """Add the chunk's loss to `total`; return the gradient to the student's logits, in one of the buffers."""
    mixed = loss.cross_entropy
    hard_TV = None
    if mixed > 0:
        assert next_T is not None, "a cross-entropy term needs the ids that follow"
        hard_TV = torch.log_softmax(student_TV, dim=-1, out=student_TV if mixed == 1 else None)
        total -= mixed * hard_TV.gather(1, next_T[:, None]).sum(dtype=torch.float64)
        hard_TV.exp_().scatter_add_(1, next_T[:, None], hard_TV.new_full((len(hard_TV), 1), -1.0))
        if mixed == 1:
            return hard_TV
    assert not isinstance(targets, NoTargets), "a divergence needs a teacher"
    if isinstance(targets, SparseTargets):
        assert isinstance(loss, ForwardKL), "sparse targets have forward KL only"
        assert loss.temperature == 1, "sparse targets have no temperature"
        total += (1 - mixed) * _sparse(student_TV, targets)
    else:
        teacher_TV = targets.head.logits(targets.hidden_NG, buffers[1])
        for rows in _blocks(len(student_TV), student_TV.shape[1], student_TV.is_cuda):
            value = _dense(student_TV[rows], teacher_TV[rows], loss)
            total += value * ((1 - mixed) * loss.temperature**2)
    gradient_TV = student_TV  # either left it there
    if loss.temperature != 1:
        gradient_TV *= loss.temperature
    if hard_TV is not None:
        gradient_TV.mul_(1 - mixed).add_(hard_TV, alpha=mixed)
    return gradient_TV


def _dense(student_RV: Tensor, teacher_RV: Tensor, loss: Loss) -> Tensor:
    """The sum of the loss of some rows; leaves the gradient to the tempered logits in `student_RV`."""
    if loss.temperature != 1:
        student_RV /= loss.temperature
        teacher_RV /= loss.temperature
    torch.log_softmax(student_RV, dim=-1, out=student_RV)
    torch.log_softmax(teacher_RV, dim=-1, out=teacher_RV)
    if isinstance(loss, ForwardKL):
        p_RV = teacher_RV.exp()
        terms_RV = _times(p_RV, teacher_RV.sub_(student_RV))
        student_RV.exp_().sub_(p_RV)
        return terms_RV.sum(dtype=torch.float64)
    if isinstance(loss, JensenShannon):
        return _jensen_shannon(student_RV, teacher_RV, loss.beta)
    q_RV = student_RV.exp()
    ratio_RV = torch.where(q_RV > 0, student_RV - teacher_RV, 0.0)
    value_R1 = (q_RV * ratio_RV).sum(-1, keepdim=True)
    student_RV.copy_(ratio_RV.sub_(value_R1).mul_(q_RV))
    return value_R1.sum(dtype=torch.float64)


def _jensen_shannon(student_RV: Tensor, teacher_RV: Tensor, beta: float) -> Tensor:
    p_RV, q_RV = teacher_RV.exp(), student_RV.exp()
    mean_RV = torch.logaddexp(teacher_RV + math.log(beta), student_RV + math.log1p(-beta))
    terms_RV = beta * _times(p_RV, teacher_RV - mean_RV)
    ratio_RV = torch.where(q_RV > 0, student_RV - mean_RV, 0.0)
    weighted_RV = q_RV * ratio_RV
    total = (terms_RV + (1 - beta) * weighted_RV).sum(dtype=torch.float64)
    weighted_RV -= q_RV * weighted_RV.sum(-1, keepdim=True)
    student_RV.copy_(weighted_RV.mul_(1 - beta))
    return total


def _times(p_RV: Tensor, log_ratio_RV: Tensor) -> Tensor:
    """p * log ratio (overwritten), 0 where p is 0: a token that the teacher excludes costs nothing."""
    # 0 * inf and 0 * nan are nan; masking costs a pass less than looking for them.
    return log_ratio_RV.masked_fill_(p_RV == 0, 0.0).mul_(p_RV)


def _sparse(student_TV: Tensor, targets: SparseTargets) -> Tensor:
    """The sum of the forward KL of some rows; leaves the gradient to the logits in `student_TV`."""
    torch.log_softmax(student_TV, dim=-1, out=student_TV)
    p_TK = targets.top_logprobs_NK.exp()
    value = _times(p_TK, targets.top_logprobs_NK - student_TV.gather(1, targets.top_ids_NK)).sum(dtype=torch.float64)
    drawn_TM = targets.tail_logprobs_NM - student_TV.gather(1, targets.tail_ids_NM)
    weights_TM = targets.tail_weights_NM
    value += torch.where(weights_TM > 0, weights_TM * drawn_TM, 0.0).sum(dtype=torch.float64)
    student_TV.exp_()
    q_TK = student_TV.gather(1, targets.top_ids_NK)
    student_TV.scatter_(1, targets.top_ids_NK, 0.0)
    # Summed without the top, not one minus the top: where the tail is thin the difference would be rounding.
    tail_T1 = student_TV.sum(-1, keepdim=True).clamp_(min=torch.finfo(student_TV.dtype).tiny)
    bucket_T1 = targets.rest_N[:, None] - weights_TM.sum(-1, keepdim=True)
    log_rest_T1 = targets.rest_N[:, None].clamp(min=torch.finfo(torch.float32).tiny).log()
    value += (bucket_T1 * (log_rest_T1 - tail_T1.log())).sum(dtype=torch.float64)
    student_TV.mul_(1 - bucket_T1 / tail_T1)
    student_TV.scatter_(1, targets.top_ids_NK, q_TK - p_TK)
    student_TV.scatter_add_(1, targets.tail_ids_NM, -weights_TM.to(student_TV.dtype))
    return value


def distill_trainable(
    hidden_NH: Tensor,
    logits_of: Callable[[Tensor], Tensor],
    targets: DenseTargets | NoTargets,
    width: int,
    loss: Loss = FORWARD_KL,
    next_N: Tensor | None = None,
) -> Tensor:
    """The same sum where the student's head learns too (LoRA on it, or all parameters): through autograd.

    Chunks are computed again in the backward pass (checkpointing), so memory stays that of one chunk; the head's
    gradient costs a product more, and the repeated forward two. logits_of: states (T, H) to logits (T, V or more), of
    which `width` are in use.
    """
    # Of a batch without loss too, so that every rank has a gradient.
    total = 0.0 * hidden_NH.sum(dtype=torch.float32)

    def one(hidden_TH: Tensor, targets: Targets, next_T: Tensor | None) -> Tensor:
        logits_TV = logits_of(hidden_TH)[:, :width]
        logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
        gradient_of = _LogitsLoss.apply(logits_TV, targets, loss, next_T)
        assert isinstance(gradient_of, Tensor)
        return gradient_of

    for part in chunks(len(hidden_NH), width):
        following = None if next_N is None else next_N[part]
        chunk = checkpoint(one, hidden_NH[part], targets[part], following, use_reentrant=False)
        assert isinstance(chunk, Tensor)
        total = total + chunk
    if not len(hidden_NH):  # the head's parameters too: ranks reduce the same gradients
        total = total + 0.0 * logits_of(hidden_NH).sum(dtype=torch.float32)
    return total


class _LogitsLoss(torch.autograd.Function):
    """One chunk's loss from logits that autograd made."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, targets: Targets, loss: Loss, next_T: Tensor | None) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=logits_TV.device)
        buffers = [logits_TV.clone(), torch.empty_like(logits_TV)]
        ctx.save_for_backward(_chunk(buffers[0], targets, loss, next_T, buffers, total))
        return total.to(logits_TV.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_TV,) = ctx.saved_tensors
        return gradient_TV * grad_outputs[0], None, None, None


@torch.no_grad()
def compare(hidden_NH: Tensor, head: Head, targets: DenseTargets, next_N: Tensor) -> Tensor:
    """Of every token (N, 4) float64: KL in nats, top-1 agreement, the student's and the reference's -log p(next)."""
    found_N4 = torch.empty(len(hidden_NH), 4, dtype=torch.float64, device=hidden_NH.device)
    for part in chunks(len(hidden_NH), head.width):
        student_TV = torch.log_softmax(head.logits(hidden_NH[part]), dim=-1)
        teacher_TV = torch.log_softmax(targets.head.logits(targets.hidden_NG[part]), dim=-1)
        next_T1 = next_N[part, None]
        found_N4[part, 1] = (student_TV.argmax(-1) == teacher_TV.argmax(-1)).double()
        found_N4[part, 2] = -student_TV.gather(1, next_T1)[:, 0].double()
        found_N4[part, 3] = -teacher_TV.gather(1, next_T1)[:, 0].double()
        found_N4[part, 0] = _times(teacher_TV.exp(), teacher_TV.sub_(student_TV)).sum(-1, dtype=torch.float64)
    return found_N4


def chunks(tokens: int, width: int) -> Iterator[slice]:
    """Row ranges as equal as can be, the largest first: a small rest would make slow products."""
    most = max(1, min(CHUNK_TOKENS, CHUNK_ELEMENTS // width))
    size = math.ceil(tokens / math.ceil(tokens / most)) if tokens else 1
    for first in range(0, tokens, size):
        yield slice(first, min(first + size, tokens))


def _blocks(tokens: int, width: int, whole: bool) -> Iterator[slice]:
    """Row ranges of an elementwise pass: small ones on a CPU; one on a GPU, where every pass is a launch."""
    size = tokens if whole else max(1, BLOCK_ELEMENTS // width)
    for first in range(0, tokens, size):
        yield slice(first, min(first + size, tokens))
