"""What runs between two points of a program: every operation's FLOPs and bytes, and what is alive (`Tape`), or how long
it takes (`Clock`)."""

from __future__ import annotations

import contextlib
import math
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

GROUPED = torch.ops.aten._grouped_mm.default
"""Products of experts, each with its own tokens."""


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
class Phase:
    """work: of one micro-batch. peak: most bytes alive in it beside the weights and what was kept before it."""

    work: Work
    peak: int
    kept: int
    """Bytes that are alive behind it and were not before."""


class Tape(TorchDispatchMode):
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


class Clock:
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
