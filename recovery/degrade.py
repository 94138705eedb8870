"""Degrade: damage the reference in a known, seeded way and save it as a deployable checkpoint (for studies).

    python -m recovery.degrade JOB

The paper's damage (section 4.1) is Gaussian noise on the weights of the K and V projections, saved with
`save_pretrained`. The manifest lists the L2 norm of every changed tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recovery.artifacts import Workspace
from recovery.config import DegradeJob
from recovery.damage import cast, convert_badly, flipped, noise_like, pruned, rounded
from recovery.damage_config import ALL, BitFlips, Cast, ConversionBug, Damage, GaussianNoise, Pruning, Rounding
from recovery.errors import UserError
from recovery.models import load_model
from recovery.placement import matrices, select
from recovery.progress import progress
from recovery.sources import load_tokenizer
from recovery.stage import run_stage

Change = Callable[[str, Tensor], Tensor]
"""(tensor name, weight as stored) to the damaged weight, which is rounded to the stored dtype."""


def changes_of(model: Any, damage: Damage, seed: int) -> dict[str, Change]:
    """What happens to the weight of each damaged module."""
    assert not isinstance(damage, ConversionBug)
    names = select(model, damage.modules, "degrade.modules")
    if isinstance(damage, GaussianNoise):
        return dict.fromkeys(names, _noise(model, names, damage, seed))
    if isinstance(damage, Rounding):
        changes = dict.fromkeys(names, _rounding(damage, damage.bits))
        if damage.rest_bits is not None:
            rest = _rounding(damage, damage.rest_bits)
            changes |= {name: rest for name in select(model, ALL, "degrade.rest_bits") if name not in changes}
        return changes
    if isinstance(damage, Cast):
        return dict.fromkeys(names, lambda _, weight: cast(weight.float(), damage))
    if isinstance(damage, Pruning):
        return dict.fromkeys(names, lambda _, weight: pruned(weight, damage))
    assert isinstance(damage, BitFlips)
    return dict.fromkeys(names, lambda name, weight: flipped(weight, damage, seed, name))


def _noise(model: Any, names: list[str], damage: GaussianNoise, seed: int) -> Change:
    """relative_std: each matrix's noise has that many of its own standard deviations. target_l2: one standard deviation
    for all, such that the first K projection (or the first matched module, where there is none) changes by exactly
    this L2 norm before rounding (Table 1 of the paper)."""
    scale = None
    if damage.target_l2 is not None:
        first = next((name for name in names if "k_proj" in name), names[0])
        weight, tensor = matrices(model)[first], f"{first}.weight"
        if weight.dim() == 3:
            weight, tensor = weight[0], f"{first}.0"
        scale = damage.target_l2 / float(noise_like(weight, seed, tensor).norm())

    def change(name: str, weight: Tensor) -> Tensor:
        before = weight.float()
        std = scale if scale is not None else float(before.std()) * float(damage.relative_std or 0.0)
        return before + std * noise_like(weight, seed, name)

    return change


def _rounding(damage: Rounding, bits: int) -> Change:
    return lambda _, weight: rounded(weight.float(), bits, damage.group, symmetric=damage.symmetric)


@torch.no_grad()
def apply_damage(model: Any, damage: Damage, seed: int) -> dict[str, dict[str, float]]:
    """Damage `model` in place; {tensor: {l2, relative_l2}} of the changes as they are after rounding to its dtype."""
    if isinstance(damage, ConversionBug):
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        convert_badly(model, damage)
        after = model.state_dict()
        different = [name for name in before if not torch.equal(before[name], after[name])]
        if not different:
            raise UserError("degrade.bug", f"{damage.bug} changes no tensor of this model", "choose another")
        return {name: change_of(before[name], after[name]) for name in different}
    listed: dict[str, dict[str, float]] = {}
    changes = changes_of(model, damage, seed)
    bar = progress(len(changes), "tensor", "degrade")
    weights = matrices(model)
    for name, change in changes.items():
        weight, before = weights[name], weights[name].clone()
        if weight.dim() == 3:  # experts, each a matrix of its own
            tensor = name
            for expert, matrix in enumerate(weight):
                matrix.copy_(change(f"{name}.{expert}", matrix))
        else:
            tensor = f"{name}.weight"
            weight.copy_(change(tensor, weight))
        listed[tensor] = change_of(before, weight)
        bar.update()
    bar.close()
    return listed


def change_of(before: Tensor, after: Tensor) -> dict[str, float]:
    l2, norm = float((after.float() - before.float()).norm()), float(before.float().norm())
    return {"l2": l2, "relative_l2": l2 / norm if norm else 0.0}


def produce(job: DegradeJob, workspace: Workspace) -> dict[str, Any]:
    model = load_model(job.reference, None, placed=False)
    changes = apply_damage(model, job.damage, job.seed)
    model.save_pretrained(workspace.path)
    load_tokenizer(job.reference.path, job.reference.revision).save_pretrained(workspace.path)
    return {"tensors": changes}


if __name__ == "__main__":
    run_stage(DegradeJob, produce, resumable=False, description=__doc__ or "")
