"""What `recover-lora plan` plans: a recipe on so many devices, before it is said how it is divided over them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from launch.cluster import Cluster, LocalServers, compute_dtype
from launch.probe import Product
from launch.rates import Rates, rates_of
from launch.recipe import Recipe
from recovery.config import Dtype, ModelInput, SparseLogitsTeacher
from recovery.corpus import SUMMARY
from recovery.files import read_json
from recovery.placement import linear_modules, matrices, may_be_in_pieces, select, skeleton
from recovery.rehearsal import Case, Rehearsal, pace
from recovery.tape import Phase


@dataclass(frozen=True)
class Task:
    """What is planned: a recipe on so many devices."""

    recipe: Recipe
    reference: ModelInput
    degraded: ModelInput
    dtype: Dtype
    hosts: int
    per_host: int
    rates: Rates
    tokens: int
    tokens_source: str
    same_share: float
    """Share of the degraded model's weights that equal the reference's, as far as the recipe says."""
    head_is_same: bool
    sequences: int
    """That one vLLM server decodes together."""
    serving: int
    """Devices with a server: those of all hosts, or of the first one of a Slurm allocation."""
    rehearsals: dict[tuple[bool, bool], Rehearsal] = field(default_factory=dict)
    """With or without activation checkpointing, in pieces or whole. They do not depend on the number of devices."""

    @property
    def devices(self) -> int:
        return self.hosts * self.per_host

    @property
    def width(self) -> int:
        """Bytes of an element."""
        return 2 if self.dtype == "bfloat16" else 4

    @property
    def held_out_tokens(self) -> int:
        generate, evaluate = self.recipe.generate, self.recipe.evaluate
        contexts = evaluate.contexts * evaluate.context_tokens
        return generate.held_out_samples * generate.max_length + contexts

    @property
    def steps(self) -> int:
        return max(1, math.ceil(self.tokens * self.recipe.train.epochs / self.recipe.train.batch_tokens))

    @property
    def rounds(self) -> int:
        """Micro-batches of a device in one step."""
        return math.ceil(math.ceil(self.recipe.train.batch_tokens / self.micro_tokens) / self.devices)

    @property
    def load(self) -> float:
        """The same as a share of full ones: the last of a step has what tokens are left."""
        train = self.recipe.train
        return max(
            train.batch_tokens / self.micro_tokens / self.devices, min(1.0, train.batch_tokens / self.micro_tokens)
        )

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of the samples of one micro-batch."""
        longest, train = self.recipe.generate.max_length, self.recipe.train
        return (longest,) * max(1, min(train.micro_batch_tokens, train.batch_tokens) // longest)

    @property
    def micro_tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def pace(self) -> dict[str, float]:
        """By how much a phase is slower than its roofline, where that can be measured: on this host's own devices."""
        sharing = self.rates.sharing
        if sharing is None:
            return {}
        device = torch.device("cuda" if self.rates.gpu else "cpu")
        return pace(self.case, device, lambda work: self.rates.seconds(work) / sharing)

    @cached_property
    def may_be_in_pieces(self) -> bool:
        """Whether training loads both models in pieces where ZeRO-3 divides them."""
        return all(may_be_in_pieces(model) for model in (self.degraded, self.reference))

    @property
    def case(self) -> Case:
        recipe = self.recipe
        return Case(
            self.reference,
            self.degraded,
            recipe.adapter,
            recipe.train,
            self.dtype,
            self.lengths,
            sparse_teacher(recipe),
        )

    def seconds(self, name: str, phase: Phase) -> float:
        """Of one device and micro-batch."""
        return self.rates.seconds(phase.work) * self.pace.get(name, 1.0)


def task_of(recipe: Recipe, cluster: Cluster, nodes: int | None, corpus: Path | None) -> Task:
    """Raises UserError for a model whose config is not there, and for a rate that the cluster's file lacks."""
    reference = ModelInput(path=recipe.models.reference, digest="")
    degraded = ModelInput(path=recipe.models.degraded or recipe.models.reference, digest="")
    hosts = nodes or len(cluster.hosts) or (cluster.slurm.nodes if cluster.slurm else 1)
    dtype = recipe.models.dtype
    if dtype == "auto" and (cluster.hosts or cluster.slurm) and cluster.device != "cpu":
        dtype = "bfloat16"  # of the cluster's devices, not of this host
    same, head_is_same = _same_share(recipe)
    tokens, source = corpus_tokens(recipe, corpus)
    dtype = compute_dtype(dtype, cluster)
    product = Product(recipe.train.micro_batch_tokens, *_commonest_matrix(recipe.models.reference), dtype)
    servers = cluster.servers if isinstance(cluster.servers, LocalServers) else LocalServers()
    return Task(
        recipe,
        reference,
        degraded,
        dtype,
        hosts,
        cluster.processes,
        rates_of(cluster, hosts, product),
        tokens,
        source,
        same,
        head_is_same,
        servers.sequences,
        cluster.processes * (1 if cluster.slurm is not None else hosts),
    )


def _commonest_matrix(path: str) -> tuple[int, int]:
    """(inputs, outputs) of the linear modules that most of a model's weights are in."""
    weights: Counter[tuple[int, int]] = Counter()
    for module in linear_modules(skeleton(path, None)).values():
        outputs, inputs = module.weight.shape
        weights[inputs, outputs] += inputs * outputs
    return weights.most_common(1)[0][0]


def corpus_tokens(recipe: Recipe, corpus: Path | None) -> tuple[int, str]:
    """(tokens of the training split, where the number is from)"""
    if corpus is not None and (summary := corpus / SUMMARY).is_file():
        return int(read_json(summary)["train"]["tokens"]), "of the corpus"
    return recipe.generate.samples * recipe.generate.max_length, "at most: samples x max_length"


def _same_share(recipe: Recipe) -> tuple[float, bool]:
    """(share of equal weights, whether the head is equal): of damage made here, what it leaves alone."""
    modules = getattr(recipe.degrade, "modules", None)
    if modules is None or recipe.train.parameters == "all":
        return 0.0, False
    model = skeleton(recipe.models.reference, None)
    hit = set(select(model, modules, "degrade.modules"))
    if getattr(recipe.degrade, "rest_bits", None) is not None:
        hit = set(matrices(model))
    changed = sum(weight.numel() for name, weight in matrices(model).items() if name in hit)
    return 1 - changed / sum(parameter.numel() for parameter in model.parameters()), True


def sparse_teacher(recipe: Recipe) -> SparseLogitsTeacher:
    return recipe.teacher if isinstance(recipe.teacher, SparseLogitsTeacher) else SparseLogitsTeacher()
