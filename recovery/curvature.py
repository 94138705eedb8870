"""Which outputs of a layer the reference's distribution depends on.

For a small change dy of a layer's output, KL(reference || student) is 1/2 E[(g^T dy)^2] nats: g is the gradient of
log p(y) to the output, and y is drawn from the reference's own distribution, which makes E[g g^T] the Fisher
information. With inputs x and gradients g taken as independent, and so tokens of each other (K-FAC, arXiv 1503.05671),
a change D of the layer's weights costs

    1/2 tr(G D C D^T) nats a token,   G = E[g g^T],   C = E[x x^T].

The gradients are made layer by layer, from the last to the first: a layer is computed again from its stored input, so
only one layer needs to be on the device, and no more than the states between layers is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recovery.closed_form import Moments
from recovery.head import Head
from recovery.layerwise import Stream, back_through, back_through_end, layers_of, on_device, output_of
from recovery.loss import chunks
from recovery.models import head_of

WIDEST = 4096
"""Outputs of the widest layer whose whole G is kept; of a wider one its diagonal."""


@dataclass
class Sensitivity:
    """Of one module, over the calibration tokens; float64 sums on the device."""

    gradients: Tensor
    """sum of g g^T (O, O), or of g^2 (O)"""
    inputs: Moments | None
    tokens: Tensor
    """float64 scalar"""

    @classmethod
    def zero(cls, module: Any, device: torch.device, *, with_inputs: bool) -> Sensitivity:
        width = module.out_features
        shape = (width, width) if width <= WIDEST else (width,)
        inputs = Moments.zero(module.in_features, device) if with_inputs else None
        count = torch.zeros((), dtype=torch.float64, device=device)
        return cls(torch.zeros(shape, dtype=torch.float64, device=device), inputs, count)

    def add(self, inputs_TI: Tensor, gradients_TO: Tensor) -> None:
        wide_TO = gradients_TO.to(torch.promote_types(gradients_TO.dtype, torch.float32))
        self.gradients += wide_TO.T @ wide_TO if self.gradients.dim() == 2 else wide_TO.square().sum(0)
        self.tokens += len(wide_TO)
        if self.inputs is not None:
            self.inputs.add(inputs_TI, inputs_TI)

    def all_reduce(self) -> None:
        torch.distributed.all_reduce(self.gradients)
        torch.distributed.all_reduce(self.tokens)
        if self.inputs is not None:
            self.inputs.all_reduce()

    @property
    def curvature(self) -> Tensor:
        """G, or its diagonal."""
        return self.gradients / self.tokens.clamp(min=1.0)


def sensitivities(
    reference: Any,
    streams: Sequence[Stream],
    modules_of: Callable[[int], Mapping[str, nn.Module]],
    width: int,
    seed: int,
    device: torch.device,
    *,
    ranks: int = 1,
    with_inputs: bool = False,
) -> Iterator[tuple[int, dict[str, Sensitivity]]]:
    """(layer, its modules' sensitivities by name), from the last layer to the first; over all ranks.

    streams: texts in front of the first layer; spent afterwards. modules_of: the modules of a layer by name. width:
    logits in use. The reference must have packed attention, and its layers lie on the CPU.
    """
    layers = layers_of(reference)
    before: list[list[Tensor]] = []
    for number, layer in enumerate(layers):
        before.append([stream.states_1TH for stream in streams])
        with on_device(device, layer):
            for stream in streams:
                stream.states_1TH = output_of(layer, number, stream, device).cpu()
    head = head_of(reference, width)
    behind = [back_through_end(reference, stream, drawn(stream, head, seed)) for stream in streams]
    for number in reversed(range(len(layers))):
        layer, modules = layers[number], modules_of(number)
        found = {name: Sensitivity.zero(module, device, with_inputs=with_inputs) for name, module in modules.items()}

        def take(name: str, inputs_TI: Tensor, gradients_TO: Tensor) -> None:
            found[name].add(inputs_TI, gradients_TO)  # noqa: B023 - called before the loop goes on

        with on_device(device, layer):
            for place, (stream, states_1TH) in enumerate(zip(streams, before.pop(), strict=True)):
                stream.states_1TH = states_1TH
                behind[place] = back_through(layer, modules, number, stream, behind[place], device, take).cpu()
        if ranks > 1:
            for sensitivity in found.values():
                sensitivity.all_reduce()
        yield number, found


def drawn(stream: Stream, head: Head, seed: int) -> Callable[[Tensor], Tensor]:
    """Final hidden states (T, H) to the gradient of the sum of log p(y) over the tokens with loss, y drawn from p."""
    batch = stream.batch
    generator = torch.Generator(batch.ids_T.device).manual_seed(seed + batch.rows[0])

    def gradient_of(hidden_TH: Tensor) -> Tensor:
        hidden_NH = hidden_TH[batch.loss_N]
        gradient_NH = torch.empty_like(hidden_NH)
        for part in chunks(len(hidden_NH), head.width):
            logits_TV = head.logits(hidden_NH[part])
            p_TV = torch.softmax(logits_TV, dim=-1)
            drawn_T1 = torch.multinomial(p_TV, 1, generator=generator)
            to_logits_TV = p_TV.neg_().scatter_add_(1, drawn_T1, torch.ones_like(p_TV[:, :1]))
            gradient_NH[part] = head.backward(to_logits_TV, logits_TV).to(gradient_NH.dtype)
        return torch.zeros_like(hidden_TH).index_copy_(0, batch.loss_N, gradient_NH)

    return gradient_of
