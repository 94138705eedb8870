"""Repair: adapters in closed form, without training, from both models' weights and a few thousand tokens.

    python -m recovery.repair JOB
    torchrun --nproc-per-node 8 --module recovery.repair JOB

Goes through the decoder layer by layer, with one layer of each model on the device at a time; ranks share the tokens.
A finished layer's factors are on disk, and a restart goes on behind the last one. The formulas are
recovery.closed_form's. The artifact's folder is a PEFT adapter, with `held_out.jsonl`: KL before and after.
"""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from recovery.adapters import adapter_parameters, add_adapter, save_adapter
from recovery.artifacts import Workspace
from recovery.calibration import batches_of, calibration_rows
from recovery.closed_form import Factors, Metric, Moments
from recovery.config import Adapter, RepairJob
from recovery.corpus import TOKENIZER, Tokens, check_ids, read_split
from recovery.errors import Unavailable, UserError
from recovery.experts import ExpertLayer, is_expert, solve_experts, together
from recovery.files import write_atomic
from recovery.layerwise import Stream, arguments_of, begin, groups_of, input_of, layers_of, output_of
from recovery.measure import Measurement, measure_streams
from recovery.models import check_training_path, device, join_ranks, load_model, share_equal
from recovery.placement import check_adapter, parameter_budget
from recovery.progress import progress
from recovery.stage import run_stage
from recovery.survey import differing, layer_file, output_metrics, survey
from recovery.vocabulary import compare, load_vocabulary, used_width
from recovery.watch import HELD_OUT

log = logging.getLogger("recover-lora")
LAYERS = ".layers"
CURVATURE = ".curvature"
BLENDS = (1.0, 0.75, 0.5)
"""Tried where part of the damage lies in matrices without an adapter."""
LONGEST_WAIT = datetime.timedelta(hours=12)
Solved = dict[str, Tensor]
"""`<module>.A` and `<module>.B` of one layer's modules."""


@dataclass
class Pair:
    """The same text on its way through both models. measured: text which teaches nothing."""

    reference: Stream
    student: Stream
    measured: bool


