"""Degrade: damage the reference in a known, seeded way and save it as a deployable checkpoint (for studies).

    python -m recovery.degrade JOB

The paper's damage (section 4.1) is Gaussian noise on the weights of the K and V projections, saved with
`save_pretrained`. The manifest lists the L2 norm of every changed tensor.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recovery.artifacts import Workspace
from recovery.config import DegradeJob, GaussianNoise
from recovery.models import load_model
from recovery.placement import select
from recovery.progress import progress
from recovery.stage import run_stage


def noise_like(weight: Tensor, seed: int, name: str) -> Tensor:
    """Standard normal float32 noise, a function of (seed, tensor name, shape) alone: not of order or device."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    generator = np.random.Generator(np.random.Philox(key=[seed, key]))
    return torch.from_numpy(generator.standard_normal(tuple(weight.shape), dtype=np.float32))


@torch.no_grad()
def add_noise(model: Any, damage: GaussianNoise, seed: int) -> dict[str, dict[str, float]]:
    """Damage `model` in place; {tensor: {l2, relative_l2}} of the changes as they are after rounding to its dtype.

    relative_std: each matrix's noise has that many of its own standard deviations. target_l2: one standard deviation
    for all, such that the first K projection (or the first matched module, where there is none) changes by exactly
    this L2 norm before rounding (Table 1 of the paper).
    """
    names = select(model, damage.modules, "degrade.modules")
    scale = None
    if damage.target_l2 is not None:
        first = next((name for name in names if "k_proj" in name), names[0])
        weight = model.get_submodule(first).weight
        scale = damage.target_l2 / float(noise_like(weight, seed, f"{first}.weight").norm())
    changes: dict[str, dict[str, float]] = {}
    bar = progress(len(names), "tensor", "degrade")
    for name in names:
        weight = model.get_submodule(name).weight
        before = weight.float().clone()
        std = scale if scale is not None else float(before.std()) * float(damage.relative_std or 0.0)
        weight.copy_((before + std * noise_like(weight, seed, f"{name}.weight")).to(weight.dtype))
        l2 = float((weight.float() - before).norm())
        changes[f"{name}.weight"] = {"l2": l2, "relative_l2": l2 / float(before.norm())}
        bar.update()
    bar.close()
    return changes


def produce(job: DegradeJob, workspace: Workspace) -> dict[str, Any]:
    from transformers import AutoTokenizer

    model = load_model(job.reference, None, placed=False)
    changes = add_noise(model, job.damage, job.seed)
    model.save_pretrained(workspace.path)
    AutoTokenizer.from_pretrained(job.reference.path, revision=job.reference.revision).save_pretrained(workspace.path)
    return {"tensors": changes}


if __name__ == "__main__":
    run_stage(DegradeJob, produce, resumable=False, description=__doc__ or "")
