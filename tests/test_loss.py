"""The losses against fp64 oracles through autograd: property tests over shapes, options and extreme logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import recovery.head
import recovery.loss
from recovery.cache import draw
from recovery.config import ForwardKL, JensenShannon, Loss, ReverseKL
from recovery.head import Head, split
from recovery.loss import FORWARD_KL, compare, distill, distill_trainable, forward_kl
from recovery.targets import DenseTargets, NoTargets, SparseTargets

LOSSES = {
    "forward_kl": ForwardKL(),
    "reverse_kl": ReverseKL(),
    "jensen_shannon": JensenShannon(beta=0.3),
    "tempered": ForwardKL(temperature=2.5),
    "mixed": ForwardKL(cross_entropy=0.25),
    "all of it": JensenShannon(beta=0.7, temperature=0.5, cross_entropy=0.6),
    "only cross-entropy": ReverseKL(cross_entropy=1.0),
}


def head_of(
    width: int, vocabulary: int, *, softcap: float | None = None, bias: bool = False, scale: float = 1.0
) -> Head:
    generator = torch.Generator().manual_seed(width * 1000 + vocabulary)
    weight = torch.randn(vocabulary, width, generator=generator)
    offset = torch.randn(vocabulary, generator=generator) if bias else None
    return Head(weight, offset, scale, softcap)


def wide(head: Head) -> Head:
    bias = None if head.bias_V is None else head.bias_V.double()
    return Head(head.weight_VH.double(), bias, head.scale, head.softcap)


def logits_of(hidden: Tensor, which: Head) -> Tensor:
    logits = hidden.double() @ which.weight_VH.double().T
    if which.bias_V is not None:
        logits = logits + which.bias_V.double()
    logits = logits * which.scale
    return logits if which.softcap is None else which.softcap * torch.tanh(logits / which.softcap)


def oracle(
    hidden: Tensor,
    head: Head,
    reference: Tensor,
    reference_head: Head,
    loss: Loss = FORWARD_KL,
    following: Tensor | None = None,
) -> Tensor:
    """The definitions, in float64, through autograd."""
    student, teacher = logits_of(hidden, head), logits_of(reference, reference_head)
    log_q, log_p = (torch.log_softmax(logits / loss.temperature, -1) for logits in (student, teacher))

    def kl(one: Tensor, other: Tensor) -> Tensor:
        return torch.nn.functional.kl_div(other, one, reduction="sum", log_target=True)

    match loss:
        case ReverseKL():
            value = kl(log_q, log_p)
        case JensenShannon(beta=beta):
            mean = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
            value = beta * kl(log_p, mean) + (1 - beta) * kl(log_q, mean)
        case _:
            value = kl(log_p, log_q)
    value = value * loss.temperature**2
    if loss.cross_entropy > 0:
        assert following is not None
        hard = torch.nn.functional.cross_entropy(student, following, reduction="sum")
        value = (1 - loss.cross_entropy) * value + loss.cross_entropy * hard
    return value


@settings(deadline=None, max_examples=80)
@given(
    tokens=st.integers(1, 300),
    width=st.integers(1, 24),
    reference_width=st.integers(1, 24),
    vocabulary=st.integers(2, 90),
    softcap=st.sampled_from([None, 3.0]),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.25]),
    loss=st.sampled_from(list(LOSSES.values())),
    chunk=st.sampled_from([64, 1000, 1 << 24]),
)
def test_value_and_gradient_match_the_oracle(
    tokens: int,
    width: int,
    reference_width: int,
    vocabulary: int,
    softcap: float | None,
    bias: bool,
    scale: float,
    loss: Loss,
    chunk: int,
):
    head = head_of(width, vocabulary, softcap=softcap, bias=bias, scale=scale)
    reference_head = head_of(reference_width, vocabulary, softcap=softcap)
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, width, generator=generator).requires_grad_()
    reference = torch.randn(tokens, reference_width, generator=generator)
    following = torch.randint(0, vocabulary, (tokens,), generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recovery.loss, "CHUNK_ELEMENTS", chunk)
        patch.setattr(recovery.loss, "BLOCK_ELEMENTS", chunk // 4)
        total = distill(hidden, head, DenseTargets(reference, reference_head), loss, following)
    (total * 0.5).backward()
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = oracle(exact_hidden, head, reference, reference_head, loss, following)
    (exact * 0.5).backward()
    assert hidden.grad is not None
    assert exact_hidden.grad is not None
    torch.testing.assert_close(total.double(), exact, rtol=5e-5, atol=2e-4)
    torch.testing.assert_close(hidden.grad.double(), exact_hidden.grad, rtol=2e-4, atol=3e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck_in_float64(name: str):
    head, reference_head = wide(head_of(5, 11, softcap=4.0, bias=True, scale=0.5)), wide(head_of(3, 11))
    hidden = torch.randn(6, 5, dtype=torch.float64).requires_grad_()
    targets = DenseTargets(torch.randn(6, 3, dtype=torch.float64), reference_head)
    following = torch.randint(0, 11, (6,))
    assert torch.autograd.gradcheck(lambda h: distill(h, head, targets, LOSSES[name], following), (hidden,))


@pytest.mark.parametrize("name", LOSSES)
def test_a_trainable_head_gets_its_gradient(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(recovery.loss, "CHUNK_ELEMENTS", 200)  # several chunks
    linear = torch.nn.Linear(7, 33)  # two rows more than the reference's head: padding
    hidden, reference_head = torch.randn(20, 7).requires_grad_(), head_of(4, 31)
    reference, following = torch.randn(20, 4), torch.randint(0, 31, (20,))
    total = distill_trainable(
        hidden, linear, DenseTargets(reference, reference_head), reference_head.width, LOSSES[name], following
    )
    found = torch.autograd.grad(total, [hidden, linear.weight, linear.bias])
    head = Head(linear.weight[:31], linear.bias[:31], 1.0, None)
    exact = oracle(hidden, head, reference, reference_head, LOSSES[name], following)
    expected = torch.autograd.grad(exact, [hidden, linear.weight, linear.bias])
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-4)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trainable", [False, True])
def test_cross_entropy_alone_needs_no_teacher(monkeypatch: pytest.MonkeyPatch, trainable: bool):
    monkeypatch.setattr(recovery.loss, "CHUNK_ELEMENTS", 200)
    linear, hidden, following = torch.nn.Linear(7, 31), torch.randn(20, 7).requires_grad_(), torch.randint(0, 31, (20,))
    head = Head(linear.weight.detach(), linear.bias.detach(), 1.0, None)
    loss = ForwardKL(cross_entropy=1.0, temperature=3.0)  # which is the divergence's
    if trainable:
        total = distill_trainable(hidden, linear, NoTargets(20), 31, loss, following)
    else:
        total = distill(hidden, head, NoTargets(20), loss, following)
    (found,) = torch.autograd.grad(total, [hidden])
    exact = torch.nn.functional.cross_entropy(linear(hidden), following, reduction="sum")
    torch.testing.assert_close(total, exact, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found, torch.autograd.grad(exact, [hidden])[0], rtol=1e-4, atol=1e-5)


def test_equal_models_have_zero_kl_and_zero_gradient():
    head = head_of(16, 50)
    hidden = torch.randn(20, 16).requires_grad_()
    total = forward_kl(hidden, head, hidden.detach(), head)
    total.backward()
    assert hidden.grad is not None
    assert abs(total.item()) < 1e-6
    assert float(hidden.grad.abs().max()) < 1e-6


def test_no_tokens_give_a_learning_head_a_gradient_too():
    linear, hidden = torch.nn.Linear(4, 9), torch.randn(0, 4).requires_grad_()
    total = distill_trainable(hidden, linear, DenseTargets(torch.randn(0, 4), head_of(4, 9)), 9)
    total.backward()
    assert float(total) == 0
    for leaf in (hidden, linear.weight, linear.bias):
        assert leaf.grad is not None
        assert not leaf.grad.any()


def test_no_tokens_give_zero_and_a_gradient_of_zero():
    hidden = torch.randn(0, 4).requires_grad_()
    total = forward_kl(hidden, head_of(4, 9), torch.randn(0, 4), head_of(4, 9))
    total.backward()
    assert float(total) == 0
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, 4)


@pytest.mark.parametrize("loss", [ForwardKL(), JensenShannon(), ReverseKL()])
@pytest.mark.parametrize("scale", [1e4, 3e4])
def test_extreme_logits_and_one_hot_teachers_stay_finite(scale: float, loss: Loss):
    identity = Head(torch.eye(8), None, 1.0, None)
    hidden = (torch.randn(5, 8) * scale).requires_grad_()
    reference = torch.zeros(5, 8)
    reference[:, 3] = scale
    total = distill(hidden, identity, DenseTargets(reference, identity), loss)
    total.backward()
    assert torch.isfinite(total)
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()
    torch.testing.assert_close(
        total.double(), oracle(hidden.detach(), identity, reference, identity, loss), rtol=1e-5, atol=1e-2
    )


@pytest.mark.parametrize("loss", [ForwardKL(), JensenShannon()])
def test_excluded_tokens_of_the_teacher_cost_what_the_definition_says(loss: Loss):
    """A logit of -inf: a probability of exactly 0, of which 0 log 0 is 0."""
    bias = torch.zeros(6)
    bias[4] = -torch.inf
    hidden = torch.randn(3, 6).requires_grad_()
    identity, excluded = Head(torch.eye(6), None, 1.0, None), Head(torch.eye(6), bias, 1.0, None)
    total = distill(hidden, identity, DenseTargets(hidden.detach(), excluded), loss)
    (gradient,) = torch.autograd.grad(total, hidden)
    near = bias.clone()
    near[4] = -80.0  # as good as excluded, but finite in the oracle
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = oracle(exact_hidden, identity, hidden.detach(), Head(torch.eye(6), near, 1.0, None), loss)
    (expected,) = torch.autograd.grad(exact, exact_hidden)
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_token_that_the_student_excludes_is_infinitely_wrong():
    bias = torch.tensor([0.0, -torch.inf, 0.0])
    hidden = torch.randn(2, 3)
    excluded, identity = Head(torch.eye(3), bias, 1.0, None), Head(torch.eye(3), None, 1.0, None)
    assert forward_kl(hidden, excluded, hidden, identity) == torch.inf
    assert distill(hidden, identity, DenseTargets(hidden, excluded), ReverseKL()) == torch.inf


def test_bfloat16_states_give_float32_logits_and_an_exact_gradient():
    head = Head((0.1 * torch.randn(5000, 64)).bfloat16(), None, 1.0, None)  # more rows than one tile
    assert head.width > recovery.head.TILE_ROWS
    hidden = torch.randn(40, 64).bfloat16()
    reference = torch.randn(40, 64).bfloat16()
    widened = hidden.float().requires_grad_()
    total = forward_kl(widened, head, reference, head)
    total.backward()
    exact_hidden = hidden.double().requires_grad_()
    exact = oracle(exact_hidden, head, reference, head)
    exact.backward()
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-3)
    assert widened.grad is not None
    assert exact_hidden.grad is not None
    assert float((widened.grad - exact_hidden.grad).norm() / exact_hidden.grad.norm()) < 1e-5
    narrow = hidden.clone().requires_grad_()
    forward_kl(narrow, head, reference, head).backward()
    assert narrow.grad is not None
    assert narrow.grad.dtype == torch.bfloat16
    assert float((narrow.grad.double() - exact_hidden.grad).norm() / exact_hidden.grad.norm()) < 2.5e-3


def test_a_gradient_split_in_two_keeps_sixteen_bits():
    """What goes into a GPU's third product instead of one rounded factor."""
    values = torch.randn(1000) * torch.logspace(-6, 0, 1000)
    high, low = split(values, torch.bfloat16)
    assert float(((high.float() + low.float() - values) / values).abs().max()) < 2**-16
    assert float(((high.float() - values) / values).abs().max()) > 2**-10


