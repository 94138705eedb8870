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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recovery.adapters import adapter_parameters, add_adapter, save_adapter
from recovery.artifacts import Workspace
from recovery.batches import collate, pack
from recovery.closed_form import Metric, Moments
from recovery.config import Adapter, RepairJob
from recovery.corpus import TOKENIZER, Tokens, check_ids, read_split
from recovery.errors import Unavailable
from recovery.files import write_atomic
from recovery.layerwise import Stream, begin, end, groups_of, input_of, layers_of, output_of
from recovery.loss import compare as compare_distributions
from recovery.measure import Measurement, measurement_of
from recovery.models import check_training_path, device, head_of, join_ranks, load_model, share_equal
from recovery.progress import progress
from recovery.stage import run_stage
from recovery.targets import DenseTargets
from recovery.vocabulary import compare, load_vocabulary, used_width

log = logging.getLogger("recover-lora")
FORWARD_TOKENS = 2048
"""Tokens of one forward pass."""
LAYERS = ".layers"
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

    def __init__(self, reference: Any, adapted: Any, adapter: Adapter, pairs: list[Pair], ranks: int) -> None:
        self._adapter, self._pairs, self._ranks = adapter, pairs, ranks
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
        inside = {name: layer.get_submodule(name) for name in modules}
        solved: Solved = {}
        kept: dict[str, float] = {}
        groups = groups_of(layer, inside, number, stream, self._device)
        if self._ranks > 1:  # another rank's text may have been routed to other experts
            shared: list[Any] = [groups]
            torch.distributed.broadcast_object_list(shared, 0)
            groups = shared[0]
        for group in groups:
            metric = self._metric(number, group[0])
            if metric is None:
                continue
            for name in group:
                degraded_OI = modules[name].get_base_layer().weight
                reference: Any = self.reference_layers[number].get_submodule(name)
                factors = metric.factors(reference.weight, degraded_OI, self._adapter.rank, self._blend)
                solved |= {f"{name}.A": factors.a_RI.float().cpu(), f"{name}.B": factors.b_OR.float().cpu()}
                kept[name] = factors.kept
            # The next group of this layer is fed by what has just been repaired.
            self.apply(number, {key: solved[key] for name in group for key in (f"{name}.A", f"{name}.B")})
        return solved, kept

    @property
    def _blend(self) -> float:
        return self._adapter.blend if self._sequential else 0.0

    def _subject(self, number: int, pair: Pair) -> tuple[nn.Module, Stream]:
        """Whose inputs count: the student's own, or the reference's where each layer is repaired by itself."""
        if self._sequential:
            return self.student_layers[number], pair.student
        return self.reference_layers[number], pair.reference

    def _metric(self, number: int, name: str) -> Metric | None:
        """Over all ranks; None where no token came by."""
        reference = self.reference_layers[number]
        wide: Any = reference.get_submodule(name)
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
    reference: Any, adapted: Any, tokens: Tokens, rows: Sequence[int], *, measured: bool, ranks: tuple[int, int]
) -> list[Pair]:
    """This rank's share of the rows, in front of the first layer. ranks: (rank, number of ranks)."""
    rank, count = ranks
    groups = pack(list(rows), tokens.lengths, FORWARD_TOKENS)
    own = groups[rank::count]
    # A rank without text of its own goes the same way with another's, and learns nothing from it.
    batches = [collate(tokens, group) for group in own or groups[:1]]
    return [Pair(begin(reference, batch), begin(adapted, batch), measured or not own) for batch in batches]


def calibration_rows(tokens: Tokens, wanted: int) -> list[int]:
    """The first samples, until they have that many tokens: a larger calibration holds every smaller one."""
    rows: list[int] = []
    total = 0
    for row, length in enumerate(tokens.lengths.tolist()):
        if total >= wanted:
            break
        rows.append(row)
        total += length
    return rows


