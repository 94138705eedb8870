"""What a training step does, told by the model itself: the step is run on tensors that have shapes and no data.

Any architecture, its adapters and its loss go through the code that trains, so nothing is estimated by a formula of the
layers: every operation's FLOPs, the bytes it reads and writes, and what is alive at the same time are noted as they
come. It takes seconds and no memory, and neither weights nor the device that they are meant for.

`pace` takes the same steps with data, through two layers: by how much a device is slower than its roofline.
"""

from __future__ import annotations

import contextlib
import math
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from recovery.adapters import add_adapter
from recovery.attention import use_packed_attention
from recovery.batches import Batch, collate
from recovery.config import Adapter, Dtype, ModelInput, SparseLogitsTeacher, Train
from recovery.corpus import Tokens
from recovery.engine import Student
from recovery.gated import use_gated_products
from recovery.loss import compare, distill, distill_trainable
from recovery.models import TORCH_DTYPES, causal_lm, final_hidden, head_of, quiet_libraries
from recovery.placement import linear_modules, parameter_budget, skeleton
from recovery.targets import DenseTargets, SparseTargets

GROUPED = torch.ops.aten._grouped_mm.default
"""Products of experts, each with its own tokens."""
PACE_ROUNDS = 4


@dataclass(frozen=True)
class Work:
    """Some operations: how many there are of each (FLOPs of matrix products, bytes read and written)."""

    operations: Counter[tuple[int, int]]

    @property
    def flops(self) -> int:
        return sum(flops * count for (flops, _), count in self.operations.items())

    @property
    def kernels(self) -> int:
        return self.operations.total()

    def seconds(self, flops_s: float, bytes_s: float, launch_s: float = 0.0) -> float:
        """Each operation is bound by its products or by its bytes (the roofline), and the device by nothing less than
        launch_s an operation."""
        roofline = sum(
            max(flops / flops_s, moved / bytes_s) * count for (flops, moved), count in self.operations.items()
        )
        return max(roofline, self.kernels * launch_s)


@dataclass(frozen=True)
class Weights:
    """Bytes of one model in the training dtype, and of its parts."""

    total: int
    elements: int
    head: int


@dataclass(frozen=True)
class Phase:
    """work: of one micro-batch. peak: most bytes alive in it beside the weights and what was kept before it."""

    work: Work
    peak: int
    kept: int
    """Bytes that are alive behind it and were not before."""


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


class _Tape(TorchDispatchMode):
    """Notes every operation, and the bytes of every storage that was made since, for as long as it lives."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}
        self._operations: Counter[tuple[int, int]] = Counter()
        self.found: dict[str, Phase] = {}
        self.live = 0
        self._peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = _run_operation(func, args, kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not _is_view(func):
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            moved = sum(leaf.nbytes for leaf in (*inputs, *outputs))
            if inputs:  # an allocation moves nothing
                self._operations[_flops(func, args, kwargs, result), moved] += 1
        for output in outputs:
            self._watch(output.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += size
        self._peak = max(self._peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Notes what happens inside; its peak counts from what is alive at the beginning."""
        self._operations, before = Counter(), self.live
        self._peak = before
        yield
        self.found[name] = Phase(Work(self._operations), self._peak - before, self.live - before)


class _Clock:
    """Notes how long every phase takes; the shortest of all rounds."""

    def __init__(self, device: torch.device) -> None:
        self.found: dict[str, float] = {}
        self._device = device

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._wait()
        began = time.perf_counter()
        yield
        self._wait()
        self.found[name] = min(time.perf_counter() - began, self.found.get(name, math.inf))

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _run_operation(func: Any, args: Any, kwargs: Any) -> Any:
    """The operation itself; of experts' products torch knows the shapes in bfloat16 only, which are those of others."""
    if func is GROUPED and (dtype := args[0].dtype) != torch.bfloat16:
        return func(args[0].bfloat16(), args[1].bfloat16(), *args[2:], **kwargs).to(dtype)
    return func(*args, **kwargs)


def _is_view(func: Any) -> bool:
    """Or a question about a tensor, such as its device: nothing that runs."""
    if func.namespace == "prim":
        return True
    returns = func._schema.returns
    return bool(returns) and all(one.alias_info is not None and not one.alias_info.is_write for one in returns)


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    count = flop_registry.get(func._overloadpacket)
    if count is not None:
        return int(count(*args, **kwargs, out_val=result))
    if func is GROUPED:
        return 2 * args[0].numel() * args[1].shape[-1]
    name = func._overloadpacket.__name__
    if name.startswith("_scaled_dot_product_flash_attention_for_cpu"):
        # torch counts the GPU kernels only. Two products of L x L x D a head, five behind; half where it is causal.
        backward = name.endswith("backward")
        query, key = args[1 if backward else 0], args[2 if backward else 1]
        causal = kwargs.get("is_causal", any(argument is True for argument in args))
        products = 5 if backward else 2
        return int(products * 2 * query.numel() * key.shape[-2] * (0.5 if causal else 1.0))
    return 0


