"""The walk through the layers: every layer's adapters solved, and the texts carried through it, in both models.

One layer of each model is on the device at a time; ranks share the texts.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from recovery.calibration import batches_of, places_of
from recovery.closed_form import Factors, Metric, Moments, OutputMetric
from recovery.config import Adapter
from recovery.corpus import Tokens
from recovery.experts import ExpertLayer, is_expert, solve_experts, together
from recovery.files import read_json, write_atomic
from recovery.layerwise import Stream, arguments_of, begin, groups_of, input_of, layers_of, on_device, output_of
from recovery.measure import Measurement, measure_streams
from recovery.models import device, of_first_rank
from recovery.progress import progress
from recovery.survey import layer_file, what_counts

Solved = dict[str, Tensor]
"""`<module>.A` and `<module>.B` of one layer's modules."""


@dataclass
class Pair:
    """The same text on its way through both models. measured: text which teaches nothing."""

    reference: Stream
    student: Stream
    measured: bool
    places_T: Tensor
    """int64: where the tokens stand in the whole text, of which ranks have shares"""


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
        """curvature: the folder that recovery.survey wrote; None: all outputs and all tokens count alike."""
        self._adapter, self._blend, self._pairs, self.ranks = adapter, blend, pairs, ranks
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
        groups = of_first_rank(groups, self.ranks)  # another's text may have been routed to other experts
        outputs, weights = what_counts(self._curvature, number, self._device)
        for group in groups:
            metrics = self._metrics(number, group, weights)
            for name, metric in metrics.items():
                degraded_OI = modules[name].get_base_layer().weight
                reference: Any = self.reference_layers[number].get_submodule(name)
                rank = modules[name].r["default"]
                factors = metric.factors(reference.weight, degraded_OI, rank, self._blend, outputs.get(name))
                solved |= {f"{name}.A": factors.a_RI.float().cpu(), f"{name}.B": factors.b_OR.float().cpu()}
                kept[name] = factors.kept
            # The next group of this layer is fed by what has just been repaired.
            self.apply(number, {key: solved[key] for name in metrics for key in (f"{name}.A", f"{name}.B")})
        # Last in their layer; what goes up decides what goes down.
        experts = {name: module for name, module in modules.items() if is_expert(module)}
        for name in sorted(experts, key=lambda name: experts[name].parameter_name == "down_proj"):
            factors = self._solve_experts(number, name, outputs)
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

    def _solve_experts(self, number: int, name: str, outputs: Mapping[str, OutputMetric]) -> list[Factors | None]:
        """outputs: of the layer's matrices by name."""
        found = self._expert_layer(number, name)
        inside = f"{name.replace('.base_layer', '')}.{found.part}"
        weighed = {expert: outputs[key] for expert in range(found.count) if (key := f"{inside}.{expert}") in outputs}
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
            found, given, self._adapter.damping, self._blend, weighed, ranks=self.ranks, sequential=self._sequential
        )

    def _subject(self, number: int, pair: Pair) -> tuple[nn.Module, Stream]:
        """Whose inputs count: the student's own, or the reference's where each layer is repaired by itself."""
        if self._sequential:
            return self.student_layers[number], pair.student
        return self.reference_layers[number], pair.reference

    def _metrics(self, number: int, group: Sequence[str], weights: Mapping[str, Tensor]) -> dict[str, Metric]:
        """Of modules that are given the same input, over all ranks; of none that no token came by. weights: of the
        calibration text's tokens, by module; those without count them alike and share one metric."""
        reference, name = self.reference_layers[number], group[0]
        wide: Any = reference.get_submodule(name)
        if self._adapter.init == "svd":
            return dict.fromkeys(group, Metric(Moments.alike(wide.in_features, self._device), self._adapter.damping))
        keys = {one: one if one in weights else "" for one in group}
        moments = {key: Moments.zero(wide.in_features, self._device) for key in dict.fromkeys(keys.values())}
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
            for key, found in moments.items() if len(own_TI) else ():
                all_here = key in weights and len(own_TI) == len(pair.places_T)
                found.add(own_TI, theirs_TI, weights[key][pair.places_T.to(self._device)] if all_here else None)
        metrics: dict[str, Metric] = {}
        for key in list(moments):
            found = moments.pop(key)  # the widest matrices stand here
            if self.ranks > 1:
                found.all_reduce()
            if float(found.tokens):
                metrics[key] = Metric(found, self._adapter.damping)
        return {one: metrics[key] for one, key in keys.items() if key in metrics}

    @torch.no_grad()
    def apply(self, number: int, solved: Solved) -> None:
        modules = self.adapters_in(number)
        for key, tensor in solved.items():
            name, _, side = key.rpartition(".")
            weight = (modules[name].lora_A if side == "A" else modules[name].lora_B)["default"].weight
            # Where nothing is wanted A keeps its random rows: with A and B both zero neither would ever learn.
            kept = tensor.any(dim=1, keepdim=True) if side == "A" else torch.ones(1, 1, dtype=torch.bool)
            weight.copy_(torch.where(kept.to(weight.device), tensor.to(weight), weight))
            if self.ranks > 1:  # the decompositions of two machines may differ in their last bits
                torch.distributed.broadcast(weight, 0)

    def advance(self, number: int, pairs: Sequence[Pair] | None = None) -> None:
        """Carry the texts (all of them, or these) through the layer, in both models."""
        for pair in self._pairs if pairs is None else pairs:
            for layers, stream in (
                (self.reference_layers, pair.reference),
                (self.student_layers, pair.student),
            ):
                stream.states_1TH = output_of(layers[number], number, stream, self._device).cpu()

    def here(self, number: int) -> contextlib.AbstractContextManager[None]:
        """This layer of both models on the device."""
        return on_device(self._device, self.reference_layers[number], self.student_layers[number])


