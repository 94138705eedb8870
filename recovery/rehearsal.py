"""What a training step does, told by the model itself: the step is run on tensors that have shapes and no data.

Any architecture, its adapters and its loss go through the code that trains, so nothing is estimated by a formula of the
layers: every operation's FLOPs, the bytes it reads and writes, and what is alive at the same time are noted as they
come. It takes seconds and no memory, and neither weights nor the device that they are meant for.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Work:
    """Some operations: how many there are of each (FLOPs of matrix products, bytes read and written)."""

    operations: Counter[tuple[int, int]]

    def __add__(self, other: Work) -> Work:
        return Work(self.operations + other.operations)

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
    def phase(self, found: list[Phase]) -> Iterator[None]:
        """Appends what happens inside; its peak counts from what is alive at the beginning."""
        self._operations, before = Counter(), self.live
        self._peak = before
        yield
        found.append(Phase(Work(self._operations), self._peak - before))


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
    with torch.device("meta"):
        theirs, own = (_bare(model, dtype) for model in (reference, degraded))
        adapted = own.requires_grad_(True) if train.parameters == "all" else _with_adapter(own, adapter)
        if checkpointing:
            causal_lm(adapted).gradient_checkpointing_enable({"use_reentrant": False})
            adapted.train()
    with FakeTensorMode():
        for model in (theirs, adapted):
            _give_storages(model)
            use_packed_attention(causal_lm(model))
            use_gated_products(causal_lm(model), probe=False)
        width = int(theirs.config.get_text_config().vocab_size)
        batch = collate(_no_tokens(lengths), tuple(range(len(lengths)))).each(_like)
        with _linear_of_zero3() if in_pieces else contextlib.nullcontext():
            return _run(theirs, Student(adapted, width), batch, train, teacher)


@contextlib.contextmanager
def _linear_of_zero3() -> Iterator[None]:
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    own = torch.nn.functional.linear
    torch.nn.functional.linear = zero3_linear_wrap
    try:
        yield
    finally:
        torch.nn.functional.linear = own


def _run(reference: Any, student: Student, batch: Batch, train: Train, teacher: SparseLogitsTeacher) -> Rehearsal:
    tape = _Tape([*_tensors(reference), *_tensors(student), *_tensors(batch)])
    width, count = student.width, len(batch.loss_N)
    found: list[Phase] = []
    losses: dict[str, Phase] = {}
    with tape:
        with tape.phase(found), torch.no_grad():
            reference_NG = final_hidden(reference, batch)[batch.loss_N]
        dense = DenseTargets(reference_NG, head_of(reference, width))
        before = tape.live
        with tape.phase(found):
            hidden_NH = final_hidden(student.adapted, batch)[batch.loss_N]
        kept = tape.live - before
        for kind, targets in (("dense", dense), ("sparse", _sparse(count, teacher))):
            if kind == "sparse" and (student.trainable_head or train.loss.kind != "forward_kl"):
                continue
            states_NH = hidden_NH.detach().requires_grad_(True)
            measured: list[Phase] = []
            with tape.phase(measured):
                if student.trainable_head:
                    assert isinstance(targets, DenseTargets)
                    total = distill_trainable(states_NH, student._logits, targets, width, train.loss, batch.next_N)
                else:
                    total = distill(states_NH, head_of(student.adapted, width), targets, train.loss, batch.next_N)
                total.backward()
            losses[kind] = measured[0]
            del total, states_NH
        with tape.phase(found):
            hidden_NH.backward(torch.ones_like(hidden_NH))
        del hidden_NH
        student.zero_grad(set_to_none=True)
        with tape.phase(found), torch.no_grad():
            own_NH = final_hidden(student.adapted, batch)[batch.loss_N]
            compare(own_NH, head_of(student.adapted, width), dense, batch.next_N)
    teacher_phase, forward, backward, measure = found
    return Rehearsal(
        tokens=len(batch.ids_T),
        loss_tokens=count,
        vocabulary=width,
        student=_weights(causal_lm(student.adapted)),
        reference=_weights(reference),
        trainable=sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad),
        teacher=teacher_phase,
        forward=forward,
        kept=kept,
        loss=losses,
        backward=Phase(backward.work, kept + backward.peak),
        measure=measure,
    )


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


def _give_storages(model: nn.Module) -> None:
    """Replace meta tensors by ones of the fake mode that is on, which answer as those of a CPU; tied ones stay so."""
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            found: dict[str, Any] = store
            for name, tensor in found.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    like = _like(tensor)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = tensor, nn.Parameter(like, tensor.requires_grad) if is_parameter else like
                found[name] = made[id(tensor)][1]


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def _no_tokens(lengths: tuple[int, ...]) -> Tokens:
    """Samples of these lengths behind a beginning-of-text id, all of token 0."""
    import numpy as np

    ends = np.cumsum([0, *lengths])
    return Tokens(np.arange(len(lengths)), ends, np.zeros(int(ends[-1]), dtype=np.int32), skip=1)


def _sparse(count: int, teacher: SparseLogitsTeacher) -> SparseTargets:
    ids, weights = torch.int32, torch.float32
    return SparseTargets.of(
        {
            "top_ids": torch.empty(count, teacher.top, dtype=ids),
            "top_logprobs": torch.empty(count, teacher.top, dtype=torch.float16),
            "tail_ids": torch.empty(count, teacher.tail, dtype=ids),
            "tail_logprobs": torch.empty(count, teacher.tail, dtype=torch.float16),
            "tail_weight": torch.empty(count, dtype=weights),
            "rest": torch.empty(count, dtype=weights),
        }
    )


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
