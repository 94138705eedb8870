"""The closed form of one layer: the best low-rank change, whatever the moments look like."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recovery.closed_form import Factors, Metric, Moments

OUT, IN, TOKENS = 12, 20, 400


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments_of(student_TI: Tensor, reference_TI: Tensor) -> Moments:
    moments = Moments.zero(student_TI.shape[1], student_TI.device)
    for student, reference in zip(student_TI.split(64), reference_TI.split(64), strict=True):
        moments.add(student, reference)
    return moments


def error(factors: Factors, reference: Tensor, degraded: Tensor, student_TI: Tensor, target_TI: Tensor) -> float:
    """Mean square of what is left of the wanted output."""
    repaired = degraded + factors.b_OR @ factors.a_RI
    return float((target_TI @ reference.T - student_TI @ repaired.T).square().sum() / len(student_TI))


@pytest.fixture
def weights() -> tuple[Tensor, Tensor]:
    return random(OUT, IN, seed=0), random(OUT, IN, seed=1)


def test_full_rank_restores_the_weights(weights: tuple[Tensor, Tensor]):
    reference, degraded = weights
    x = random(TOKENS, IN, seed=2) @ random(IN, IN, seed=3)
    factors = Metric(moments_of(x, x), 0.01).factors(reference, degraded, OUT, 0.0)
    torch.testing.assert_close(factors.b_OR @ factors.a_RI, reference - degraded, rtol=1e-8, atol=1e-8)
    assert factors.kept == pytest.approx(1)


@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
def test_no_other_change_of_that_rank_is_better(weights: tuple[Tensor, Tensor], blend: float):
    """Against the optimum found by alternating least squares from many starts."""
    reference, degraded = weights
    student = random(TOKENS, IN, seed=2) @ random(IN, IN, seed=3)
    theirs = student + 0.5 * random(TOKENS, IN, seed=4)
    target = blend * theirs + (1 - blend) * student
    factors = Metric(moments_of(student, theirs), 1e-12).factors(reference, degraded, 3, blend)
    found = error(factors, reference, degraded, student, target)
    wanted = target @ reference.T - student @ degraded.T
    best = float("inf")
    for start in range(5):
        a, b = random(3, IN, seed=10 + start), random(OUT, 3, seed=0)
        for _ in range(300):
            b = torch.linalg.lstsq(student @ a.T, wanted).solution.T
            a = torch.linalg.lstsq(student, wanted @ torch.linalg.pinv(b).T).solution.T
        best = min(best, float((wanted - student @ a.T @ b.T).square().sum() / TOKENS))
    assert found <= best * (1 + 1e-6)
    assert found == pytest.approx(best, rel=1e-3)


def test_the_inputs_decide_which_directions_count(weights: tuple[Tensor, Tensor]):
    """Most of the difference of the weights is where no input ever is: a plain SVD would spend its rank there."""
    reference, degraded = weights
    x = random(TOKENS, IN, seed=2)
    x[:, 10:] *= 1e-3
    degraded = degraded.clone()
    degraded[:, 10:] += 100 * random(OUT, 10, seed=5)
    u, s, v = torch.linalg.svd(reference - degraded, full_matrices=False)
    plain = Factors(v[:4], u[:, :4] * s[:4], 0.0)
    weighed = Metric(moments_of(x, x), 1e-6).factors(reference, degraded, 4, 0.0)
    assert error(weighed, reference, degraded, x, x) < 0.7 * error(plain, reference, degraded, x, x)


def test_moments_without_full_rank(weights: tuple[Tensor, Tensor]):
    reference, degraded = weights
    x = random(TOKENS, 4, seed=2) @ random(4, IN, seed=3)
    factors = Metric(moments_of(x, x), 0.01).factors(reference, degraded, 4, 1.0)
    assert torch.isfinite(factors.b_OR @ factors.a_RI).all()
    nothing = Factors(torch.zeros(4, IN).double(), torch.zeros(OUT, 4).double(), 0.0)
    assert error(factors, reference, degraded, x, x) < 1e-3 * error(nothing, reference, degraded, x, x)


@pytest.mark.parametrize("case", ["no damage", "inputs of zero"])
def test_nothing_to_do_or_to_learn_from_stays_finite(weights: tuple[Tensor, Tensor], case: str):
    reference, degraded = weights
    x = torch.zeros(TOKENS, IN).double() if case == "inputs of zero" else random(TOKENS, IN, seed=2)
    given = degraded if case == "inputs of zero" else reference
    factors = Metric(moments_of(x, x), 0.01).factors(reference, given, 4, 1.0)
    change = factors.b_OR @ factors.a_RI
    assert torch.isfinite(change).all()
    if case == "no damage":
        torch.testing.assert_close(change, torch.zeros_like(change))
        assert factors.kept == pytest.approx(1)


def test_both_factors_have_the_same_scale(weights: tuple[Tensor, Tensor]):
    x = random(TOKENS, IN, seed=2)
    factors = Metric(moments_of(x, x), 0.01).factors(*weights, 4, 1.0)
    b_norms, a_norms = factors.b_OR.norm(dim=0), (factors.a_RI @ random(IN, IN, seed=3)).norm(dim=1)
    assert 0.05 < float((b_norms / a_norms).mean()) < 20