# ---- sparse targets --------------------------------------------------------------------------------------


def sparse_targets(reference: Tensor, head: Head, top: int, draws: int, seed: int) -> SparseTargets:
    uniform = torch.rand(len(reference), draws, generator=torch.Generator().manual_seed(seed))
    signal = draw(head.logits(reference), top, uniform)
    return SparseTargets.of(signal)


def value_and_gradient(hidden: Tensor, head: Head, targets: Any) -> tuple[Tensor, Tensor]:
    own = hidden.clone().requires_grad_()
    total = distill(own, head, targets)
    (gradient,) = torch.autograd.grad(total, own)
    return total.detach(), gradient


@pytest.mark.parametrize("kind", ["drawn from the tail", "the text's own token"])
def test_sparse_targets_are_unbiased(kind: str):
    """The mean over many draws is the dense loss and gradient, within five standard errors."""
    head, reference_head = head_of(6, 40, scale=0.5), head_of(6, 40, scale=0.4)
    hidden, reference = torch.randn(3, 6), torch.randn(3, 6)
    dense = value_and_gradient(hidden, head, DenseTargets(reference, reference_head))
    probabilities = torch.softmax(reference_head.logits(reference), -1)
    values, gradients = [], []
    for seed in range(3000):
        targets = sparse_targets(reference, reference_head, 5, 4, seed)
        if kind == "the text's own token":
            emitted = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(seed))
            outside = ~(targets.top_ids_NK == emitted).any(-1, keepdim=True)
            logprobs = probabilities.gather(1, emitted).log()
            targets = SparseTargets(
                targets.top_ids_NK, targets.top_logprobs_NK, targets.rest_N, emitted, logprobs, outside.float()
            )
        value, gradient = value_and_gradient(hidden, head, targets)
        values.append(value)
        gradients.append(gradient)
    for found, expected in ((torch.stack(values), dense[0]), (torch.stack(gradients), dense[1])):
        error = found.std(0) / len(found) ** 0.5
        # float16 log-probabilities shift every draw alike, by up to 2^-11 of their size.
        assert ((found.mean(0) - expected).abs() < 5 * error + 3e-3).all()


