"""Running a decoder one layer at a time, so that only one layer of a large model needs to be on the device.

No architecture's forward is written again: the decoder itself runs with its layers replaced by stubs, which tells what
every layer is called with, and turns the last layer's output into final hidden states.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from recovery.batches import Batch
from recovery.experts import Matrix, Part, Take, gradients_of
from recovery.models import causal_lm, final_hidden

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Stream:
    """A batch on its way through the layers of one model: (1, T, H) states in front of the next layer, on the CPU."""

    batch: Batch
    states_1TH: Tensor
    calls: list[Arguments]
    """What each layer is called with besides the states."""
    to_shared: dict[str, list[Tensor]] = field(default_factory=dict)
    """On the way back: gradients to the keys and values that later layers read of one before them, by what these are
    called with in `calls`."""


def layers_of(model: Any) -> nn.ModuleList:
    return causal_lm(model).get_decoder().layers


@contextlib.contextmanager
def on_device(where: torch.device, *layers: nn.Module) -> Iterator[None]:
    """These layers on the device for a while; they lie on the host before and afterwards.

    What does not learn goes back to the very memory it came from: weights that were read as they are stored are pages
    of their file there, which all processes of a host have in common, and a copy would be this process's own.
    """
    owners = [module for layer in layers for module in layer.modules()]
    parameters = [
        (owner, name, one, one.data) for owner in owners for name, one in owner.named_parameters(recurse=False)
    ]
    buffers = [(owner, name, one) for owner in owners for name, one in owner.named_buffers(recurse=False)]
    for layer in layers:
        layer.to(where)
    try:
        yield
    finally:
        for owner, name, parameter, on_host in parameters:
            if parameter.requires_grad:
                on_host.copy_(getattr(owner, name).data)
            parameter.data = on_host
            setattr(owner, name, parameter)
        for owner, name, buffer in buffers:
            setattr(owner, name, buffer)


@contextlib.contextmanager
def _stubs(model: Any, answer: Callable[[int, Tensor, Arguments], Tensor]) -> Iterator[None]:
    """Layers that compute nothing: `answer` gives the output of each."""
    layers = list(layers_of(model))

    def stub(number: int) -> Callable[..., Tensor]:
        return lambda states, *positional, **named: answer(number, states, (positional, named))

    try:
        for number, layer in enumerate(layers):
            layer.forward = stub(number)
        yield
    finally:
        for layer in layers:
            del layer.forward


@torch.no_grad()
def begin(model: Any, batch: Batch) -> Stream:
    """The batch in front of the first layer. The model must have packed attention."""
    first: list[Tensor] = []
    calls: list[Arguments] = []

    def answer(number: int, states: Tensor, call: Arguments) -> Tensor:
        if number == 0:
            first.append(states)
        calls.append(call)
        return states

    with _stubs(model, answer):
        final_hidden(model, batch)
    return Stream(batch, first[0], calls)


@torch.no_grad()
def end(model: Any, stream: Stream) -> Tensor:
    """Final hidden states (T, H), after the last norm."""
    return _end(model, stream.batch, stream.states_1TH)


def _end(model: Any, batch: Batch, states_1TH: Tensor) -> Tensor:
    last = len(layers_of(model)) - 1
    with _stubs(model, lambda number, states, _: states_1TH.to(states) if number == last else states):
        return final_hidden(model, batch)


@torch.enable_grad()
def back_through_end(model: Any, stream: Stream, gradient_of: Callable[[Tensor], Tensor]) -> Tensor:
    """The gradient (1, T, H) to the last layer's output. gradient_of: final hidden states (T, H) to theirs."""
    states_1TH = stream.states_1TH.detach().requires_grad_()
    hidden_TH = _end(model, stream.batch, states_1TH)
    return torch.autograd.grad(hidden_TH, states_1TH, gradient_of(hidden_TH.detach()))[0]


