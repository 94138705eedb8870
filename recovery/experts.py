"""Experts kept as 3-D parameters, gate_up_proj (E, 2 M, H) and down_proj (E, H, M): their closed forms, and gradients.

Each expert is a layer of its own, whose inputs are the tokens that were routed to it. In a closed form the student's
routing decides where tokens of both models are taken, so that every token has its counterpart.

E experts, T tokens, I inputs and O outputs of one matrix, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recovery.closed_form import Factors, Metric, Moments, OutputMetric

Texts = Callable[[], Iterator[tuple[Any, Tensor]]]
"""The calibration texts as the experts are called with them, again at every call: the student's arguments (states
(T, H), chosen experts (T, K), weights) and the reference's states (T, H)."""
MOMENTS_BYTES = 1 << 32
"""Of inputs' moments that stand at once: of the experts that are solved in one pass over the texts."""
Take = Callable[[str, Tensor, Tensor], None]
"""A matrix' name, its inputs (tokens, I) and the gradient to its outputs (tokens, O)."""


@dataclass(frozen=True)
class Part:
    """One parameter of a layer's experts, outside of adapters: a matrix for each of them."""

    experts: Any
    parameter: str
    """gate_up_proj or down_proj"""

    @property
    def weights_EOI(self) -> Tensor:
        return getattr(self.experts, self.parameter)


def single_names(name: str, experts: int) -> list[str]:
    """Of the single experts; name: their parameter's."""
    return [f"{name}.{expert}" for expert in range(experts)]


Matrix = nn.Linear | Part
"""What damage, adapters and costs are counted by."""


def matrix_at(model: Any, name: str) -> Matrix:
    """By the name that recovery.placement gives it."""
    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    found = getattr(module, last)
    return Part(module, last) if isinstance(found, nn.Parameter) else found


@torch.enable_grad()
def gradients_of(names: Mapping[str, str], experts: Any, called: tuple[Any, ...], to_TH: Tensor, take: Take) -> None:
    """Give `take` what each expert's matrices were given, and the gradients to what these made of it.

    names: by parameter, of those that are wanted. called: the experts' arguments (states (T, H), chosen experts (T, K),
    weights (T, K)). to_TH: the gradient to their output.
    """
    states_TH, chosen_TK, weights_TK = (one.detach() for one in called[:3])
    for expert, (gate_up_OI, down_OI) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
        tokens, place = (chosen_TK == expert).nonzero(as_tuple=True)
        if not len(tokens):
            continue
        up_NO = nn.functional.linear(states_TH[tokens], gate_up_OI).requires_grad_()
        inner_NM = experts._apply_gate(up_NO)
        to_down_NH = (weights_TK[tokens, place, None] * to_TH[tokens]).to(to_TH.dtype)
        if "down_proj" in names:
            take(f"{names['down_proj']}.{expert}", inner_NM.detach(), to_down_NH)
        if "gate_up_proj" in names:
            (to_up_NO,) = torch.autograd.grad(inner_NM, up_NO, to_down_NH @ down_OI)
            take(f"{names['gate_up_proj']}.{expert}", states_TH[tokens], to_up_NO)


@dataclass(frozen=True)
class ExpertLayer:
    """One adapted parameter of a layer's experts."""

    wrapper: Any
    """PEFT's, around the student's experts"""
    reference: Any
    """the reference's experts"""

    @property
    def part(self) -> str:
        return self.wrapper.parameter_name

    @property
    def count(self) -> int:
        return self.wrapper.num_experts

    @property
    def rank(self) -> int:
        return self.wrapper.r["default"]

    def weights(self, expert: int) -> tuple[Tensor, Tensor]:
        """(reference, degraded), (O, I)."""
        return getattr(self.reference, self.part)[expert], getattr(self.wrapper.get_base_layer(), self.part)[expert]


def is_expert(module: Any) -> bool:
    """Whether an adapter's module is PEFT's wrapper of experts. A linear module may have such a wrapper too, around its
    `weight` (recovery.adapters)."""
    return getattr(module, "parameter_name", "weight") != "weight"


