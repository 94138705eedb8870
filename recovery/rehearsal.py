"""What a training step does, told by the model itself: the step is run on tensors that have shapes and no data.

Any architecture, its adapters and its loss go through the code that trains, so nothing is estimated by a formula of the
layers: every operation's FLOPs, the bytes it reads and writes, and what is alive at the same time are noted as they
come. It takes seconds and no memory, and neither weights nor the device that they are meant for.

`pace` takes the same steps with data, through two layers: by how much a device is slower than its roofline.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from recovery.adapters import add_adapter
from recovery.attention import use_packed_attention
from recovery.batches import Batch, collate
from recovery.config import Adapter, Dtype, ModelInput, SparseLogitsTeacher, Train
from recovery.corpus import Tokens
from recovery.engine import Student
from recovery.gated import use_gated_products
from recovery.loss import compare, distill, distill_trainable
from recovery.models import TORCH_DTYPES, causal_lm, checkpoint_activations, final_hidden, head_of, quiet_libraries
from recovery.placement import check_adapter, matrices, parameter_budget, rank_parameters, skeleton
from recovery.tape import Clock, Phase, Tape, Work
from recovery.targets import DenseTargets, SparseTargets

PACE_ROUNDS = 4


@dataclass(frozen=True)
class Case:
    """What is rehearsed: both models, what learns, and one micro-batch of samples of these lengths."""

    reference: ModelInput
    degraded: ModelInput
    """Only its config is read, as the reference's."""
    adapter: Adapter
    train: Train
    dtype: Dtype
    lengths: tuple[int, ...]
    teacher: SparseLogitsTeacher
    """How sparse targets would be."""


@dataclass(frozen=True)
class Weights:
    """Bytes of one model in the training dtype, and of its parts."""

    total: int
    elements: int
    head: int


@dataclass(frozen=True)
class Rehearsal:
    """One micro-batch of training on one device, before anything is partitioned."""

    tokens: int
    loss_tokens: int
    vocabulary: int
    student: Weights
    reference: Weights
    trainable: int
    """Parameters that learn."""
    teacher: Phase
    """The reference's forward."""
    forward: Phase
    kept: int
    """Bytes that the forward pass keeps for the backward."""
    loss: dict[str, Phase]
    """By the kind of targets: dense, sparse."""
    backward: Phase
    measure: Phase
    """A micro-batch of held-out text: both heads, behind forward passes without gradients."""

    def phases(self, targets: str, *, online: bool) -> dict[str, Phase]:
        """What training does with a micro-batch, by the names of `pace`."""
        found = {"forward": self.forward, f"loss, {targets}": self.loss[targets], "backward": self.backward}
        return {**found, "teacher": self.teacher} if online else found

    def peak(self, targets: str, *, online: bool) -> int:
        """Most bytes at once beside weights, optimizer and gradients kept from one micro-batch to the next."""
        teacher = self.teacher.peak if online else 0
        return max(
            teacher, self.forward.peak, self.kept + self.loss[targets].peak, self.backward.peak, self.measure.peak
        )


