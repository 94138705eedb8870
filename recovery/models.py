"""Loading models, and the training path: final hidden states and the head that turns them into logits.

T tokens, H hidden width, V logits in use.
"""

from __future__ import annotations

import datetime
import logging
import os
import warnings
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from recovery import heartbeat
from recovery.attention import Tree, use_packed_attention
from recovery.batches import Batch, collate
from recovery.config import Dtype, ModelInput
from recovery.corpus import Tokens
from recovery.environment import return_memory
from recovery.errors import UserError, first_line
from recovery.gated import use_gated_products
from recovery.head import Head
from recovery.integers import plain_weights
from recovery.partition import gathered
from recovery.sources import INTEGERS, check_packing, is_gguf, pretrained, unpacking

TORCH_DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
T = TypeVar("T")
UNKNOWN = "this architecture computes its logits in a way that this version does not know"


def quiet_libraries() -> None:
    """Silence what transformers and peft print on loading: our own progress says what happens."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("peft").setLevel(logging.ERROR)
    # PEFT imports it for every model, and it then asks for a package that only 4-bit students on a CPU would use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # PEFT looks for ranks of parameters among modules alone, though it has found and used them.
    warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys", category=RuntimeWarning)
    # PEFT asks transformers by a name that transformers has renamed.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


def device() -> torch.device:
    """This process's device. ROCm builds of torch answer to `cuda` too."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def checkpoint_activations(model: Any) -> None:
    """Compute each layer again in the backward pass. Dropout stays off, which training mode would turn on."""
    causal_lm(model).gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True


LONGEST_WAIT = datetime.timedelta(hours=12)
"""For the others: one of them may measure alone, or have the most to do."""


def join_ranks(backend: str, timeout: datetime.timedelta = LONGEST_WAIT) -> tuple[int, int]:
    """(rank, number of ranks) as torchrun gives them, joined where there are several; each has its own device."""
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        torch.distributed.init_process_group(backend, timeout=timeout)
        heartbeat.start(rank, ranks)
    return rank, ranks


def of_first_rank(value: T, ranks: int) -> T:
    """The first rank's value on every rank, so that all go the same way whatever each of them sees on its disk."""
    shared: list[Any] = [value]
    if ranks > 1:
        torch.distributed.broadcast_object_list(shared, 0)
    return shared[0]


def of_all_ranks(value: T, ranks: int) -> list[T]:
    """Every rank's value, in their order."""
    found: list[Any] = [value] * ranks
    if ranks > 1:
        torch.distributed.all_gather_object(found, value)
    return found


def attention_kind(config: Any) -> str:
    """sdpa, but eager where attention logits are soft-capped (Gemma2): the fused kernel leaves the cap out."""
    return "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"


def load_model(given: ModelInput, dtype: Dtype | None, *, placed: bool = True) -> Any:
    """A causal LM for inference, from safetensors or GGUF only, without remote code.

    Quantized weights are unpacked: they are the numbers that a packed model computes with, so that an adapter made for
    them fits it. dtype: compute type of the weights; None keeps the checkpoint's own. placed: move to this process's
    device.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    quiet_libraries()
    try:
        place, arguments = pretrained(given.path, given.revision)
        config: Any = AutoConfig.from_pretrained(place, **arguments)
        packing = check_packing(given.path, config)
        wanted = None if dtype is None else TORCH_DTYPES[dtype]
        maker: Any = AutoModelForCausalLM
        if packing.get("quant_method") in INTEGERS:
            maker, config = class_of(config, given.path)
            weights = plain_weights(given.path, given.revision, packing, wanted)
            place, packing, arguments = None, {}, {"config": config, "state_dict": weights}
        loaded: Any = maker.from_pretrained(
            place,
            **arguments,
            **unpacking(packing, placed=placed),
            dtype="auto" if wanted is None else wanted,
            attn_implementation=attention_kind(config),
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        first = first_line(error)
        raise UserError(
            given.path, f"the model cannot be loaded ({first})", "give a complete safetensors or GGUF model"
        ) from error
    model, loading = loaded
    if packing:
        model = unpacked(model, given.path)
    if wanted is not None and (packing or is_gguf(given.path)):
        # Not their buffers, nor plain models at all: transformers leaves in float32 what wants it, such as the
        # frequencies of rotary embeddings, whose angles would be off by a radian after some hundred tokens.
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(wanted)
    absent = sorted([*loading["missing_keys"], *(str(key) for key in loading["mismatched_keys"])])
    if absent:
        raise UserError(
            given.path,
            f"{len(absent)} tensors are missing or misshapen, first: {', '.join(absent[:3])}",
            "export the model again: random weights in their place could not be repaired by an adapter",
        )
    model.eval().requires_grad_(False)
    model = model.to(device()) if placed else model
    return_memory()
    return model


def class_of(config: Any, path: str) -> tuple[Any, Any]:
    """The class that AutoModelForCausalLM would choose, which wants a place where this one does not, and its config, of
    plain weights."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(path, f"a {config.model_type}, no causal language model of transformers", "give one")
    maker: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if maker.config_class is config.sub_configs.get("text_config"):  # of a model that sees, too
        config = config.get_text_config()
    config.__dict__.pop("quantization_config", None)
    return maker, config