def pairs_of(
    reference: Any, adapted: Any, tokens: Tokens, rows: Sequence[int], *, measured: bool, rank: int, ranks: int
) -> list[Pair]:
    """This rank's share of the rows, in front of the first layer."""
    batches, own = batches_of(tokens, rows, rank, ranks)
    return [
        Pair(begin(reference, batch), begin(adapted, batch), measured or not own, places_of(batch, tokens, rows))
        for batch in batches
    ]


def measured(reference: Any, adapted: Any, pairs: Sequence[Pair], width: int) -> Measurement:
    """Of the texts that have come to the end of the layers."""
    return measure_streams(reference, adapted, ((pair.reference, pair.student) for pair in pairs), width)


def untouched(repair: Repair, pairs: Sequence[Pair]) -> None:
    """Carry held-out texts through all layers while B is still zero: the degraded model's own result."""
    for number in range(len(repair.student_layers)):
        with repair.here(number):
            repair.advance(number, pairs)


def _finished(path: Path) -> tuple[Solved, dict[str, float]] | None:
    """A layer that an earlier process solved: its factors, and what they keep."""
    return (load_file(path), read_json(path.with_suffix(".json"))) if path.exists() else None


def walk(repair: Repair, folder: Path, tick: Callable[[], None], *, leader: bool) -> dict[str, float]:
    """Solve and advance layer after layer; finished layers are read from `folder`. Returns what the factors keep."""
    kept: dict[str, float] = {}
    count = len(repair.student_layers)
    bar = progress(count, "layer", "repair") if leader else None
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        path = layer_file(folder, number)
        with repair.here(number):
            found = of_first_rank(_finished(path) if leader else None, repair.ranks)
            if found is not None:
                solved, shares = found
                repair.apply(number, solved)
            else:
                solved, shares = repair.solve(number)
                if leader:
                    write_atomic(path.with_suffix(".json"), json.dumps(shares))
                    write_atomic(path, save({key: tensor.contiguous() for key, tensor in solved.items()}))
                    tick()
            repair.advance(number)
        kept |= {f"{number}.{name}": share for name, share in shares.items()}
        if bar is not None:
            bar.update(1)
    if bar is not None:
        bar.close()
    return kept