def rehearse(case: Case, *, checkpointing: bool, in_pieces: bool) -> Rehearsal:
    """The micro-batch as training would run it on one device.

    in_pieces: with the linear function that ZeRO-3 puts in place of torch's, which keeps its inputs. Raises UserError
    as loading does for an unknown architecture, and as training does for a placement that is not there.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    quiet_libraries()
    theirs, own = _models(case, checkpointing=checkpointing)
    with FakeTensorMode():
        for model in (theirs, own):
            _give_storages(model, _like)
        student, batch = _with_kernels(theirs, own), _batch(case.lengths).each(_like)
        with _linear(of_zero3=in_pieces):
            found = _noted(case, theirs, student, batch)
    return Rehearsal(
        tokens=len(batch.ids_T),
        loss_tokens=len(batch.loss_N),
        vocabulary=student.width,
        student=_weights(causal_lm(own)),
        reference=_weights(theirs),
        trainable=sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad),
        teacher=found["teacher"],
        forward=found["forward"],
        kept=found["forward"].kept,
        loss={name.removeprefix("loss, "): phase for name, phase in found.items() if name.startswith("loss, ")},
        backward=replace(found["backward"], peak=found["forward"].kept + found["backward"].peak),
        measure=found["measure"],
    )


def pace(case: Case, device: torch.device, seconds: Callable[[Work], float]) -> dict[str, float]:
    """Seconds that every phase takes on a device, over what a roofline says of it (`seconds`).

    Measured on the models' first and last layers with random weights, and whole heads: what kernels lose on matrices of
    this size, and what an operation costs that is not a product, is much the same in every layer.
    """
    quiet_libraries()
    theirs, own = _models(case, checkpointing=False, short=True)

    def filled(tensor: Tensor) -> Tensor:
        found = torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
        return found.normal_(std=0.02) if found.is_floating_point() else found

    for model in (theirs, own):
        _give_storages(model, filled)
    student, batch = _with_kernels(theirs, own), _batch(case.lengths).to(device)
    noted, clock = _noted(case, theirs, student, batch), Clock(device)
    for _ in range(PACE_ROUNDS):
        _take(clock, case, theirs, student, batch)
    return {name: taken / seconds(noted[name].work) for name, taken in clock.found.items()}


def _models(case: Case, *, checkpointing: bool, short: bool = False) -> tuple[Any, Any]:
    """(reference, what learns), without data. short: of the first and the last layer."""
    with torch.device("meta"):
        theirs, own = (_bare(model, case.dtype) for model in (case.reference, case.degraded))
        for model in (theirs, own) if short else ():
            decoder = model.get_decoder()
            decoder.layers = nn.ModuleList([decoder.layers[0], decoder.layers[-1]])
        adapted = own.requires_grad_(True) if case.train.parameters == "all" else with_adapter(own, case.adapter)
        if checkpointing:
            checkpoint_activations(adapted)
    return theirs, adapted


def _with_kernels(theirs: Any, own: Any) -> Student:
    """The student, both models with the kernels of training."""
    for model in (theirs, own):
        use_packed_attention(causal_lm(model))
        use_gated_products(causal_lm(model), probe=False)
    return Student(own, int(theirs.config.get_text_config().vocab_size))


@contextlib.contextmanager
def _linear(*, of_zero3: bool) -> Iterator[None]:
    """torch.nn.functional.linear as it is under ZeRO-3 or without; DeepSpeed leaves its own behind in a process."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    before = torch.nn.functional.linear
    torch.nn.functional.linear = zero3_linear_wrap if of_zero3 else vars(torch._C)["_nn"].linear
    try:
        yield
    finally:
        torch.nn.functional.linear = before


def _noted(case: Case, reference: Any, student: Student, batch: Batch) -> dict[str, Phase]:
    with Tape([*_tensors(reference), *_tensors(student), *_tensors(batch)]) as tape:
        _take(tape, case, reference, student, batch)
    return tape.found


def _take(recorder: Tape | Clock, case: Case, reference: Any, student: Student, batch: Batch) -> None:
    """A micro-batch, phase by phase."""
    width, count, train = student.width, len(batch.loss_N), case.train
    with recorder.phase("teacher"), torch.no_grad():
        reference_NG = final_hidden(reference, batch)[batch.loss_N]
    dense = DenseTargets(reference_NG, head_of(reference, width))
    with recorder.phase("forward"):
        hidden_NH = final_hidden(student.adapted, batch)[batch.loss_N]
    for kind, targets in (("dense", dense), ("sparse", _sparse(count, case.teacher, batch.ids_T.device))):
        if kind == "sparse" and (student.trainable_head or train.loss.kind != "forward_kl"):
            continue
        states_NH = hidden_NH.detach().requires_grad_(True)
        with recorder.phase(f"loss, {kind}"):
            if student.trainable_head:
                assert isinstance(targets, DenseTargets)
                total = distill_trainable(states_NH, student._logits, targets, width, train.loss, batch.next_N)
            else:
                total = distill(states_NH, head_of(student.adapted, width), targets, train.loss, batch.next_N)
            total.backward()
        del total, states_NH
    with recorder.phase("backward"):
        hidden_NH.backward(torch.ones_like(hidden_NH))
    del hidden_NH
    student.zero_grad(set_to_none=True)
    with recorder.phase("measure"), torch.no_grad():
        own_NH = final_hidden(student.adapted, batch)[batch.loss_N]
        compare(own_NH, head_of(student.adapted, width), dense, batch.next_N)


