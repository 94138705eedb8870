"""Which outputs of a layer the reference's distribution depends on.

For a small change dy of a layer's output, KL(reference || student) is 1/2 E[(g^T dy)^2] nats: g is the gradient of
log p(y) to the output, and y is drawn from the reference's own distribution, which makes E[g g^T] the Fisher
information. With inputs x and gradients g taken as independent, and so tokens of each other (K-FAC, arXiv 1503.05671),
a change D of the layer's weights costs

    1/2 tr(G D C D^T) nats a token,   G = E[g g^T],   C = E[x x^T].

They are not independent: what is attended by many later tokens has gradients a hundred times those of what nobody looks
at. So each token counts in C with a weight w that grows with |g|^2, which for G = I is the nearest product of the two
(Van Loan and Pitsianis, 1993):

    C = E[w x x^T],   w = |g|^(2p) / E[|g|^(2p)],   p = POWER below 1, as |g|^2 is known from a single draw of y.

The gradients are made layer by layer, from the last to the first: a layer is computed again from its stored input, so
only one layer needs to be on the device, and no more than the states between layers is kept.

An expert is a matrix of its own, of the tokens that are routed to it: its costs count for their share of all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from recovery.batches import Batch
from recovery.closed_form import TINY, Metric, Moments, OutputMetric
from recovery.experts import MOMENTS_BYTES, Matrix, Part, matrix_at, single_names
from recovery.head import Head
from recovery.layerwise import Stream, back_through, back_through_end, layers_of, on_device, output_of
from recovery.loss import chunks
from recovery.models import head_of

POWER = 0.7
"""p above. On SmolLM2-135M with noise of half a standard deviation on K and V, 2.9 million parameters and 8,192 tokens,
the closed form left a KL of 0.112 at 0 (all tokens alike), 0.071 at 0.5, 0.066 at 0.7 and 0.075 at 1."""
WIDEST = 4096
"""Outputs of the widest layer whose whole G is kept; of a wider one its diagonal."""


@dataclass
class Sensitivity:
    """Of one matrix, over the calibration tokens that it sees; float64 sums on the device."""

    gradients: Tensor
    """sum of g g^T (O, O), or of g^2 (O)"""
    inputs: Tensor | None
    """sum of |g|^(2p) x x^T (I, I), or of |g|^(2p) x^2 (I)"""
    tokens: Tensor
    """float64 scalar"""
    weight: Tensor
    """float64 scalar: sum of |g|^(2p)"""
    weights: list[tuple[Batch, Tensor]] = field(default_factory=list)
    """|g|^(2p) (T,), float32 on the CPU, of the texts that this rank has seen; of matrices that all tokens come by"""
    share: float = 1.0
    """of all tokens"""

    @classmethod
    def zero(cls, matrix: Matrix, device: torch.device, *, with_inputs: bool) -> Sensitivity:
        """Experts, which there may be hundreds of, keep the diagonal of their outputs, and of inputs that are wide."""
        if isinstance(matrix, Part):
            experts, outputs, inputs = matrix.weights_EOI.shape
            whole, whole_inputs = False, 8 * experts * inputs**2 <= MOMENTS_BYTES
        else:
            outputs, inputs = matrix.weight.shape
            whole, whole_inputs = outputs <= WIDEST, True
        return cls(
            _zeros(outputs, device, whole=whole),
            _zeros(inputs, device, whole=whole_inputs) if with_inputs else None,
            torch.zeros((), dtype=torch.float64, device=device),
            torch.zeros((), dtype=torch.float64, device=device),
        )

    def add(self, inputs_TI: Tensor, gradients_TO: Tensor, batch: Batch | None = None) -> None:
        """batch: the text, where these are all of its tokens."""
        wide_TO = gradients_TO.to(torch.promote_types(gradients_TO.dtype, torch.float32))
        weights_T = wide_TO.square().sum(1).pow(POWER)
        _add(self.gradients, wide_TO)
        self.tokens += len(wide_TO)
        self.weight += weights_T.sum(dtype=torch.float64)
        if batch is not None:
            self.weights.append((batch, weights_T.float().cpu()))
        if self.inputs is not None:
            wide_TI = inputs_TI.to(wide_TO.dtype)
            _add(self.inputs, wide_TI * weights_T.sqrt()[:, None])

    def all_reduce(self) -> None:
        for tensor in (self.gradients, self.tokens, self.weight, self.inputs):
            if tensor is not None:
                torch.distributed.all_reduce(tensor)

    @property
    def curvature(self) -> Tensor:
        """G, or its diagonal."""
        return self.gradients / self.tokens.clamp(min=1.0)

    def weighed(self, reference_OI: Tensor, degraded_OI: Tensor, damping: float, outputs: OutputMetric) -> Tensor:
        """G^(1/2) (W_ref - W_deg) (C + l I)^(1/2), up to rotations (recovery.closed_form). damping: l, as a share of
        the mean square of an input, of which the moments must have been kept."""
        assert self.inputs is not None, "made without the moments of the inputs"
        inputs = self.inputs / self.weight.clamp(min=TINY)
        if inputs.dim() == 2:
            moments = Moments(inputs, inputs, torch.ones_like(self.weight))
            return Metric(moments, damping).whitened(reference_OI, degraded_OI, 0.0, outputs)
        roots_I = (inputs + damping * inputs.mean() + TINY).sqrt()
        return outputs.weigh((reference_OI.double() - degraded_OI.double()) * roots_I)


def _zeros(width: int, device: torch.device, *, whole: bool) -> Tensor:
    return torch.zeros((width, width) if whole else (width,), dtype=torch.float64, device=device)


def _add(total: Tensor, rows_TN: Tensor) -> None:
    """Second moments, or their diagonal."""
    total += rows_TN.T @ rows_TN if total.dim() == 2 else rows_TN.square().sum(0)


def sensitivities(
    reference: Any,
    streams: Sequence[Stream],
    names: Sequence[Mapping[str, str]],
    width: int,
    seed: int,
    device: torch.device,
    *,
    ranks: int = 1,
    with_inputs: bool = False,
) -> Iterator[tuple[int, dict[str, Sensitivity]]]:
    """(layer, its matrices' sensitivities by name), from the last layer to the first; over all ranks.

    streams: texts in front of the first layer; spent afterwards. names: of each layer's matrices (recovery.placement),
    by those in the layer, which the result has; each expert's is found as `<name>.<expert>`. width: logits in use. The
    reference must have packed attention, and its layers lie on the CPU.
    """
    tokens = torch.tensor(float(sum(len(stream.batch.ids_T) for stream in streams)), dtype=torch.float64, device=device)
    if ranks > 1:
        torch.distributed.all_reduce(tokens)
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
        layer = layers[number]
        matrices = {inner: matrix_at(reference, name) for inner, name in names[number].items()}
        found = {
            name: Sensitivity.zero(matrix, device, with_inputs=with_inputs)
            for given, matrix in matrices.items()
            for name in (single_names(given, len(matrix.weights_EOI)) if isinstance(matrix, Part) else [given])
        }

        def take(name: str, inputs_TI: Tensor, gradients_TO: Tensor) -> None:
            # Called before the loops go on.
            batch = stream.batch if len(gradients_TO) == len(stream.batch.ids_T) and name in matrices else None  # noqa: B023
            found[name].add(inputs_TI, gradients_TO, batch)  # noqa: B023

        with on_device(device, layer):
            for place, (stream, states_1TH) in enumerate(zip(streams, before.pop(), strict=True)):
                stream.states_1TH = states_1TH
                behind[place] = back_through(layer, matrices, number, stream, behind[place], device, take).cpu()
        for sensitivity in found.values():
            if ranks > 1:
                sensitivity.all_reduce()
            sensitivity.share = float(sensitivity.tokens / tokens.clamp(min=1.0))
        yield number, found
        found.clear()  # before the next layer's moments are made


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