class Repair:
    """The walk through the layers."""

    def __init__(
        self,
        reference: Any,
        adapted: Any,
        adapter: Adapter,
        blend: float,
        pairs: list[Pair],
        ranks: int,
        curvature: Path | None,
    ) -> None:
        """curvature: the folder that recovery.survey wrote; None: all outputs count alike."""
        self._adapter, self._blend, self._pairs, self._ranks = adapter, blend, pairs, ranks
        self._curvature = curvature
        self.reference_layers, self.student_layers = layers_of(reference), layers_of(adapted)
        self._device = device()

    @property
    def _sequential(self) -> bool:
        return self._adapter.init == "closed_form_sequential"

    def adapters_in(self, number: int) -> dict[str, Any]:
        """The layer's modules with an adapter, by their names in the layer."""
        named = self.student_layers[number].named_modules()
        return {name: module for name, module in named if hasattr(module, "lora_A")}

    def solve(self, number: int) -> tuple[Solved, dict[str, float]]:
        """Find and set the factors of one layer's adapters; returns them, and the share of the change they keep."""
        modules = self.adapters_in(number)
        if not modules:
            return {}, {}
        layer, stream = self._subject(number, self._pairs[0])
        inside = {name: layer.get_submodule(name) for name, module in modules.items() if not is_expert(module)}
        solved: Solved = {}
        kept: dict[str, float] = {}
        groups = groups_of(layer, inside, number, stream, self._device)
        if self._ranks > 1:  # another rank's text may have been routed to other experts
            shared: list[Any] = [groups]
            torch.distributed.broadcast_object_list(shared, 0)
            groups = shared[0]
        outputs = output_metrics(self._curvature, number, self._device)
        for group in groups:
            metric = self._metric(number, group[0])
            if metric is None:
                continue
            for name in group:
                degraded_OI = modules[name].get_base_layer().weight
                reference: Any = self.reference_layers[number].get_submodule(name)
                rank = modules[name].r["default"]
                factors = metric.factors(reference.weight, degraded_OI, rank, self._blend, outputs.get(name))
                solved |= {f"{name}.A": factors.a_RI.float().cpu(), f"{name}.B": factors.b_OR.float().cpu()}
                kept[name] = factors.kept
            # The next group of this layer is fed by what has just been repaired.
            self.apply(number, {key: solved[key] for name in group for key in (f"{name}.A", f"{name}.B")})
        # Last in their layer; what goes up decides what goes down.
        experts = {name: module for name, module in modules.items() if is_expert(module)}
        for name in sorted(experts, key=lambda name: experts[name].parameter_name == "down_proj"):
            factors = self._solve_experts(number, name)
            a_XI, b_OX = together(factors, self._expert_layer(number, name))
            own = {f"{name}.A": a_XI, f"{name}.B": b_OX}
            self.apply(number, own)
            solved |= own
            kept |= {f"{name}.{expert}": one.kept for expert, one in enumerate(factors) if one is not None}
        return solved, kept

    def _expert_layer(self, number: int, name: str) -> ExpertLayer:
        inside = name.replace(".base_layer", "")
        return ExpertLayer(
            self.student_layers[number].get_submodule(name), self.reference_layers[number].get_submodule(inside)
        )

    def _solve_experts(self, number: int, name: str) -> list[Factors | None]:
        found = self._expert_layer(number, name)
        reference = self.reference_layers[number]
        experts = found.wrapper.get_base_layer() if self._sequential else found.reference

        def texts() -> Iterator[tuple[Any, Tensor]]:
            for pair in self._pairs:
                if pair.measured:
                    continue
                layer, stream = self._subject(number, pair)
                called = arguments_of(layer, experts, number, stream, self._device)
                theirs = called
                if self._sequential:
                    theirs = arguments_of(reference, found.reference, number, pair.reference, self._device)
                assert called is not None, "experts that are never called"
                assert theirs is not None, "experts that are never called"
                yield called, theirs[0]

        given = None if self._adapter.init == "svd" else texts
        return solve_experts(
            found, given, self._adapter.damping, self._blend, ranks=self._ranks, sequential=self._sequential
        )

    def _subject(self, number: int, pair: Pair) -> tuple[nn.Module, Stream]:
        """Whose inputs count: the student's own, or the reference's where each layer is repaired by itself."""
        if self._sequential:
            return self.student_layers[number], pair.student
        return self.reference_layers[number], pair.reference

    def _metric(self, number: int, name: str) -> Metric | None:
        """Over all ranks; None where no token came by."""
        reference = self.reference_layers[number]
        wide: Any = reference.get_submodule(name)
        if self._adapter.init == "svd":
            return Metric(Moments.alike(wide.in_features, self._device), self._adapter.damping)
        moments = Moments.zero(wide.in_features, self._device)
        for pair in self._pairs:
            if pair.measured:
                continue
            layer, stream = self._subject(number, pair)
            own_TI = input_of(layer, layer.get_submodule(name), number, stream, self._device)
            theirs_TI = own_TI
            if self._sequential:
                module = reference.get_submodule(name)
                theirs_TI = input_of(reference, module, number, pair.reference, self._device)
                if theirs_TI.shape != own_TI.shape:  # routed to other experts: no token has both
                    theirs_TI = own_TI
            if len(own_TI):
                moments.add(own_TI, theirs_TI)
        if self._ranks > 1:
            moments.all_reduce()
        return Metric(moments, self._adapter.damping) if float(moments.tokens) else None

    @torch.no_grad()
    def apply(self, number: int, solved: Solved) -> None:
        modules = self.adapters_in(number)
        for key, tensor in solved.items():
            name, _, side = key.rpartition(".")
            weight = (modules[name].lora_A if side == "A" else modules[name].lora_B)["default"].weight
            # Where nothing is wanted A keeps its random rows: with A and B both zero neither would ever learn.
            kept = tensor.any(dim=1, keepdim=True) if side == "A" else torch.ones(1, 1, dtype=torch.bool)
            weight.copy_(torch.where(kept.to(weight.device), tensor.to(weight), weight))
            if self._ranks > 1:  # the decompositions of two machines may differ in their last bits
                torch.distributed.broadcast(weight, 0)

    def advance(self, number: int, pairs: Sequence[Pair] | None = None) -> None:
        """Carry the texts (all of them, or these) through the layer, in both models."""
        for pair in self._pairs if pairs is None else pairs:
            for layers, stream in (
                (self.reference_layers, pair.reference),
                (self.student_layers, pair.student),
            ):
                stream.states_1TH = output_of(layers[number], number, stream, self._device).cpu()

    def place(self, number: int, where: torch.device) -> None:
        self.reference_layers[number].to(where)
        self.student_layers[number].to(where)