@torch.enable_grad()
def back_through(
    layer: nn.Module,
    matrices: Mapping[str, Matrix],
    number: int,
    stream: Stream,
    gradient_1TH: Tensor,
    device: torch.device,
    take: Take,
) -> Tensor:
    """The gradient to the layer's input, from the one to its output; the stream stands in front of the layer.

    take: called for every one of `matrices` that a token came by, for each expert as `<name>.<expert>`.
    """
    states_1TH = stream.states_1TH.to(device).detach().requires_grad_()

    def noting(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def forward(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            if output.requires_grad:
                given = arguments[0].detach().flatten(0, -2)
                output.register_hook(lambda gradient: take(name, given, gradient.flatten(0, -2)))

        return forward

    def noting_experts(names: dict[str, str]) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def forward(experts: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda gradient: gradients_of(names, experts, arguments, gradient, take))

        return forward

    parts: dict[Any, dict[str, str]] = {}
    handles = []
    for name, matrix in matrices.items():
        if isinstance(matrix, Part):
            parts.setdefault(matrix.experts, {})[matrix.parameter] = name
        else:
            handles.append(matrix.register_forward_hook(noting(name)))
    handles += [experts.register_forward_hook(noting_experts(names)) for experts, names in parts.items()]
    try:
        return _gradient_to(states_1TH, layer, number, stream, gradient_1TH.to(device))
    finally:
        for handle in handles:
            handle.remove()


def _gradient_to(states_1TH: Tensor, layer: nn.Module, number: int, stream: Stream, gradient_1TH: Tensor) -> Tensor:
    """Where a layer reads the keys and values of one before it (Gemma 3n, Gemma 4), the gradient to these waits in the
    stream for that layer."""
    shared = stream.calls[number][1].get("shared_kv_states")
    if shared is None:
        return torch.autograd.grad(_run(layer, number, stream, states_1TH), states_1TH, gradient_1TH)[0]
    kept = dict(shared)
    given = {
        kind: tuple(one.detach().to(states_1TH.device).requires_grad_() for one in pair) for kind, pair in kept.items()
    }
    try:
        shared.update(given)
        outputs, gradients = [_run(layer, number, stream, states_1TH)], [gradient_1TH]
        for kind in [kind for kind in stream.to_shared if shared[kind] is not given[kind]]:  # this layer made them
            outputs += shared[kind]
            gradients += stream.to_shared.pop(kind)
    finally:
        shared.update(kept)
    leaves = [one for pair in given.values() for one in pair]
    to_states, *to_leaves = torch.autograd.grad(outputs, [states_1TH, *leaves], gradients, allow_unused=True)
    found = iter(to_leaves)
    for kind, pair in given.items():
        read = [next(found) for _ in pair]
        if read[0] is not None:
            before = stream.to_shared.get(kind, [0.0] * len(read))
            stream.to_shared[kind] = [one + other for one, other in zip(before, read, strict=True)]
    return to_states


class _Reached(Exception):
    """Ends a layer's forward at the module whose input is wanted."""


@torch.no_grad()
def output_of(layer: nn.Module, number: int, stream: Stream, device: torch.device) -> Tensor:
    """The layer's output for the stream, on the device; the stream stays where it is."""
    return _run(layer, number, stream, stream.states_1TH.to(device))


def _run(layer: nn.Module, number: int, stream: Stream, states_1TH: Tensor) -> Tensor:
    positional, named = _moved(stream.calls[number], states_1TH.device)
    output = layer(states_1TH, *positional, **named)
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def arguments_of(
    layer: nn.Module, module: nn.Module, number: int, stream: Stream, device: torch.device
) -> tuple[Any, ...] | None:
    """What `module`, somewhere in the layer, is called with; None where it is not. Nothing behind it is computed."""
    found: list[tuple[Any, ...]] = []

    def reached(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        found.append(arguments)
        raise _Reached

    handle = module.register_forward_pre_hook(reached)
    try:
        with contextlib.suppress(_Reached):
            output_of(layer, number, stream, device)
    finally:
        handle.remove()
    return found[0] if found else None


def input_of(layer: nn.Module, module: nn.Module, number: int, stream: Stream, device: torch.device) -> Tensor:
    """What `module` is given: (tokens, I)."""
    arguments = arguments_of(layer, module, number, stream, device)
    # None: an expert that no token was sent to.
    return torch.zeros(0, 1) if arguments is None else arguments[0].flatten(0, -2)


@torch.no_grad()
def groups_of(
    layer: nn.Module, modules: dict[str, nn.Module], number: int, stream: Stream, device: torch.device
) -> list[list[str]]:
    """Names of the modules that are given the same input, in the order in which they run."""
    seen: list[tuple[str, Tensor]] = []

    def noting(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, arguments: seen.append((name, arguments[0]))

    handles = [module.register_forward_pre_hook(noting(name)) for name, module in modules.items()]
    try:
        output_of(layer, number, stream, device)
    finally:
        for handle in handles:
            handle.remove()
    groups: list[list[str]] = []
    latest: Tensor | None = None
    for name, given in seen:
        if given is not latest:
            groups.append([])
            latest = given
        groups[-1].append(name)
    # Experts that no token of this batch was sent to.
    return groups + [[name] for name in modules if name not in dict(seen)]


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(item, device) for item in value)
    return value
