"""Gated MLPs (SwiGLU, GeGLU) that keep two wide tensors for the backward pass instead of three.

down(act(gate(x)) * up(x)): autograd keeps gate(x), act(gate(x)) and up(x). The middle one costs one cheap pass over
gate(x) to make again, and a step's memory is mostly these tensors. The weights stay where they are: adapters, ZeRO and
activation checkpointing see the same modules.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

Derivative = Callable[[Tensor, Tensor], Tensor]
"""(gradient of act(x), x) to the gradient of x."""
PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class GatedProduct(torch.autograd.Function):
    """act(gate) * up, of any shape."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: nn.Module, derivative: Derivative) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act, ctx.derivative = act, derivative
        return act(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (gradient,) = gradients
        gate, up = ctx.saved_tensors
        to_gate = ctx.derivative(gradient * up, gate) if ctx.needs_input_grad[0] else None
        to_up = ctx.act(gate).mul_(gradient) if ctx.needs_input_grad[1] else None
        return to_gate, to_up, None, None


def derivative_of(act: nn.Module) -> Derivative | None:
    from transformers.activations import GELUTanh, SiLUActivation

    if isinstance(act, nn.SiLU | SiLUActivation):
        return torch.ops.aten.silu_backward
    if isinstance(act, GELUTanh):
        return partial(torch.ops.aten.gelu_backward, approximate="tanh")
    return None


@torch.no_grad()
def use_gated_products(model: nn.Module, *, probe: bool = True) -> int:
    """Switch every MLP of the form above; returns how many. One that computes anything else keeps its forward.

    probe: compare what they compute; not on tensors without data.
    """
    switched = 0
    for module in model.modules():
        if {name for name, _ in module.named_children()} != PARTS:
            continue
        mlp: Any = module
        derivative = derivative_of(mlp.act_fn)
        if derivative is None:
            continue
        before = mlp.forward
        mlp.forward = MethodType(partial(_forward, derivative=derivative), mlp)
        if probe and not _same(mlp, before):
            del mlp.forward
        else:
            switched += 1
    return switched


def _same(mlp: Any, before: Callable[[Tensor], Tensor]) -> bool:
    x = torch.linspace(-1, 1, 2 * mlp.gate_proj.in_features).view(2, -1).to(mlp.gate_proj.weight)
    return torch.allclose(mlp(x), before(x))


def _forward(mlp: Any, x: Tensor, *, derivative: Derivative) -> Tensor:
    return mlp.down_proj(GatedProduct.apply(mlp.gate_proj(x), mlp.up_proj(x), mlp.act_fn, derivative))
