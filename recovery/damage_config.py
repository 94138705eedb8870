"""Recipe sections of damage made by the program (`degrade.kind`). Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from recovery.settings import Config

Names = tuple[str, ...]
ALL: Names = ("all",)
"""Every linear module of the decoder's layers."""


class GaussianNoise(Config):
    """The paper's damage (section 4.1): seeded Gaussian noise on the weights of chosen `nn.Linear` modules."""

    kind: Literal["gaussian_noise"] = "gaussian_noise"
    modules: Names = Field(default=("kv",), min_length=1)
    """Last parts of the names of the modules that are damaged; [kv], [attention] and [attention_mlp] as in
    adapter.placement, [all] is every linear one but the head."""
    relative_std: PositiveFloat | None = None
    """Standard deviation of the noise, in units of each weight matrix's own standard deviation."""
    target_l2: PositiveFloat | None = None
    """L2 norm of the change of the first K projection (Table 1 of the paper); every other matrix gets noise of
    the same standard deviation."""

    @model_validator(mode="after")
    def _one_strength(self) -> GaussianNoise:
        if (self.relative_std is None) == (self.target_l2 is None):
            raise ValueError("give exactly one of relative_std and target_l2")
        return self


class Rounding(Config):
    """Round-to-nearest weight quantization in groups along the input, saved dequantized."""

    kind: Literal["rounding"] = "rounding"
    modules: Names = Field(default=ALL, min_length=1)
    bits: int = Field(default=4, ge=2, le=8)
    group: PositiveInt = 64
    """Weights that share a scale; a last group may be smaller."""
    symmetric: bool = False
    """Without a zero point: levels from -(2^(bits-1) - 1) to the same above."""
    rest_bits: int | None = Field(default=None, ge=2, le=8)
    """Bits of all other linear modules of the layers; left alone where not given."""


Format = Literal[
    "mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", "mxint8", "fp8_e4m3", "fp8_e5m2", "fp16"
]


class Cast(Config):
    """Weights cast to a narrow format and back. mx*: blocks of 32 with a shared power of two (OCP Microscaling v1.0);
    fp8*: one scale a tensor; fp16: none, values beyond its range saturate."""

    kind: Literal["cast"] = "cast"
    modules: Names = Field(default=ALL, min_length=1)
    format: Format = "mxfp4"
    scale_error: PositiveFloat = 1.0
    """The stored scale is this many times the right one: below 1 large weights saturate, above 1 resolution is lost.
    With fp16, weights are multiplied by its inverse before the cast, so that a small one overflows."""
    forgotten: bool = False
    """The conversion back uses the right scale where the wrong one was stored: what was read is off by scale_error."""


class Pruning(Config):
    """The smallest weights set to zero."""

    kind: Literal["pruning"] = "pruning"
    modules: Names = Field(default=ALL, min_length=1)
    sparsity: float = Field(default=0.5, gt=0, lt=1)
    """Share of each matrix's weights that go; with `block`, of each block."""
    block: PositiveInt | None = None
    """N:M pruning: in every `block` neighbours along the input the same number goes (4 with sparsity 0.5 is 2:4)."""


class BitFlips(Config):
    """Single bits of the stored weights inverted, as by a bad disk or memory; flips to inf or nan are left out."""

    kind: Literal["bit_flips"] = "bit_flips"
    modules: Names = Field(default=ALL, min_length=1)
    rate: float = Field(default=1e-5, gt=0, le=1)
    """Share of the weights with one inverted bit."""


Bug = Literal[
    "rotary_permuted", "transposed", "swapped_gate_up", "dropped_bias", "stale_layer", "untied_head", "norm_minus_one"
]


class ConversionBug(Config):
    """What converters between formats really get wrong.

    rotary_permuted: rows of Q and K in the interleaved order of another rotary embedding. transposed: square matrices.
    swapped_gate_up: the two halves of the MLP. dropped_bias: zero. stale_layer: a layer holds the weights of the one
    before. untied_head: a head of its own, whose rows are off by one. norm_minus_one: norms as a model stores them that
    multiplies by 1 + weight (Gemma).
    """

    kind: Literal["conversion_bug"] = "conversion_bug"
    bug: Bug
    layers: tuple[NonNegativeInt, ...] | None = None
    """Numbers of the layers that are hit; every one unless given (stale_layer: the middle one)."""


Damage = Annotated[GaussianNoise | Rounding | Cast | Pruning | BitFlips | ConversionBug, Field(discriminator="kind")]
