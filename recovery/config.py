"""Recipe sections and stage jobs of the core, and the base class of all jobs.

Nothing here imports torch, so that a typo in a recipe is reported within a second.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from recovery.damage_config import Damage
from recovery.errors import UserError
from recovery.settings import Config

Dtype = Literal["bfloat16", "float32"]

# ---- recipe sections -------------------------------------------------------------------------------------


class Models(Config):
    reference: str
    """Folder or hub id of the full-precision reference (safetensors)."""
    degraded: str | None = None
    """Folder or hub id of the degraded model; left out when the recipe makes its own damage (`degrade`)."""
    revision: str | None = None
    """Hub revision of the reference; a branch is resolved to its commit."""
    dtype: Dtype | Literal["auto"] = "auto"
    """Compute type of generation, training and scoring; auto is bfloat16 where the device multiplies it natively,
    else float32."""


Placement = Literal["kv", "attention", "attention_mlp", "auto"]
AdapterInit = Literal["zero", "svd", "closed_form", "closed_form_sequential"]


class Adapter(Config):
    placement: Placement | tuple[str, ...] = "kv"
    """Where the adapters sit: kv, attention, attention_mlp, whatever the architecture calls these modules, or a list of
    last parts of module names (lm_head too, where it is not tied to the input embeddings). auto: `budget` parameters
    where they save most of the damage, with a rank for each module; needs a closed form."""
    rank: PositiveInt = 64
    """With placement auto it only says what the budget is unless given."""
    budget: PositiveInt | None = None
    """Most parameters of placement auto; as many as `rank` has on keys and values, unless given."""
    alpha: PositiveInt | None = None
    """LoRA alpha; equal to the rank unless given, so that B A is applied at scale 1."""
    init: AdapterInit = "zero"
    """zero: A random, B zero, the adapted model starts as the degraded one. svd: the difference of the weights, cut to
    the rank (what LoftQ's initialisation is for given weights), to compare with. closed_form: the best change of each
    layer by itself, from both models' weights and the inputs that the reference gives the layer.
    closed_form_sequential: each layer in turn, on the inputs that the student repaired so far really gives it."""
    calibration_tokens: PositiveInt = 16384
    """Tokens of the corpus that a closed form is fitted on."""
    damping: PositiveFloat = 0.1
    """Ridge of a closed form, as a share of the mean square of a layer's inputs."""
    curvature: bool = True
    """A closed form weighs each layer's outputs, and each token, by how much the reference's distribution depends on
    them: a pass of the gradients over the same text. false: all count alike, as in QERA and EoRA."""
    blend: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = "auto"
    """Sequential closed form: the target of a layer is the reference's weights applied to this share of the reference's
    own input and for the rest of the student's. 1 makes good what earlier layers left wrong; less is better where much
    of the damage lies in matrices without an adapter. auto: 1 where there are none of these, else the best of 1, 0.75
    and 0.5 by held-out KL."""

    @property
    def effective_alpha(self) -> int:
        return self.alpha if self.alpha is not None else self.rank

    @model_validator(mode="after")
    def _auto_needs_a_closed_form(self) -> Adapter:
        if self.placement == "auto" and (self.init in ("zero", "svd") or not self.curvature):
            raise ValueError("placement auto needs init closed_form or closed_form_sequential, with curvature")
        if self.budget is not None and self.placement != "auto":
            raise ValueError("budget is for placement auto; elsewhere the rank says how many parameters there are")
        return self

    @model_validator(mode="after")
    def _scale_of_one(self) -> Adapter:
        if self.init != "zero" and self.effective_alpha != self.rank:
            raise ValueError("a closed form needs alpha equal to the rank, so that B A is the change itself")
        return self


class OnlineTeacher(Config):
    """The reference's forward runs beside the student's; no logits are kept."""

    kind: Literal["online"] = "online"


class HiddenStatesTeacher(Config):
    """The reference's final hidden states, cached on disk once: the loss makes the logits again with its head."""

    kind: Literal["hidden_states"] = "hidden_states"
    dtype: Dtype = "bfloat16"
    """Of the stored states; those of a bfloat16 model lose nothing in bfloat16."""


class SparseLogitsTeacher(Config):
    """The reference's largest probabilities and tokens drawn from the rest, cached on disk once (arXiv 2503.16870)."""

    kind: Literal["sparse_logits"] = "sparse_logits"
    top: PositiveInt = 48
    """Entries of the largest probabilities."""
    tail: PositiveInt = 16
    """Entries drawn from the others; each counts for its share of their mass, so the gradient is unbiased."""
    captured: bool = False
    """Take what vLLM servers gave with the corpus (generate.capture_logprobs) instead of running the reference:
    top is then that number, and the sampled token itself is the only draw; greedy tokens have none."""


Teacher = Annotated[OnlineTeacher | HiddenStatesTeacher | SparseLogitsTeacher, Field(discriminator="kind")]


class _Loss(Config):
    temperature: PositiveFloat = 1.0
    """Divides both models' logits; the loss is multiplied by its square."""
    cross_entropy: float = Field(default=0.0, ge=0, le=1)
    """Share of the cross-entropy with the text's own tokens, at temperature 1; the divergence has the rest. 1 is
    supervised fine-tuning, without a teacher."""


class ForwardKL(_Loss):
    """KL(reference || student), the paper's loss (equation 2)."""

    kind: Literal["forward_kl"] = "forward_kl"


class ReverseKL(_Loss):
    """KL(student || reference)."""

    kind: Literal["reverse_kl"] = "reverse_kl"


class JensenShannon(_Loss):
    """The generalized Jensen-Shannon divergence of GKD (arXiv 2306.13649, equation 1)."""

    kind: Literal["jensen_shannon"] = "jensen_shannon"
    beta: float = Field(default=0.5, gt=0, lt=1)
    """Share of the reference in the mixture that both are compared with."""


Loss = Annotated[ForwardKL | ReverseKL | JensenShannon, Field(discriminator="kind")]


class Train(Config):
    parameters: Literal["adapters", "all"] = "adapters"
    """What learns. all: every parameter of the degraded model, as in LLM-QAT, to compare with; what comes out is a
    whole model in place of an adapter, and `adapter` says nothing."""
    loss: Loss = ForwardKL()
    learning_rate: PositiveFloat = 5e-4
    epochs: NonNegativeInt = 3
    """0 with a closed form: its adapter is delivered as it is, without training."""
    warmup_steps: NonNegativeInt = 80
    """Linear warm-up over the loss tokens of that many steps, then linear decay to zero at the last token."""
    warmup_tokens: NonNegativeInt | None = None
    """The warm-up in loss tokens, whatever the size of a step; takes the place of warmup_steps."""
    batch_tokens: PositiveInt = 65536
    """Most tokens of one optimizer step over all ranks; the paper's 32 samples of 2048 tokens."""
    micro_batch_tokens: PositiveInt = 2048
    """Most tokens of one forward pass on one device; samples are packed into it without padding."""
    max_grad_norm: PositiveFloat = 1.0
    weight_decay: NonNegativeFloat = 0.0
    evaluate_every: PositiveInt = 50
    """Steps between two measurements on held-out text."""
    checkpoint_every: PositiveInt = 50
    """Steps between two checkpoints; after a kill at most this many steps are done again."""
    patience: PositiveInt | None = None
    """Measurements in a row without a lower held-out KL after which training stops; never, unless given. The adapter of
    the best measurement is delivered either way."""
    log_every: PositiveInt = 10
    """Steps between two looks at the losses, which are otherwise left on the device."""
    activation_checkpointing: bool = False
    """Trade a second forward pass for activation memory."""
    compile: bool = False
    """torch.compile the student's layers: worth its minutes on a GPU, and only in long runs."""
    deepspeed: str = "zero1"
    """A file of ds_configs/ (without .json) or a path to a DeepSpeed JSON: ZeRO stage and communication only."""


# ---- jobs ------------------------------------------------------------------------------------------------


class ModelInput(Config):
    """A model that a stage reads. Its identity is its digest, wherever it lies."""

    path: str
    """Local folder, or hub id."""
    revision: str | None = None
    """Commit, for a hub id."""
    digest: str
    """Hash of the folder's files, or `hub:<id>@<commit>`, or the artifact's identity."""


class ArtifactInput(Config):
    """A finished artifact that a stage reads. Its identity is the hash in its name."""

    path: Path
    digest: str


class LooseInput(ArtifactInput):
    """A folder from outside, without a manifest; its digest is of the files that the stage reads."""


class Tracking(Config):
    uri: str | None = None
    """None: MLFLOW_TRACKING_URI of the environment, which may hold a password and is never written down."""
    experiment: str
    run_id: str


class Runtime(Config):
    """Where and with what a job runs: never part of its identity."""

    output: Path
    """The finished artifact's folder."""
    log: Path | None = None
    tracking: Tracking | None = None


NUMERICS: dict[Dtype, int] = {"bfloat16": 1}
"""Raised where what a dtype computes with changed: its artifacts of before are not reused. 1: buffers stay as they are,
2026-11-29 (rotary frequencies were rounded)."""


class Job(Config):
    """Everything a stage reads. `identity` names the artifact: (stage, schema version, settings, inputs)."""

    stage: ClassVar[str]
    schema_version: ClassVar[int]
    runtime: Runtime

    @property
    def identity(self) -> str:
        settings = {name: _identity_of(getattr(self, name)) for name in type(self).model_fields if name != "runtime"}
        payload = {"stage": self.stage, "schema_version": self.schema_version, "job": settings}
        if (numerics := NUMERICS.get(getattr(self, "dtype", "float32"))) is not None:
            payload["numerics"] = numerics
        return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def artifact_name(self) -> str:
        return f"{self.stage}-{self.identity}"

    def inputs(self) -> dict[str, ModelInput | ArtifactInput]:
        """The inputs by field name (nested ones by dotted path)."""
        return _inputs_of(self, "")

    def to_json(self) -> str:
        payload = {
            "stage": self.stage,
            "schema_version": self.schema_version,
            "job": self.model_dump(mode="json"),
        }
        return json.dumps(payload, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_file(cls, path: Path) -> Any:
        """The job in `path`, of this class. Raises UserError for another stage's job or another schema."""
        try:
            payload = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(
                str(path), f"not a readable job file ({error})", "`run` writes it as it begins the stage"
            ) from error
        if not isinstance(payload, dict) or payload.get("stage") != cls.stage:
            found = payload.get("stage") if isinstance(payload, dict) else type(payload).__name__
            raise UserError(str(path), f"a job of stage {found!r}", f"give a job of stage {cls.stage!r}")
        if payload.get("schema_version") != cls.schema_version:
            raise UserError(
                str(path),
                f"schema version {payload.get('schema_version')}, this code has {cls.schema_version}",
                "write the job anew from its recipe",
            )
        try:
            return cls.model_validate(payload.get("job"))
        except ValueError as error:
            raise UserError(str(path), str(error), "write the job anew from its recipe") from error


def _identity_of(value: object) -> object:
    if isinstance(value, (ModelInput, ArtifactInput)):
        return value.digest
    if isinstance(value, BaseModel):
        return {name: _identity_of(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, (tuple, list)):
        return [_identity_of(item) for item in value]
    if isinstance(value, dict):
        return {key: _identity_of(item) for key, item in value.items()}
    if isinstance(value, Path):
        return str(value)
    return value


def _inputs_of(value: object, prefix: str) -> dict[str, ModelInput | ArtifactInput]:
    found: dict[str, ModelInput | ArtifactInput] = {}
    if isinstance(value, (ModelInput, ArtifactInput)):
        return {prefix: value}
    if isinstance(value, BaseModel):
        items = [(name, getattr(value, name)) for name in type(value).model_fields]
    elif isinstance(value, dict):
        items = list(value.items())
    else:
        return found
    for name, item in items:
        found.update(_inputs_of(item, f"{prefix}.{name}" if prefix else str(name)))
    return found


class DegradeJob(Job):
    stage: ClassVar[str] = "degrade"
    schema_version: ClassVar[int] = 2
    seed: int
    reference: ModelInput
    damage: Damage


class CacheJob(Job):
    stage: ClassVar[str] = "cache"
    schema_version: ClassVar[int] = 1
    seed: int
    """Of the draws from the tail; 0 where there are none, so that recipes of several seeds share a cache."""
    dtype: Dtype
    reference: ModelInput
    corpus: ArtifactInput
    contexts: ArtifactInput | None = None
    teacher: Annotated[HiddenStatesTeacher | SparseLogitsTeacher, Field(discriminator="kind")]


class AdapterJob(Job):
    """What every stage that makes an adapter reads."""

    seed: int
    dtype: Dtype
    reference: ModelInput
    degraded: ModelInput
    corpus: ArtifactInput
    adapter: Adapter


class RepairJob(AdapterJob):
    stage: ClassVar[str] = "repair"
    schema_version: ClassVar[int] = 5


class TrainJob(AdapterJob):
    stage: ClassVar[str] = "train"
    schema_version: ClassVar[int] = 4
    labelled: ArtifactInput | None = None
    """Text to learn from in place of the corpus, whose held-out split is measured on all the same."""
    contexts: ArtifactInput | None = None
    """Benchmark contexts: held-out KL is measured on them too, nothing is learned from them."""
    cache: ArtifactInput | None = None
    """The reference's signal; None with an online teacher, whose forward runs beside the student's."""
    start: ArtifactInput | None = None
    """The adapter of a closed form, with which training begins."""
    teacher: Teacher
    train: Train
    deepspeed: dict[str, Any]
    """The DeepSpeed JSON, as read from ds_configs/."""
