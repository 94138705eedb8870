"""Gated MLPs that keep less for the backward pass compute what transformers' own do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recovery.gated import use_gated_products
from tests.conftest import ARCHITECTURES
from tests.pipeline import model_at

OTHERS = ("phi3", "mixtral")
"""Gate and up in one matrix; experts."""


def an_mlp(models: dict[str, Path], kind: str) -> Any:
    model = model_at(models[kind]).double()
    mlp = model.get_decoder().layers[0].mlp.requires_grad_(True)
    return getattr(mlp, "shared_expert", mlp)


def passed(mlp: Any, x: Tensor) -> tuple[list[Tensor], int]:
    """Output and gradients, and the elements kept in between."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = mlp(x)
    gradients = torch.autograd.grad(output.square().sum(), [x, *mlp.parameters()], allow_unused=False)
    return [output, *gradients], sum(kept.values())


@pytest.mark.parametrize("kind", [kind for kind in ARCHITECTURES if kind not in OTHERS])
def test_output_and_gradients_are_the_same_and_less_is_kept(models: dict[str, Path], kind: str):
    mlp = an_mlp(models, kind)
    x = torch.randn(7, mlp.gate_proj.in_features, dtype=torch.float64, requires_grad=True)
    expected, before = passed(mlp, x)
    assert use_gated_products(mlp) == 1
    found, after = passed(mlp, x)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert before - after == x.shape[0] * mlp.gate_proj.out_features


@pytest.mark.parametrize("kind", OTHERS)
def test_other_mlps_keep_their_forward(models: dict[str, Path], kind: str):
    assert use_gated_products(an_mlp(models, kind)) == 0


def test_only_what_learns_gets_a_gradient(models: dict[str, Path]):
    mlp = an_mlp(models, "llama").requires_grad_(False)
    use_gated_products(mlp)
    mlp.up_proj.weight.requires_grad_(True)
    mlp(torch.randn(7, mlp.gate_proj.in_features, dtype=torch.float64)).sum().backward()
    assert mlp.up_proj.weight.grad is not None
    assert mlp.gate_proj.weight.grad is None


class Scaled(nn.Module):
    """The same parts, another formula."""

    def __init__(self, act: nn.Module, factor: float) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.act_fn, self.factor = act, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.factor * self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def test_another_formula_or_activation_is_left_alone():
    x = torch.randn(3, 8)
    for mlp, switched in ((Scaled(nn.SiLU(), 1.0), 1), (Scaled(nn.SiLU(), 0.5), 0), (Scaled(nn.ReLU(), 1.0), 0)):
        expected = mlp(x)
        assert use_gated_products(mlp) == switched
        torch.testing.assert_close(mlp(x), expected)
