"""Before a repair: how much each output of the adapted matrices counts, and each token; for placement auto, where ranks
buy most."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from recovery.allocation import Spectrum, allocate, of_experts, spectrum
from recovery.calibration import batches_of, calibration_rows, places_of
from recovery.closed_form import OutputMetric
from recovery.config import RepairJob
from recovery.corpus import Tokens
from recovery.curvature import Sensitivity, sensitivities
from recovery.experts import single_names
from recovery.files import read_json, write_atomic, write_json
from recovery.layerwise import begin, layers_of
from recovery.models import device, of_first_rank
from recovery.placement import (
    check_adapter,
    counterparts,
    expert_parameters,
    linear_modules,
    matrices,
    parameter_budget,
)
from recovery.progress import progress

RANKS = "ranks.json"
OUTPUTS, TOKENS = "outputs.", "tokens."
"""What a tensor of a layer's file tells, in front of its matrix' name in the layer."""
DRAW_VARIANCE = 1.0
"""Of a token's weight with the mean 1, if its gradient were one normal number: E|z|^(4p) / (E|z|^(2p))^2 - 1 at p =
recovery.curvature.POWER. So much of what weights differ by may be noise, and is taken out of them: on SmolLM2-135M's
keys and values they keep 0.86 and 0.98, on the projections of the feed-forward network, where they would only cost
tokens, next to nothing."""
NARROWED = 0.003
"""Relative L2 of a change that may be no more than rounding to bfloat16, which is 0.0017."""
OUTPUT_DAMPING = 0.5
"""Ridge of the curvature, as a share of its mean diagonal. So much, as the estimate is one of small changes made to the
reference: on SmolLM2-135M with noise of half a standard deviation on K and V, 2.9 million parameters and 8,192 tokens,
the closed form left a KL of 0.060 at 0.2 and 0.5, 0.062 at 1 and 0.066 at 2; with noise of one, rank 24's parameters,
0.714 at 0.3 and 0.707 at 2."""


def layer_file(folder: Path, number: int) -> Path:
    return folder / f"{number:04d}.safetensors"


def differing(reference: Any, degraded: Any) -> list[str]:
    """Names of the matrices (recovery.placement) that are damaged by more than a cast to bfloat16; not the head.

    Raises UserError where the reference has other matrices.
    """
    theirs = counterparts(degraded, reference, "models.degraded")

    def damaged(weight: Tensor, right: Tensor) -> bool:
        if torch.equal(weight, right):
            return False
        # Not `>`: a difference that is no number is damage.
        return not float((weight.float() - right.float()).norm()) <= NARROWED * float(right.float().norm())

    return [name for name, weight in matrices(degraded).items() if damaged(weight, theirs[name])]


def names_by_layer(model: Any, names: Collection[str]) -> list[dict[str, str]]:
    """Of each decoder layer: full names of the matrices among `names`, by their names in the layer."""
    known = {**linear_modules(model), **expert_parameters(model)}
    wanted = {id(one): name for name, one in known.items() if name in names}
    return [
        {
            inner: wanted[id(one)]
            for inner, one in (*layer.named_modules(), *layer.named_parameters())
            if id(one) in wanted
        }
        for layer in layers_of(model)
    ]


def spectra_in(
    theirs: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    names: Mapping[str, str],
    found: Mapping[str, Sensitivity],
    damping: float,
    outputs: float,
) -> dict[str, Spectrum]:
    """By full name, of one layer's matrices that tokens came by.

    theirs, own: all weights of the reference and of the degraded model (recovery.placement.matrices). names: full ones,
    by those in `found`. Dampings as recovery.allocation has them.
    """
    spectra = {}
    for inner, name in names.items():
        right, wrong = theirs[name], own[name]
        if right.dim() == 2:
            spectra[name] = spectrum(right.to(device()), wrong.to(device()), found[inner], damping, outputs)
            continue
        each = [
            spectrum(right_OI.to(device()), wrong_OI.to(device()), found[expert], damping, outputs)
            for expert, right_OI, wrong_OI in zip(single_names(inner, len(right)), right, wrong, strict=True)
            if float(found[expert].tokens)
        ]
        if each:
            spectra[name] = of_experts(each, len(right))
    return spectra


def survey(
    reference: Any,
    degraded: Any,
    damaged: Sequence[str],
    job: RepairJob,
    tokens: Tokens,
    width: int,
    folder: Path,
    rank: int,
    ranks: int,
) -> dict[str, int]:
    """Write each layer's curvatures and weights of tokens (recovery.curvature) by matrix into the folder, unless they
    are there.

    damaged: what `differing` found. Returns the ranks by full name for placement auto, nothing for the others.
    Both models lie on the CPU; the reference has packed attention.
    """
    chosen = folder / RANKS
    known = of_first_rank(read_json(chosen) if rank == 0 and chosen.exists() else None, ranks)
    if known is not None:
        return known
    auto, leader = job.adapter.placement == "auto", rank == 0
    names = check_adapter(degraded, job.adapter)
    if auto:
        names = [name for name in names if name in damaged]
    inside = names_by_layer(reference, names)
    theirs, own = matrices(reference), matrices(degraded)
    rows = calibration_rows(tokens, job.adapter.calibration_tokens)
    batches, any_own = batches_of(tokens, rows, rank, ranks)
    streams = [begin(reference, batch) for batch in batches] if any_own else []
    folder.mkdir(parents=True, exist_ok=True)
    bar = progress(len(inside), "layer", "curvature") if leader else None
    spectra: dict[str, Spectrum] = {}
    for number, found in (
        sensitivities(reference, streams, inside, width, job.seed, device(), ranks=ranks, with_inputs=auto)
        if any(inside)
        else ()
    ):
        weights = {
            f"{TOKENS}{name}": weights_T.float().cpu()
            for name in inside[number]
            if name in found and (weights_T := token_weights(found[name], tokens, rows, ranks)) is not None
        }
        if leader:
            curvatures = {
                f"{OUTPUTS}{name}": one.curvature.float().cpu() for name, one in found.items() if float(one.tokens)
            }
            write_atomic(layer_file(folder, number), save({**curvatures, **weights}))
            if auto:
                dampings = job.adapter.damping, OUTPUT_DAMPING
                spectra |= spectra_in(theirs, own, inside[number], found, *dampings)
        if bar is not None:
            bar.update(1)
    if bar is not None:
        bar.close()
    allocated: dict[str, int] = {}
    if leader:
        budget = parameter_budget(degraded, job.adapter) if auto else 0
        # In the model's order; what no token came by, and what lies outside the layers, has no spectrum.
        allocated = allocate({name: spectra[name] for name in names if name in spectra}, budget)
        write_json(chosen, allocated)
    return of_first_rank(allocated, ranks)


def token_weights(sensitivity: Sensitivity, tokens: Tokens, rows: Sequence[int], ranks: int) -> Tensor | None:
    """(T,), 1 in the mean, of the text of all these rows; the same on every rank. None where all tokens count alike: of
    experts, of what no gradient reaches, and where nothing but the noise of a single draw tells tokens apart."""
    seen = torch.zeros((), dtype=torch.float64, device=device())
    weights_T = torch.zeros(int(tokens.lengths[list(rows)].sum()), dtype=torch.float64, device=device())
    for batch, own_T in sensitivity.weights:
        weights_T[places_of(batch, tokens, rows).to(weights_T.device)] = own_T.to(weights_T)
        seen += len(own_T)
    if ranks > 1:
        for tensor in (seen, weights_T):
            torch.distributed.all_reduce(tensor)
    if int(seen) < len(weights_T) or not float(weights_T.sum()):
        return None
    weights_T /= weights_T.mean()
    variance = float(weights_T.square().mean()) - 1
    return 1 + (1 - DRAW_VARIANCE / variance) * (weights_T - 1) if variance > DRAW_VARIANCE else None


def what_counts(
    folder: Path | None, number: int, where: torch.device
) -> tuple[dict[str, OutputMetric], dict[str, Tensor]]:
    """Of one layer's matrices by name: their outputs, and the tokens of the calibration text (T,); nothing without a
    survey, or where it had nothing to look at."""
    if folder is None or not (path := layer_file(folder, number)).exists():
        return {}, {}
    found: dict[str, Tensor] = load_file(path)
    told = {
        kind: {name.removeprefix(kind): tensor.to(where) for name, tensor in found.items() if name.startswith(kind)}
        for kind in (OUTPUTS, TOKENS)
    }
    return {name: OutputMetric(one, OUTPUT_DAMPING) for name, one in told[OUTPUTS].items()}, told[TOKENS]