def pairs_of(
    reference: Any, adapted: Any, tokens: Tokens, rows: Sequence[int], *, measured: bool, rank: int, ranks: int
) -> list[Pair]:
    """This rank's share of the rows, in front of the first layer."""
    batches, own = batches_of(tokens, rows, rank, ranks)
    return [Pair(begin(reference, batch), begin(adapted, batch), measured or not own) for batch in batches]


def measured(reference: Any, adapted: Any, pairs: Sequence[Pair], width: int) -> Measurement:
    """Of the texts that have come to the end of the layers."""
    return measure_streams(reference, adapted, ((pair.reference, pair.student) for pair in pairs), width)


def untouched(repair: Repair, pairs: Sequence[Pair]) -> None:
    """Carry held-out texts through all layers while B is still zero: the degraded model's own result."""
    for number in range(len(repair.student_layers)):
        repair.place(number, device())
        repair.advance(number, pairs)
        repair.place(number, torch.device("cpu"))


def walk(repair: Repair, folder: Path, tick: Callable[[], None], *, leader: bool) -> dict[str, float]:
    """Solve and advance layer after layer; finished layers are read from `folder`. Returns what the factors keep."""
    kept: dict[str, float] = {}
    count = len(repair.student_layers)
    bar = progress(count, "layer", "repair") if leader else None
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        repair.place(number, device())
        path = layer_file(folder, number)
        if path.exists():
            repair.apply(number, load_file(path))
            shares = json.loads(path.with_suffix(".json").read_text())
        else:
            solved, shares = repair.solve(number)
            if leader:
                write_atomic(path.with_suffix(".json"), json.dumps(shares))
                write_atomic(path, save({key: tensor.contiguous() for key, tensor in solved.items()}))
                tick()
        kept |= {f"{number}.{name}": share for name, share in shares.items()}
        repair.advance(number)
        repair.place(number, torch.device("cpu"))
        if bar is not None:
            bar.update(1)
    if bar is not None:
        bar.close()
    return kept


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
        self.rank, self.ranks = join_ranks("nccl" if torch.cuda.is_available() else "gloo", LONGEST_WAIT)
        self._job, self._workspace = job, workspace
        vocabulary = load_vocabulary(job.reference.path, job.reference.revision)
        self._width = used_width(vocabulary, load_vocabulary(job.degraded.path, job.degraded.revision))
        compare(vocabulary, load_vocabulary(str(job.corpus.path / TOKENIZER), model=False), str(job.corpus.path))
        self._tokens, self._held_out = read_split(job.corpus.path, "train"), read_split(job.corpus.path, "held_out")
        check_ids(self._tokens, self._width, str(job.corpus.path))
        self._rows = calibration_rows(self._tokens, job.adapter.calibration_tokens)
        degraded = load_model(job.degraded, job.dtype, placed=False)
        self._reference = load_model(job.reference, job.dtype, placed=False)
        share_equal(degraded, self._reference)
        check_training_path(self._reference, self._width, "models.reference")
        damaged = differing(self._reference, degraded)
        weighed = job.adapter.curvature_tokens and job.adapter.init != "svd"
        self._curvature = workspace.path / CURVATURE if weighed else None
        self.allocated: dict[str, int] = {}
        if self._curvature is not None:
            given = self._reference, degraded, damaged, job, self._tokens, self._width, self._curvature
            self.allocated = survey(*given, self.rank, self.ranks)
        names = list(self.allocated) or check_adapter(degraded, job.adapter)
        if job.adapter.placement == "auto" and not self.allocated:
            if not set(damaged) & set(names):
                raise Unavailable("no linear module of the layers differs from the reference's: nothing to repair")
            budget = parameter_budget(degraded, job.adapter)
            raise UserError("adapter.budget", f"{budget} is less than a single rank of any damaged module", "raise it")
        self.out_of_reach = bool(set(damaged) - set(names))
        self.blends = blends_of(job.adapter, out_of_reach=self.out_of_reach)
        self.adapted = add_adapter(degraded, job.adapter, job.seed, self.allocated or None)
        check_training_path(self.adapted, self._width, "models.degraded")
        self._initial = {name: one.detach().clone() for name, one in adapter_parameters(self.adapted).items()}

    @property
    def used_tokens(self) -> int:
        return int(self._tokens.lengths[self._rows].sum())

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
        lines = [
            {**asdict(found), "step": 0, "tokens": tokens, "split": "held_out", "measured_tokens": found.tokens}
            for found, tokens in ((before, 0), (best.after, shop.used_tokens))
        ]
        write_atomic(workspace.path / HELD_OUT, "".join(json.dumps(line) + "\n" for line in lines))
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
