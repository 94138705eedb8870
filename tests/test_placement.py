"""Placements: which modules they mean, and how an adapter's file names them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3Config

from recovery.adapters import adapter_parameters, add_adapter, load_adapter, save_adapter
from recovery.config import Adapter
from recovery.placement import matrices, select


@pytest.fixture
def with_tower() -> Any:
    """Gemma 3 with a tower for images, whose modules have the names of the decoder's."""
    torch.manual_seed(0)
    text: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    tokens: dict[str, Any] = {"mm_tokens_per_image": 4, "image_token_index": 60}
    tokens |= {"boi_token_index": 61, "eoi_token_index": 62}
    return AutoModelForCausalLM.from_config(Gemma3Config(text_config=text, vision_config=vision, **tokens))


def test_a_tower_for_images_is_no_part_of_any_placement(with_tower: Any, tmp_path: Path):
    assert any("vision" in name and name.endswith("k_proj") for name, _ in with_tower.named_modules())
    names = select(with_tower, ["kv"], "adapter.placement")
    assert len(names) == 4
    assert not any("vision" in name for name in matrices(with_tower, head=True))
    adapted = add_adapter(with_tower, Adapter(placement="kv", rank=2), seed=0)
    save_adapter(adapted, tmp_path, dict(adapter_parameters(adapted)), "base")
    # Short names would put adapters on the tower too when it is loaded.
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == sorted(names)
    again = load_adapter(adapted.unload(), tmp_path)
    assert sum(hasattr(module, "lora_A") for module in again.modules()) == 4