def inputs_of(experts: Any, gate_up_OI: Tensor, part: str, states_TH: Tensor) -> Tensor:
    """What one expert's matrix is given for these tokens: the states, or behind the gate what goes down."""
    if part == "gate_up_proj":
        return states_TH
    return experts._apply_gate(torch.nn.functional.linear(states_TH, gate_up_OI))


def adapted_gate_up(wrapper: Any, expert: int) -> Tensor:
    """The student's gate_up_proj of one expert as it is now, with its adapter where it has one."""
    weight_OI = wrapper.get_base_layer().gate_up_proj[expert]
    inner = wrapper
    while is_expert(inner):
        if inner.parameter_name == "gate_up_proj":
            weight_OI = weight_OI + _b_of(inner, expert) @ _a_of(inner, expert)
        inner = inner.base_layer
    return weight_OI


def _a_of(wrapper: Any, expert: int) -> Tensor:
    """(R, I): PEFT holds the experts' A one below the other."""
    rank = wrapper.r["default"]
    return wrapper.lora_A["default"].weight[expert * rank : (expert + 1) * rank]


def _b_of(wrapper: Any, expert: int) -> Tensor:
    """(O, R): PEFT holds the experts' B interleaved, one column of each after the other."""
    return wrapper.lora_B["default"].weight[:, expert :: wrapper.num_experts]


def together(found: list[Factors | None], like: ExpertLayer) -> tuple[Tensor, Tensor]:
    """A (E R, I) and B (O, R E) as PEFT holds them; zeros for an expert that no token was sent to."""
    rank, count = like.rank, like.count
    a_XI = torch.zeros_like(like.wrapper.lora_A["default"].weight, dtype=torch.float32, device="cpu")
    b_OX = torch.zeros_like(like.wrapper.lora_B["default"].weight, dtype=torch.float32, device="cpu")
    for expert, factors in enumerate(found):
        if factors is not None:
            a_XI[expert * rank : (expert + 1) * rank] = factors.a_RI.float().cpu()
            b_OX[:, expert::count] = factors.b_OR.float().cpu()
    return a_XI, b_OX


@torch.no_grad()
def solve_experts(
    layer: ExpertLayer,
    texts: Texts | None,
    damping: float,
    blend: float,
    outputs: Mapping[int, OutputMetric],
    *,
    ranks: int,
    sequential: bool,
) -> list[Factors | None]:
    """The best factors of every expert; None where no token came by, on any rank.

    texts: None where all inputs count alike. outputs: how much each of an expert's outputs counts; all alike where it
    has no metric. sequential: inputs are what the student's earlier matrices give; otherwise the reference's in both
    places.
    """
    width = layer.weights(0)[0].shape[1]
    where = layer.weights(0)[1].device
    at_once = max(1, MOMENTS_BYTES // (2 * 8 * width * width))
    if texts is None:
        alike = Metric(Moments.alike(width, where), damping)
        return [alike.factors(*layer.weights(expert), layer.rank, blend) for expert in range(layer.count)]
    found: list[Factors | None] = []
    for first in range(0, layer.count, at_once):
        block = range(first, min(first + at_once, layer.count))
        moments = {expert: Moments.zero(width, where) for expert in block}
        for (states_TH, chosen_TK, *_), theirs_TH in texts():
            for expert in block:
                tokens = (chosen_TK == expert).any(-1)
                if not tokens.any():
                    continue
                right_OI = layer.reference.gate_up_proj[expert]
                theirs_TI = inputs_of(layer.reference, right_OI, layer.part, theirs_TH[tokens])
                own_TI = theirs_TI
                if sequential:
                    gate_up_OI = adapted_gate_up(layer.wrapper, expert)
                    own_TI = inputs_of(layer.wrapper.get_base_layer(), gate_up_OI, layer.part, states_TH[tokens])
                moments[expert].add(own_TI, theirs_TI)
        for expert in block:
            if ranks > 1:
                moments[expert].all_reduce()
            if not float(moments[expert].tokens):
                found.append(None)
                continue
            metric = Metric(moments[expert], damping)
            found.append(metric.factors(*layer.weights(expert), layer.rank, blend, outputs.get(expert)))
    return found