def test_positions_without_a_draw_learn_the_mass_of_the_tail():
    """Their loss is the KL of the distributions in which the tail is one token."""
    head = head_of(6, 40)
    hidden, reference = torch.randn(4, 6), torch.randn(4, 6)
    targets = sparse_targets(reference, head, 5, 1, 0)
    weights = torch.zeros_like(targets.tail_weights_NM)
    bucket = SparseTargets(
        targets.top_ids_NK, targets.top_logprobs_NK, targets.rest_N, targets.tail_ids_NM, weights, weights
    )
    value, gradient = value_and_gradient(hidden, head, bucket)
    own = hidden.double().requires_grad_()
    q = torch.softmax(logits_of(own, head), -1).gather(1, bucket.top_ids_NK)
    log_q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1).log()
    p = torch.cat([bucket.top_logprobs_NK.double().exp(), bucket.rest_N[:, None].double()], -1)
    expected = (p * (p.log() - log_q)).sum()
    expected.backward()
    assert own.grad is not None
    torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient.double(), own.grad, rtol=2e-3, atol=2e-3)  # float16: the mass is not quite 1


@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_draws_lie_outside_the_top_and_one_hot_teachers_stay_finite(scale: float):
    head = head_of(6, 40)
    reference = torch.randn(50, 6) * scale
    targets = sparse_targets(reference, head, 5, 8, 1)
    drawn = targets.tail_weights_NM > 0
    inside = (targets.tail_ids_NM[:, :, None] == targets.top_ids_NK[:, None, :]).any(-1)
    assert not (inside & drawn).any()
    exact = torch.softmax(logits_of(reference, head), -1).topk(5).values.sum(-1)
    torch.testing.assert_close(targets.rest_N.double(), 1 - exact, rtol=1e-3, atol=1e-6)
    value, gradient = value_and_gradient(torch.randn(50, 6), head, targets)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()


def test_compare_counts_agreement_and_likelihood():
    head, reference_head = head_of(12, 40), head_of(9, 40)
    hidden, reference = torch.randn(200, 12), torch.randn(200, 9)
    following = torch.randint(0, 40, (200,))
    kl, top1, nll, reference_nll = (
        compare(hidden, head, DenseTargets(reference, reference_head), following).sum(0).tolist()
    )
    student = torch.log_softmax(hidden.double() @ head.weight_VH.double().T, -1)
    teacher = torch.log_softmax(reference.double() @ reference_head.weight_VH.double().T, -1)
    assert kl == pytest.approx(float(oracle(hidden, head, reference, reference_head)), rel=1e-5)
    assert top1 == float((student.argmax(-1) == teacher.argmax(-1)).sum())
    assert nll == pytest.approx(float(-student[torch.arange(200), following].sum()), rel=1e-5)
    assert reference_nll == pytest.approx(float(-teacher[torch.arange(200), following].sum()), rel=1e-5)
