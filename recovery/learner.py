"""What learns in training, and how it is delivered: adapters on the degraded model, or all of its parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from recovery.adapters import add_adapter, ranks_in, save_adapter, set_adapter
from recovery.config import TrainJob
from recovery.models import TORCH_DTYPES, causal_lm
from recovery.sources import load_tokenizer


def make_learner(job: TrainJob, degraded: Any) -> Any:
    """The degraded model with what learns in it requiring a gradient, as a closed form left it where there is one.

    degraded: frozen; its tensors are its own where all of them learn.
    """
    if job.train.parameters == "all":
        return degraded.requires_grad_(True)
    adapted = add_adapter(degraded, job.adapter, job.seed, None if job.start is None else ranks_in(job.start.path))
    if job.start is not None:
        set_adapter(adapted, job.start.path)
    return adapted


def compile_layers(model: Any) -> None:
    """torch.compile of everything in a layer but its attention, which takes another shape with every batch."""
    for layer in causal_lm(model).get_decoder().layers:
        for name, part in layer.named_children():
            if "attn" not in name:
                part.compile(dynamic=True)


def save_learner(job: TrainJob, model: Any, master: dict[str, Tensor], folder: Path) -> None:
    """Write what was learned: a PEFT adapter, or a checkpoint with its tokenizer.

    master: whole float32 tensors by parameter name of `model`; written in the dtype of the job.
    """
    weights = {name: tensor.to(TORCH_DTYPES[job.dtype]) for name, tensor in master.items()}
    if job.train.parameters == "adapters":
        save_adapter(model, folder, weights, base=str(job.degraded.path))
        return
    folder.mkdir(parents=True, exist_ok=True)
    own = model.state_dict()
    # Tied matrices have one parameter and two names; buffers do not learn.
    tied = {name: weights.get(name, tensor) for name, tensor in own.items()}
    for name, other in getattr(model, "all_tied_weights_keys", {}).items():
        if other in weights:
            tied[name] = weights[other]
    model.save_pretrained(folder, state_dict=tied)
    load_tokenizer(job.reference.path, job.reference.revision).save_pretrained(folder)
