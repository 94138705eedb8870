"""Repair: adapters in closed form, without training, from both models' weights and a few thousand tokens.

    python -m recovery.repair JOB
    torchrun --nproc-per-node 8 --module recovery.repair JOB

Goes through the decoder layer by layer, with one layer of each model on the device at a time; ranks share the tokens.
A finished layer's factors are on disk, and a restart goes on behind the last one. The formulas are
recovery.closed_form's. The artifact's folder is a PEFT adapter, with `held_out.jsonl`: KL before and after.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recovery.adapters import adapter_parameters, add_adapter, save_adapter
from recovery.artifacts import Workspace
from recovery.calibration import calibration_rows
from recovery.config import Adapter, RepairJob
from recovery.errors import Unavailable, UserError
from recovery.files import HELD_OUT, write_atomic
from recovery.measure import Measurement
from recovery.models import check_finite, check_training_path, join_ranks, load_model, share_equal
from recovery.placement import check_adapter, parameter_budget
from recovery.stage import run_stage
from recovery.survey import differing, survey
from recovery.texts import read_texts
from recovery.walk import Pair, Repair, measured, pairs_of, untouched, walk
from recovery.watch import line_of

log = logging.getLogger("recover-lora")
LAYERS = ".layers"
CURVATURE = ".curvature"
BLENDS = (1.0, 0.75, 0.5)
"""Tried where part of the damage lies in matrices without an adapter."""


def check_better(before: Measurement, after: Measurement, *, out_of_reach: bool) -> None:
    """Raise Unavailable for a repair that made the model worse: it is not delivered. out_of_reach: some of the damaged
    matrices have no adapter."""
    if after.kl < before.kl:
        return
    if before.kl < 1e-6:
        raise Unavailable("the degraded model gives the reference's distribution already: there is nothing to repair")
    remedy = "set adapter.placement: auto, as there are damaged matrices without an adapter" if out_of_reach else ""
    remedy = remedy or "diagnose both models: the damage may lie in norms, embeddings or biases; or set init: zero"
    raise Unavailable(f"the closed form made held-out KL worse ({before.kl:.4f} -> {after.kl:.4f}); {remedy}")


def blends_of(adapter: Adapter, *, out_of_reach: bool) -> tuple[float, ...]:
    """The blends to try. Where every damaged matrix has an adapter, 1 is right."""
    if adapter.init != "closed_form_sequential":
        return (0.0,)
    if adapter.blend != "auto":
        return (adapter.blend,)
    return BLENDS if out_of_reach else BLENDS[:1]


@dataclass(frozen=True)
class Solution:
    """What one blend came to, over all layers."""

    blend: float
    weights: dict[str, Tensor]
    kept: dict[str, float]
    after: Measurement | None
    """None on other ranks than the first."""


class Workshop:
    """Both models, and the texts in front of their first layer as often as they are wanted."""

    def __init__(self, job: RepairJob, workspace: Workspace) -> None:
        # The others wait while the first rank measures the held-out text.
        self.rank, self.ranks = join_ranks("nccl" if torch.cuda.is_available() else "gloo")
        self._job, self._workspace = job, workspace
        texts = read_texts(job)
        self._tokens, self._held_out, self._width = texts.train, texts.held_out, texts.width
        self._rows = calibration_rows(self._tokens, job.adapter.calibration_tokens)
        degraded = load_model(job.degraded, job.dtype, placed=False)
        self._reference = load_model(job.reference, job.dtype, placed=False)
        share_equal(degraded, self._reference)
        check_training_path(self._reference, self._width, "models.reference")
        check_finite(degraded, self._width, "models.degraded")  # before anything is weighed by what is no number
        damaged = differing(self._reference, degraded)
        weighed = job.adapter.curvature and job.adapter.init != "svd"
        self._curvature = workspace.path / CURVATURE if weighed else None
        self.allocated: dict[str, int] = {}
        if self._curvature is not None:
            given = self._reference, degraded, damaged, job, self._tokens, self._width, self._curvature
            self.allocated = survey(*given, self.rank, self.ranks)
        names = list(self.allocated) or check_adapter(degraded, job.adapter)
        if job.adapter.placement == "auto" and not self.allocated:
            if not damaged:
                raise Unavailable("no linear module of the layers differs from the reference's: nothing to repair")
            budget = parameter_budget(degraded, job.adapter)
            raise UserError("adapter.budget", f"{budget} is less than a single rank of any damaged matrix", "raise it")
        self.out_of_reach = bool(set(damaged) - set(names))
        self.blends = blends_of(job.adapter, out_of_reach=self.out_of_reach)
        self.adapted = add_adapter(degraded, job.adapter, job.seed, self.allocated or None)
        check_training_path(self.adapted, self._width, "models.degraded")
        self._initial = {name: one.detach().clone() for name, one in adapter_parameters(self.adapted).items()}

    @property
    def used_tokens(self) -> int:
        """Those that adapters are fitted on, and again those that the curvatures are of."""
        weighed = self._curvature is not None and any(self._curvature.glob("*.safetensors"))
        fitted_on = [] if self._job.adapter.init == "svd" else self._rows  # which looks at the weights alone
        return int(self._tokens.lengths[fitted_on].sum()) * (2 if weighed else 1)

    def _texts(self, *, held_out: bool) -> list[Pair]:
        both = self._reference, self.adapted
        if not held_out:
            return pairs_of(*both, self._tokens, self._rows, measured=False, rank=self.rank, ranks=self.ranks)
        if self.rank:
            return []
        return pairs_of(*both, self._held_out, range(len(self._held_out)), measured=True, rank=0, ranks=1)

    def untouched(self) -> Measurement | None:
        """Of the degraded model, on the first rank."""
        if self.rank:
            return None
        texts = self._texts(held_out=True)
        untouched(self._repair(0.0, texts), texts)
        return measured(self._reference, self.adapted, texts, self._width)

    def _repair(self, blend: float, pairs: list[Pair]) -> Repair:
        adapter, curvature = self._job.adapter, self._curvature
        return Repair(self._reference, self.adapted, adapter, blend, pairs, self.ranks, curvature)

    def solve(self, blend: float) -> Solution:
        """Walk through all layers with this blend, from where an earlier process was stopped."""
        parameters = adapter_parameters(self.adapted)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self._initial[name])
        watching = self._texts(held_out=True)
        repair = self._repair(blend, [*self._texts(held_out=False), *watching])
        folder = self._workspace.path / LAYERS / f"blend-{blend}"
        kept = walk(repair, folder, self._workspace.tick, leader=self.rank == 0)
        after = measured(self._reference, self.adapted, watching, self._width) if self.rank == 0 else None
        return Solution(blend, {name: one.detach().clone() for name, one in parameters.items()}, kept, after)


def kl_of(solution: Solution) -> float:
    """Of the held-out text; the same on other ranks, which measured none."""
    return solution.after.kl if solution.after is not None else 0.0


def produce(job: RepairJob, workspace: Workspace) -> dict[str, Any]:
    shop = Workshop(job, workspace)
    before = shop.untouched()
    solutions = [shop.solve(blend) for blend in shop.blends]
    best = min(solutions, key=kl_of)
    if before is not None and best.after is not None:
        for tried in solutions[1:] and solutions:
            log.info("blend %s: held-out KL %.4f", tried.blend, kl_of(tried))
        found = (before.kl, best.after.kl, 100 * best.after.top1)
        log.info("held-out KL %.4f -> %.4f, top-1 %.1f%%, without training", *found)
        check_better(before, best.after, out_of_reach=shop.out_of_reach)
        lines = line_of(before, 0, 0), line_of(best.after, 0, shop.used_tokens)
        write_atomic(workspace.path / HELD_OUT, "".join(lines))
        weights = {name: tensor.cpu() for name, tensor in best.weights.items()}
        save_adapter(shop.adapted, workspace.path, weights, base=str(job.degraded.path))
    if shop.ranks > 1:
        torch.distributed.barrier()
    return {
        "loss_tokens": 0,
        "calibration_tokens": shop.used_tokens,
        "steps": 0,
        "trainable_parameters": sum(tensor.numel() for tensor in best.weights.values()),
        "adapted_modules": len(best.weights) // 2,
        "ranks": shop.ranks,
        "blend": best.blend,
        "allocated": shop.allocated,
        "kept": {name: round(share, 6) for name, share in best.kept.items()},
    }


if __name__ == "__main__":
    run_stage(RepairJob, produce, resumable=True, description=__doc__ or "")