def cache_bytes_per_token(model: Any, dtype: Dtype) -> float:
    """Keys and values (or what an architecture has for them) that a model without data keeps for every token."""
    tokens = 16
    with torch.no_grad():
        kept = model.to(TORCH_DTYPES[dtype])(torch.zeros(1, tokens, dtype=torch.int64, device="meta"), use_cache=True)
    layers = kept.past_key_values.layers
    return sum(part.nbytes for layer in layers for part in (layer.keys, layer.values)) / tokens


def _bare(model: ModelInput, dtype: Dtype) -> Any:
    found = skeleton(model.path, model.revision).to(TORCH_DTYPES[dtype])
    return found.eval().requires_grad_(False)


def with_adapter(model: Any, adapter: Adapter) -> Any:
    """With placement auto all matrices get the same rank, or the first ones a rank of one: what the budget is spent on
    is not known yet."""
    if adapter.placement != "auto":
        return add_adapter(model, adapter, 0)
    weights = matrices(model)
    prices = {name: rank_parameters(weights[name]) for name in check_adapter(model, adapter)}
    left = parameter_budget(model, adapter)
    each = max(round(left / sum(prices.values())), 1)
    ranks: dict[str, int] = {}
    for name, price in prices.items():
        rank = min(each, *weights[name].shape[-2:])
        if not ranks or rank * price <= left:
            ranks[name] = rank
            left -= rank * price
    return add_adapter(model, adapter, 0, ranks)


def _give_storages(model: nn.Module, make: Callable[[Tensor], Tensor]) -> None:
    """Replace meta tensors by ones that are made for them; tied ones stay so."""
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            found: dict[str, Any] = store
            for name, tensor in found.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    like = make(tensor)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = tensor, nn.Parameter(like, tensor.requires_grad) if is_parameter else like
                found[name] = made[id(tensor)][1]


def _like(tensor: Tensor) -> Tensor:
    """Under a fake mode: without data, and answering as one of a CPU."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def _batch(lengths: tuple[int, ...]) -> Batch:
    """Samples of these lengths behind a beginning-of-text id, all of token 0."""
    import numpy as np

    ends = np.cumsum([0, *lengths])
    tokens = Tokens(np.arange(len(lengths)), ends, np.zeros(int(ends[-1]), dtype=np.int32), skip=1)
    return collate(tokens, tuple(range(len(lengths))))


def _sparse(count: int, teacher: SparseLogitsTeacher, device: torch.device) -> SparseTargets:
    with device:
        signal = {
            "top_ids": torch.zeros(count, teacher.top, dtype=torch.int32),
            "top_logprobs": torch.zeros(count, teacher.top, dtype=torch.float16),
            "tail_ids": torch.zeros(count, teacher.tail, dtype=torch.int32),
            "tail_logprobs": torch.zeros(count, teacher.tail, dtype=torch.float16),
            "tail_weight": torch.zeros(count),
            "rest": torch.zeros(count),
        }
    return SparseTargets.of(signal)


def _tensors(owner: Any) -> list[Tensor]:
    if isinstance(owner, nn.Module):
        return [*owner.parameters(), *owner.buffers()]
    return [value for value in vars(owner).values() if isinstance(value, Tensor)]


def _weights(model: Any) -> Weights:
    """Of the model alone, without adapters."""
    own = {name: parameter for name, parameter in model.named_parameters() if "lora_" not in name}
    return Weights(
        total=sum(parameter.nbytes for parameter in own.values()),
        elements=sum(parameter.numel() for parameter in own.values()),
        head=model.get_output_embeddings().weight.nbytes,
    )