@torch.no_grad()
def measured(reference: Any, adapted: Any, pairs: Sequence[Pair], width: int) -> Measurement:
    """KL, top-1 agreement and perplexity of the texts that have come to the end of the layers."""
    heads = head_of(reference, width), head_of(adapted, width)
    sums, count = torch.zeros(4, dtype=torch.float64), 0
    for pair in pairs:
        batch = pair.reference.batch
        theirs_NH, own_NH = (
            end(model, stream)[batch.loss_N] for model, stream in ((reference, pair.reference), (adapted, pair.student))
        )
        sums += compare_distributions(own_NH, heads[1], DenseTargets(theirs_NH, heads[0]), batch.next_N).cpu()
        count += len(batch.next_N)
    return measurement_of(sums, count)


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
        path = folder / f"{number:04d}.safetensors"
        if path.exists():
            repair.apply(number, load_file(path))
            shares = json.loads(path.with_suffix(".json").read_text())
        else:
            solved, shares = repair.solve(number)
            if leader:
                write_atomic(path.with_suffix(".json"), json.dumps(shares))
                temporary = path.with_suffix(".tmp")
                save_file({key: tensor.contiguous() for key, tensor in solved.items()}, temporary)
                temporary.replace(path)
                tick()
        kept |= {f"{number}.{name}": share for name, share in shares.items()}
        repair.advance(number)
        repair.place(number, torch.device("cpu"))
        if bar is not None:
            bar.update(1)
    if bar is not None:
        bar.close()
    return kept


def check_better(before: Measurement, after: Measurement, adapter: Adapter) -> None:
    """Raise Unavailable for a repair that made the model worse: it is not delivered."""
    if after.kl < before.kl:
        return
    if before.kl < 1e-6:
        raise Unavailable("the degraded model gives the reference's distribution already: there is nothing to repair")
    remedy = "set adapter.init: zero"
    if adapter.init == "closed_form_sequential" and adapter.blend > 0.5:
        remedy = "set adapter.blend: 0.5, as much of the damage may lie in layers without an adapter"
    raise Unavailable(f"the closed form made held-out KL worse ({before.kl:.4f} -> {after.kl:.4f}); {remedy}")


def produce(job: RepairJob, workspace: Workspace) -> dict[str, Any]:
    # The others wait while the first rank measures the held-out text.
    rank, ranks = join_ranks("nccl" if torch.cuda.is_available() else "gloo", LONGEST_WAIT)
    vocabulary = load_vocabulary(job.reference.path, job.reference.revision)
    width = used_width(vocabulary, load_vocabulary(job.degraded.path, job.degraded.revision))
    compare(vocabulary, load_vocabulary(str(job.corpus.path / TOKENIZER), model=False), str(job.corpus.path))
    tokens, held_out = read_split(job.corpus.path, "train"), read_split(job.corpus.path, "held_out")
    check_ids(tokens, width, str(job.corpus.path))
    rows = calibration_rows(tokens, job.adapter.calibration_tokens)
    degraded = load_model(job.degraded, job.dtype, placed=False)
    reference = load_model(job.reference, job.dtype, placed=False)
    share_equal(degraded, reference)
    adapted = add_adapter(degraded, job.adapter, job.seed)
    for model, name in ((reference, "models.reference"), (adapted, "models.degraded")):
        check_training_path(model, width, name)
    both = reference, adapted
    learning = pairs_of(*both, tokens, rows, measured=False, ranks=(rank, ranks))

    def texts_to_watch() -> list[Pair]:
        return pairs_of(*both, held_out, range(len(held_out)), measured=True, ranks=(0, 1)) if rank == 0 else []

    watching = texts_to_watch()
    repair = Repair(reference, adapted, job.adapter, [*learning, *watching], ranks)
    inside = sum(len(repair.adapters_in(number)) for number in range(len(repair.student_layers)))
    parameters = adapter_parameters(adapted)
    before: Measurement | None = None
    if rank == 0:
        untouched(repair, degraded_texts := texts_to_watch())
        before = measured(*both, degraded_texts, width)
    kept = walk(repair, workspace.path / LAYERS, workspace.tick, leader=rank == 0)
    used = int(tokens.lengths[rows].sum())
    if before is not None:
        after = measured(*both, watching, width)
        log.info("held-out KL %.4f -> %.4f, top-1 %.1f%%, without training", before.kl, after.kl, 100 * after.top1)
        check_better(before, after, job.adapter)
        lines = [
            {**asdict(found), "step": 0, "tokens": tokens, "split": "held_out", "measured_tokens": found.tokens}
            for found, tokens in ((before, 0), (after, used))
        ]
        write_atomic(workspace.path / "held_out.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        weights = {name: parameter.detach().cpu() for name, parameter in parameters.items()}
        save_adapter(adapted, workspace.path, weights, base=str(job.degraded.path))
    if ranks > 1:
        torch.distributed.barrier()
    return {
        "loss_tokens": 0,
        "calibration_tokens": used,
        "steps": 0,
        "trainable_parameters": sum(parameter.numel() for parameter in parameters.values()),
        "adapted_modules": inside,
        "ranks": ranks,
        "kept": {name: round(share, 6) for name, share in kept.items()},
    }


if __name__ == "__main__":
    run_stage(RepairJob, produce, resumable=True, description=__doc__ or "")
