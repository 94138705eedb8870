"""Loading models, and the training path: final hidden states and the head that turns them into logits.

T tokens, H hidden width, V logits in use.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from recovery.config import Dtype, ModelInput
from recovery.errors import UserError

TORCH_DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}


def quiet_libraries() -> None:
    """Silence what transformers and peft print on loading: our own progress says what happens."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("peft").setLevel(logging.ERROR)
    # PEFT asks transformers by a name that transformers has renamed.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


def device() -> torch.device:
    """This process's device. ROCm builds of torch answer to `cuda` too."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def attention_kind(config: Any) -> str:
    """sdpa, but eager where attention logits are soft-capped (Gemma2): the fused kernel leaves the cap out."""
    return "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"


def load_model(given: ModelInput, dtype: Dtype | None, *, placed: bool = True) -> Any:
    """A causal LM for inference, from safetensors only, without remote code.

    dtype: compute type of the weights; None keeps the checkpoint's own. placed: move to this process's device.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    quiet_libraries()
    try:
        config = AutoConfig.from_pretrained(given.path, revision=given.revision)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            given.path,
            revision=given.revision,
            dtype="auto" if dtype is None else TORCH_DTYPES[dtype],
            attn_implementation=attention_kind(config),
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            given.path, f"the model cannot be loaded ({first})", "give a complete safetensors model"
        ) from error
    model, loading = loaded
    absent = sorted([*loading["missing_keys"], *(str(key) for key in loading["mismatched_keys"])])
    if absent:
        raise UserError(
            given.path,
            f"{len(absent)} tensors are missing or misshapen, first: {', '.join(absent[:3])}",
            "export the model again: random weights in their place could not be repaired by an adapter",
        )
    model.eval().requires_grad_(False)
    return model.to(device()) if placed else model


@dataclass(frozen=True)
class Head:
    """What turns final hidden states (T, H) into logits (T, V): rows beyond the tokenizer's are cut off."""

    weight_VH: Tensor
    bias_V: Tensor | None
    scale: float
    softcap: float | None

    def logits(self, hidden_TH: Tensor) -> Tensor:
        """float32 logits (T, V) that were accumulated in float32, whatever the dtype of the model."""
        logits_TV = _matmul_fp32(hidden_TH, self.weight_VH)
        if self.bias_V is not None:
            logits_TV += self.bias_V.float()
        if self.scale != 1.0:
            logits_TV *= self.scale
        if self.softcap is not None:
            logits_TV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_TV

    def backward(self, gradient_TV: Tensor, logits_TV: Tensor) -> Tensor:
        """The gradient to the hidden states (T, H), float32, of a gradient to the logits (overwritten)."""
        if self.softcap is not None:
            gradient_TV *= 1 - (logits_TV / self.softcap).square()
        if self.scale != 1.0:
            gradient_TV *= self.scale
        return gradient_TV @ self.weight_VH.float()


def _matmul_fp32(hidden_TH: Tensor, weight_VH: Tensor) -> Tensor:
    if hidden_TH.dtype == weight_VH.dtype == torch.bfloat16 and hidden_TH.is_cuda:
        return torch.mm(hidden_TH, weight_VH.T, out_dtype=torch.float32)
    # CPUs have no product of bf16 factors with a float32 result; rounding logits to bf16 is what makes peers inexact.
    return hidden_TH.float() @ weight_VH.float().T


def causal_lm(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head_of(model: Any, width: int) -> Head:
    """The model's head, cut to the first `width` logits."""
    base = causal_lm(model)
    linear = cast(nn.Linear, base.get_output_embeddings())
    config = base.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere multiplies
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite divides
    bias = getattr(linear, "bias", None)
    return Head(
        linear.weight.detach()[:width],
        None if bias is None else bias.detach()[:width],
        scale,
        getattr(config, "final_logit_softcapping", None),
    )


def final_hidden(model: Any, input_ids_BT: Tensor) -> Tensor:
    """Hidden states (B, T, H) after the last norm, which the head multiplies.

    Rows are padded on the right, where a causal model cannot look: no attention mask is needed, and the padding's own
    states are never used.
    """
    decoder = causal_lm(model).get_decoder()
    return decoder(input_ids=input_ids_BT, use_cache=False).last_hidden_state


@torch.no_grad()
def check_training_path(model: Any, width: int, name: str) -> None:
    """Raise UserError unless head(final hidden states) equals the model's own logits on a few tokens."""
    base = causal_lm(model)
    ids_BT = torch.arange(8, device=base.device)[None] % width
    own_TV = base(input_ids=ids_BT, use_cache=False).logits[0, :, :width].float()
    ours_TV = head_of(model, width).logits(final_hidden(model, ids_BT)[0])
    tolerance = 1e-3 if own_TV.dtype == base.dtype else 2.0**-6
    worst = float((own_TV - ours_TV).abs().max() / own_TV.abs().max().clamp(min=1e-6))
    if worst > tolerance:
        raise UserError(
            name,
            f"its logits are not head(final hidden states) (relative difference {worst:.2g})",
            "this architecture computes logits in a way that this version does not know",
        )