def rehearse(
    reference: ModelInput,
    degraded: ModelInput,
    adapter: Adapter,
    train: Train,
    dtype: Dtype,
    lengths: tuple[int, ...],
    teacher: SparseLogitsTeacher,
    *,
    checkpointing: bool,
    in_pieces: bool,
) -> Rehearsal:
    """A micro-batch of samples of these lengths, as training would run it on one device.

    degraded: only its config is read, as the reference's. teacher: how sparse targets would be. in_pieces: with the
    linear function that ZeRO-3 puts in place of torch's, which keeps its inputs. Raises UserError as loading does for
    an unknown architecture, and as training does for a placement that is not there.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    quiet_libraries()
    theirs, own = _models(reference, degraded, adapter, train, dtype, checkpointing=checkpointing)
    with FakeTensorMode():
        for model in (theirs, own):
            _give_storages(model, _like)
        student, batch = _with_kernels(theirs, own), _batch(lengths).each(_like)
        with _linear(of_zero3=in_pieces):
            found = _noted(theirs, student, batch, train, teacher)
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


def pace(
    reference: ModelInput,
    degraded: ModelInput,
    adapter: Adapter,
    train: Train,
    dtype: Dtype,
    lengths: tuple[int, ...],
    teacher: SparseLogitsTeacher,
    device: torch.device,
    seconds: Callable[[Work], float],
) -> dict[str, float]:
    """Seconds that every phase takes on a device, over what a roofline says of it (`seconds`).

    Measured on the models' first and last layers with random weights, and whole heads: what kernels lose on matrices of
    this size, and what an operation costs that is not a product, is much the same in every layer.
    """
    quiet_libraries()
    theirs, own = _models(reference, degraded, adapter, train, dtype, checkpointing=False, short=True)

    def filled(tensor: Tensor) -> Tensor:
        found = torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
        return found.normal_(std=0.02) if found.is_floating_point() else found

    for model in (theirs, own):
        _give_storages(model, filled)
    student, batch = _with_kernels(theirs, own), _batch(lengths).to(device)
    noted, clock = _noted(theirs, student, batch, train, teacher), _Clock(device)
    for _ in range(PACE_ROUNDS):
        _take(clock, theirs, student, batch, train, teacher)
    return {name: taken / seconds(noted[name].work) for name, taken in clock.found.items()}


def _models(
    reference: ModelInput,
    degraded: ModelInput,
    adapter: Adapter,
    train: Train,
    dtype: Dtype,
    *,
    checkpointing: bool,
    short: bool = False,
) -> tuple[Any, Any]:
    """(reference, what learns), without data. short: of the first and the last layer."""
    with torch.device("meta"):
        theirs, own = (_bare(model, dtype) for model in (reference, degraded))
        for model in (theirs, own) if short else ():
            decoder = model.get_decoder()
            decoder.layers = nn.ModuleList([decoder.layers[0], decoder.layers[-1]])
        adapted = own.requires_grad_(True) if train.parameters == "all" else _with_adapter(own, adapter)
        if checkpointing:
            causal_lm(adapted).gradient_checkpointing_enable({"use_reentrant": False})
            adapted.train()
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


def _noted(
    reference: Any, student: Student, batch: Batch, train: Train, teacher: SparseLogitsTeacher
) -> dict[str, Phase]:
    with _Tape([*_tensors(reference), *_tensors(student), *_tensors(batch)]) as tape:
        _take(tape, reference, student, batch, train, teacher)
    return tape.found


def _take(
    recorder: _Tape | _Clock,
    reference: Any,
    student: Student,
    batch: Batch,
    train: Train,
    teacher: SparseLogitsTeacher,
) -> None:
    """A micro-batch, phase by phase."""
    width, count = student.width, len(batch.loss_N)
    with recorder.phase("teacher"), torch.no_grad():
        reference_NG = final_hidden(reference, batch)[batch.loss_N]
    dense = DenseTargets(reference_NG, head_of(reference, width))
    with recorder.phase("forward"):
        hidden_NH = final_hidden(student.adapted, batch)[batch.loss_N]
    for kind, targets in (("dense", dense), ("sparse", _sparse(count, teacher, batch.ids_T.device))):
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


def _with_adapter(model: Any, adapter: Adapter) -> Any:
    """With placement auto every linear module gets the same rank: what the budget is spent on is not known yet."""
    if adapter.placement != "auto":
        return add_adapter(model, adapter, 0)
    modules = linear_modules(model)
    rank = parameter_budget(model, adapter) / sum(sum(module.weight.shape) for module in modules.values())
    return add_adapter(model, adapter, 0, {name: max(round(rank), 1) for name in modules})


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