def unpacked(model: Any, path: str) -> Any:
    """The model with plain weights, where loading has left it packed (bitsandbytes).

    Raises UserError where transformers cannot unpack this format.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        try:
            model = model.dequantize()
        except (NotImplementedError, ValueError, AttributeError, TypeError) as error:
            found = f"its quantization cannot be unpacked ({first_line(error)})"
            raise UserError(path, found, "give the weights dequantized, as safetensors") from error
    # transformers would pack the weights again when they are saved, without saying so in the config.
    model._weight_conversions = None
    return model


def share_equal(model: Any, other: Any) -> int:
    """Let `model` use the tensors of `other` that are equal to its own; returns their bytes.

    Both are frozen: a damaged model differs from its reference in few tensors, and need not be held twice.
    """
    others = dict(other.named_parameters())
    shared = 0
    for name, parameter in model.named_parameters():
        twin = others.get(name)
        if twin is not None and twin.dtype == parameter.dtype and torch.equal(twin, parameter):
            parameter.data = twin.data
            shared += parameter.nbytes
    return_memory()
    return shared


def causal_lm(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head_of(model: Any, width: int) -> Head:
    """The model's head, cut to the first `width` logits."""
    base = causal_lm(model)
    linear = cast(nn.Linear, base.get_output_embeddings())
    bias = getattr(linear, "bias", None)
    weight_VH = linear.weight.detach()
    if hasattr(linear, "get_delta_weight"):  # an adapter of PEFT's sits on it
        adapted: Any = linear
        weight_VH = weight_VH + sum(adapted.get_delta_weight(name).detach() for name in adapted.active_adapters)
    return Head(weight_VH[:width], None if bias is None else bias.detach()[:width], *logit_form(model))


def logit_form(model: Any) -> tuple[float, float | None]:
    """(factor, soft cap) of what the head gives."""
    config = causal_lm(model).config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere multiplies
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite divides
    return scale, getattr(config, "final_logit_softcapping", None)


def final_hidden(model: Any, batch: Batch, trees: tuple[Tree | None, ...] | None = None) -> Tensor:
    """Hidden states (T, H) of packed samples after the last norm, which the head multiplies.

    The model must have packed attention (recovery.attention). trees: of the samples that branch.
    """
    decoder = causal_lm(model).get_decoder()
    output = decoder(
        input_ids=batch.ids_T[None],
        position_ids=batch.positions_T[None],
        bounds=batch.bounds,
        trees=trees,
        use_cache=False,
    )
    return output.last_hidden_state[0]


def _short_samples(width: int) -> list[Tensor]:
    return [torch.arange(first, first + length) % width for first, length in ((0, 8), (3, 5), (7, 11))]


@torch.no_grad()
def check_finite(model: Any, width: int, name: str) -> Tensor:
    """The model's own logits (T, V) of some short samples, in float32. Raises UserError unless all are finite.

    The model must not have packed attention yet.
    """
    base = causal_lm(model)
    own = [base(input_ids=one[None].to(base.device), use_cache=False).logits[0] for one in _short_samples(width)]
    own_TV = torch.cat(own)[:, :width].float()
    if not bool(own_TV.isfinite().all()):
        found = "its logits are not all finite: weights that overflowed, or are not numbers"
        raise UserError(name, found, "`recover-lora diagnose` names the tensors; export it again")
    return own_TV


@torch.no_grad()
def check_training_path(model: Any, width: int, name: str) -> None:
    """Raise UserError unless head(final hidden states) of packed samples equals the model's own logits of each.

    Leaves the model with packed attention and gated products (recovery.attention, recovery.gated).
    """
    base = causal_lm(model)
    samples = _short_samples(width)
    lengths = np.array([len(sample) for sample in samples])
    tokens = Tokens(np.arange(3), np.concatenate([[0], lengths.cumsum()]), torch.cat(samples).int().numpy())
    own_TV = check_finite(model, width, name)
    use_packed_attention(base)
    use_gated_products(base)
    batch = collate(tokens, (0, 1, 2)).to(base.device)
    try:
        hidden_TH = final_hidden(model, batch)
        with gathered(list(base.get_output_embeddings().parameters())):
            ours_TV = head_of(model, width).logits(hidden_TH)
    except (TypeError, AssertionError) as error:
        raise UserError(name, f"its attention cannot be packed ({error})", UNKNOWN) from error
    tolerance = 1e-3 if hidden_TH.dtype == torch.float32 else 2.0**-6
    worst = float((own_TV - ours_TV).abs().max() / own_TV.abs().max().clamp(min=1e-6))
    if worst > tolerance:
        found = f"its logits are not head(final hidden states) of packed samples (relative difference {worst:.2g})"
        raise UserError(name, found, UNKNOWN)
