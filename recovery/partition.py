"""ZeRO-3 from the first byte: models are partitioned over the ranks while they are read, and gathered layer by layer.

So no device ever holds a whole model: neither the student nor a reference that only runs forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 holds this parameter in pieces and has not gathered it."""
    return hasattr(parameter, "ds_id") and parameter.numel() == 0


@contextlib.contextmanager
def partitioned_loading(config: dict[str, Any]) -> Iterator[None]:
    """Models that are loaded inside are partitioned over the ranks. config: of ZeRO-3, complete. All ranks enter it."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    known = HfDeepSpeedConfig(config)  # from_pretrained finds it through a global, for as long as it lives
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del known


def gather_with_adapters(model: nn.Module) -> bool:
    """Have ZeRO-3 gather all that lies in PEFT's wrappers of parameters together: it gathers for modules that are
    called, and such a wrapper reads the weights of A and B without a call. To be called before the engine is made.

    Returns whether there are such wrappers."""
    from deepspeed.utils import set_z3_leaf_module

    wrappers = [module for module in model.modules() if hasattr(module, "parameter_name")]
    for module in wrappers:
        set_z3_leaf_module(module, True)
    return bool(wrappers)


@contextlib.contextmanager
def gathered(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """The parameters whole while inside, on every rank; nothing to do where they are. All ranks enter it."""
    if not any(is_partitioned(parameter) for parameter in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters)):
        yield


def held_bytes(model: nn.Module) -> int:
    """Bytes of the parameters that lie on this rank."""
    return sum(
        parameter.ds_tensor.nbytes if is_partitioned(parameter) else parameter.nbytes  # pyright: ignore[reportAttributeAccessIssue] - DeepSpeed's
        for parameter in model.parameters()
    )


def shape_bytes(parameter: Tensor) -> int:
    """Bytes of the whole parameter, wherever its pieces lie."""
    return int(getattr(parameter, "ds_numel", parameter.numel())) * parameter.element_size()
