"""The loss against an fp64 oracle, with gradcheck and property tests over shapes, masks and extreme logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recovery.loss import compare, forward_kl
from recovery.models import Head


def head_of(
    width: int, vocabulary: int, *, softcap: float | None = None, bias: bool = False, scale: float = 1.0
) -> Head:
    generator = torch.Generator().manual_seed(width * 1000 + vocabulary)
    weight = torch.randn(vocabulary, width, generator=generator)
    offset = torch.randn(vocabulary, generator=generator) if bias else None
    return Head(weight, offset, scale, softcap)


def oracle(hidden: torch.Tensor, head: Head, reference: torch.Tensor, reference_head: Head) -> torch.Tensor:
    """Equation 2 of the paper in float64, through autograd."""

    def log_probabilities(states: torch.Tensor, which: Head) -> torch.Tensor:
        logits = states.double() @ which.weight_VH.double().T
        if which.bias_V is not None:
            logits = logits + which.bias_V.double()
        logits = logits * which.scale
        if which.softcap is not None:
            logits = which.softcap * torch.tanh(logits / which.softcap)
        return torch.log_softmax(logits, -1)

    teacher, student = log_probabilities(reference, reference_head), log_probabilities(hidden, head)
    return torch.nn.functional.kl_div(student, teacher, reduction="sum", log_target=True)


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 300),
    width=st.integers(1, 24),
    reference_width=st.integers(1, 24),
    vocabulary=st.integers(2, 90),
    softcap=st.sampled_from([None, 3.0]),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.25]),
)
def test_value_and_gradient_match_the_oracle(
    tokens: int,
    width: int,
    reference_width: int,
    vocabulary: int,
    softcap: float | None,
    bias: bool,
    scale: float,
):
    head = head_of(width, vocabulary, softcap=softcap, bias=bias, scale=scale)
    reference_head = head_of(reference_width, vocabulary, softcap=softcap)
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, width, generator=generator).requires_grad_()
    reference = torch.randn(tokens, reference_width, generator=generator)
    total, count = forward_kl(hidden, head, reference, reference_head)
    (total * 0.5).backward()
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = oracle(exact_hidden, head, reference, reference_head)
    (exact * 0.5).backward()
    assert count == tokens
    assert hidden.grad is not None
    assert exact_hidden.grad is not None
    torch.testing.assert_close(total.double(), exact, rtol=2e-5, atol=2e-4)
    torch.testing.assert_close(hidden.grad.double(), exact_hidden.grad, rtol=2e-4, atol=2e-5)


def test_equal_models_have_zero_kl_and_zero_gradient():
    head = head_of(16, 50)
    hidden = torch.randn(20, 16).requires_grad_()
    total, _ = forward_kl(hidden, head, hidden.detach(), head)
    total.backward()
    assert hidden.grad is not None
    assert abs(float(total)) < 1e-6
    assert float(hidden.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("scale", [1e4, 3e4])
def test_extreme_logits_and_one_hot_teachers_stay_finite(scale: float):
    identity = Head(torch.eye(8), None, 1.0, None)
    hidden = (torch.randn(5, 8) * scale).requires_grad_()
    reference = torch.zeros(5, 8)
    reference[:, 3] = scale
    total, _ = forward_kl(hidden, identity, reference, identity)
    total.backward()
    assert torch.isfinite(total)
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()
    torch.testing.assert_close(
        total.double(), oracle(hidden.detach(), identity, reference, identity), rtol=1e-5, atol=1e-2
    )


def test_excluded_tokens_of_the_teacher_cost_nothing():
    bias = torch.zeros(6)
    bias[4] = -torch.inf
    hidden = torch.randn(3, 6)
    excluded = Head(torch.eye(6), bias, 1.0, None)
    total, _ = forward_kl(hidden, Head(torch.eye(6), None, 1.0, None), hidden, excluded)
    lost = torch.softmax(hidden.double(), -1)[:, 4]
    torch.testing.assert_close(total.double(), -torch.log1p(-lost).sum(), rtol=1e-5, atol=1e-5)


def test_bfloat16_states_give_float32_logits():
    head = Head(torch.randn(300, 64).bfloat16(), None, 1.0, None)
    hidden = torch.randn(40, 64).bfloat16()
    reference = torch.randn(40, 64).bfloat16()
    total, _ = forward_kl(hidden, head, reference, head)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.double(), oracle(hidden, head, reference, head), rtol=1e-5, atol=1e-3)


def test_compare_counts_agreement_and_likelihood():
    head, reference_head = head_of(12, 40), head_of(9, 40)
    hidden, reference = torch.randn(200, 12), torch.randn(200, 9)
    following = torch.randint(0, 40, (200,))
    kl, top1, nll, reference_nll = compare(hidden, head, reference, reference_head, following).tolist()
    student = torch.log_softmax(hidden.double() @ head.weight_VH.double().T, -1)
    teacher = torch.log_softmax(reference.double() @ reference_head.weight_VH.double().T, -1)
    assert kl == pytest.approx(float(oracle(hidden, head, reference, reference_head)), rel=1e-5)
    assert top1 == float((student.argmax(-1) == teacher.argmax(-1)).sum())
    assert nll == pytest.approx(float(-student[torch.arange(200), following].sum()), rel=1e-5)
    assert reference_nll == pytest.approx(float(-teacher[torch.arange(200), following].sum()), rel=1e-5)
