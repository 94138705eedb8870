"""Tiny random models of the paper's and other architectures, with a byte-level tokenizer, made on the spot."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

torch.set_num_threads(1)  # more cost tiny models more than they give

REPOSITORY = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("llama", "olmo", "gemma2", "qwen2", "gemma3", "phi3", "deepseek_v3", "mixtral", "qwen2_moe", "gemma4")
WITH_BOS = ("llama", "gemma2", "gemma3", "gemma4")
"""Kinds whose tokenizer puts a beginning-of-text id in front."""
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}


def make_tokenizer(*, bos: bool, extra: tuple[str, ...] = ()) -> Any:
    """256 byte tokens, begin, end and unknown. bos: put a beginning-of-text id in front, as Llama and Gemma do."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokens = ["<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *extra]
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def make_config(kind: str, vocabulary: int) -> Any:
    """MHA OLMo, GQA Llama, Gemma2 (soft caps, sliding window), Qwen2 (biases, padded head), Gemma3 (MQA, a window in
    every other layer), Phi3 (fused projections), DeepSeek-V3 (MLA, experts beside a shared one), Mixtral (experts),
    Qwen2-MoE (experts beside a shared one behind a gate of one output), Gemma4 (a layer that reads the keys and values
    of the one before it, and inputs of each layer's own)."""
    from transformers import (
        DeepseekV3Config,
        Gemma2Config,
        Gemma3TextConfig,
        Gemma4TextConfig,
        LlamaConfig,
        MixtralConfig,
        OlmoConfig,
        Phi3Config,
        Qwen2Config,
        Qwen2MoeConfig,
    )

    common: dict[str, Any] = {
        **SIZES,
        "vocab_size": vocabulary,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    common["initializer_range"] = 0.15  # random models of the usual 0.02 predict a nearly uniform distribution
    match kind:
        case "llama":
            return LlamaConfig(**common, num_key_value_heads=2, tie_word_embeddings=True)
        case "olmo":
            return OlmoConfig(**common, num_key_value_heads=4, tie_word_embeddings=False)
        case "gemma2":
            return Gemma2Config(
                **common,
                num_key_value_heads=2,
                head_dim=16,
                sliding_window=16,
                query_pre_attn_scalar=16,
                attn_logit_softcapping=5.0,
                final_logit_softcapping=10.0,
            )
        case "qwen2":
            common["vocab_size"] += 13
            return Qwen2Config(**common, num_key_value_heads=2)
        case "gemma3":
            layers = ["sliding_attention", "full_attention"]
            one_head: dict[str, Any] = {"num_key_value_heads": 1, "head_dim": 32, "query_pre_attn_scalar": 32}
            return Gemma3TextConfig(**common, **one_head, sliding_window=16, layer_types=layers)
        case "phi3":
            return Phi3Config(**common, num_key_value_heads=2)
        case "deepseek_v3":
            return DeepseekV3Config(
                **common,
                num_key_value_heads=4,
                q_lora_rank=32,
                kv_lora_rank=32,
                qk_nope_head_dim=8,
                qk_rope_head_dim=8,
                v_head_dim=16,
                n_routed_experts=4,
                num_experts_per_tok=2,
                n_group=2,
                topk_group=1,
                moe_intermediate_size=32,
                first_k_dense_replace=1,
            )
        case "mixtral":
            return MixtralConfig(**common, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
        case "qwen2_moe":
            return Qwen2MoeConfig(
                **common,
                num_key_value_heads=2,
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=64,
                shared_expert_intermediate_size=64,
            )
        case "gemma4":
            heads: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 16}
            return Gemma4TextConfig(
                **common,
                **heads,
                layer_types=["full_attention"] * 2,
                num_kv_shared_layers=1,
                hidden_size_per_layer_input=16,
                vocab_size_per_layer_input=vocabulary,
            )
    raise AssertionError(kind)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take longest first, so that no process is left with one of them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def make_model(folder: Path, kind: str = "llama", *, seed: int = 0, **tokenizer: Any) -> Path:
    """A saved model folder; returns it."""
    from transformers import AutoModelForCausalLM

    tokens = make_tokenizer(bos=kind in WITH_BOS, **tokenizer)
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(make_config(kind, len(tokens)))
    if kind == "qwen2":
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module.bias is not None:
                torch.nn.init.normal_(module.bias, std=0.1)
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One saved tiny model of each architecture."""
    folder = tmp_path_factory.mktemp("models")
    return {kind: make_model(folder / kind, kind) for kind in ARCHITECTURES}


@pytest.fixture(scope="session")
def prepared(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(model, data, runs folder with everything before cache and training); to be copied, not worked in."""
    from tests.pipeline import make_benchmarks, run_in_process, tiny_recipe

    folder = tmp_path_factory.mktemp("prepared")
    data = make_benchmarks(folder / "data")
    run_in_process(tiny_recipe(models["llama"], data), folder / "runs", until="contexts")
    return models["llama"], data, folder / "runs"


@pytest.fixture
def tiny(models: dict[str, Path]) -> Path:
    return models["llama"]
