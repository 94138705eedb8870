"""Checkpoints as other tools leave them: FP8, NF4, GPTQ and AWQ folders, and GGUF files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FP8_BLOCK = 32


def copy_small_files(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, target)


def write_fp8(source: Path, target: Path) -> dict[str, Tensor]:
    """Projections in e4m3 with one scale a block, as DeepSeek stores them; returns what they stand for."""
    copy_small_files(source, target)
    stored, meant = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        if "proj" not in name:
            stored[name] = weight
            continue
        rows, columns = (-(-size // FP8_BLOCK) for size in weight.shape)
        scales, codes = torch.zeros(rows, columns), torch.empty_like(weight, dtype=torch.float8_e4m3fn)
        meant[name] = torch.empty_like(weight)
        for row, column in np.ndindex(rows, columns):
            part = tuple(slice(place * FP8_BLOCK, (place + 1) * FP8_BLOCK) for place in (row, column))
            scales[row, column] = weight[part].abs().max() / 448
            codes[part] = (weight[part] / scales[row, column]).to(torch.float8_e4m3fn)
            meant[name][part] = codes[part].float() * scales[row, column]
        stored |= {name: codes, f"{name}_scale_inv": scales}
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
    }
    (target / "config.json").write_text(json.dumps(config))
    return meant


def write_nf4(source: Path, target: Path) -> None:
    """As QLoRA stores its base."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model: Any = AutoModelForCausalLM.from_pretrained(source, quantization_config=four_bits, dtype=torch.float32)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


GROUP = 32
ONES = {2: 0x55555555, 3: 0b00100100100100100100100100100100, 4: 0x11111111, 8: 0x01010101}
"""What GPTQModel takes from every word of zero points in the first layout; at 3 bits it does not line up with them."""


def rounded(weight_OI: Tensor, bits: int, groups_I: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes (I, O) int64, zero points (G, O) int64, scales (G, O) float16) of round-to-nearest; the first output's
    zero points are 0."""
    most, zeros, scales = 2**bits - 1, [], []
    for group in range(int(groups_I.max()) + 1):
        columns_OG = weight_OI[:, groups_I == group].float()
        low_O, high_O = columns_OG.amin(1).clamp(max=0.0), columns_OG.amax(1).clamp(min=0.0)
        scales.append(((high_O - low_O) / most).half())
        zeros.append((-low_O / scales[-1].float()).round().long().clamp(0, most))
        zeros[-1][0] = 0
    scales_GO, zeros_GO = torch.stack(scales), torch.stack(zeros)
    codes_IO = (weight_OI.float().T / scales_GO.float()[groups_I]).round().long() + zeros_GO[groups_I]
    return codes_IO.clamp(0, most), zeros_GO, scales_GO


def words(codes_NM: Tensor, bits: int) -> Tensor:
    """int32, each column of codes as one stream of bits, through numpy's own packing."""
    columns_MN = np.ascontiguousarray(codes_NM.numpy().T.astype(np.uint8))
    stream = np.unpackbits(columns_MN[..., None], axis=2, count=bits, bitorder="little").reshape(len(columns_MN), -1)
    return torch.from_numpy(np.packbits(stream, axis=1, bitorder="little").view("<i4").T.copy())


def write_integers(source: Path, target: Path, method: str, bits: int = 4, **more: Any) -> dict[str, Tensor]:
    """Projections as GPTQ (columns grouped in a random order, as by importance) or AWQ store them; returns what they
    stand for. more: of the quantization config."""
    copy_small_files(source, target)
    stored, meant = {}, {}
    generator = torch.Generator().manual_seed(0)
    for name, weight in load_file(source / "model.safetensors").items():
        if not name.endswith(("proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")):
            stored[name] = weight
            continue
        module, inputs = name.removesuffix(".weight"), weight.shape[1]
        groups_I = torch.arange(inputs) // GROUP
        if method == "gptq":
            groups_I = groups_I[torch.randperm(inputs, generator=generator)]
        codes_IO, zeros_GO, scales_GO = rounded(weight, bits, groups_I)
        if more.get("sym"):
            zeros_GO = torch.full_like(zeros_GO, 2 ** (bits - 1))
        meant[name] = (scales_GO.float()[groups_I] * (codes_IO - zeros_GO[groups_I])).T
        if method == "gptq":
            zeros = words(zeros_GO.T, bits).T.contiguous()
            if "gptq_v2" not in more.values():
                zeros -= ONES[bits]
            packed = words(codes_IO, bits), zeros
            stored[f"{module}.g_idx"] = groups_I.int()
        else:
            # The order in which AutoAWQ puts eight neighbouring outputs into a word.
            order = [0, 2, 4, 6, 1, 3, 5, 7]
            packed = tuple(
                words(one.unflatten(1, (-1, 8))[..., order].flatten(1).T, 4).T.contiguous()
                for one in (codes_IO, zeros_GO)
            )
        stored |= {f"{module}.qweight": packed[0], f"{module}.qzeros": packed[1], f"{module}.scales": scales_GO}
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": bits, "group_size": GROUP, **more}
    (target / "config.json").write_text(json.dumps(config))
    return meant


NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(source: Path, target: Path, kind: str = "Q4_0") -> dict[str, Tensor]:
    """A Llama as llama.cpp's converter writes it, Q and K in the order of its rotary embedding; projections of this
    kind. Returns what they stand for."""
    import gguf
    from gguf.quants import dequantize, quantize

    config = json.loads((source / "config.json").read_text())
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    ids = tokenizer["model"]["vocab"]
    tokens = sorted(ids, key=ids.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    special = {added["content"] for added in tokenizer["added_tokens"]}
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges(["a b"])  # there must be one, and its token (make_model(extra=("ab",)))
    writer.add_bos_token_id(ids["<s>"])
    writer.add_eos_token_id(ids["</s>"])
    writer.add_unk_token_id(ids["<unk>"])
    writer.add_pad_token_id(ids["</s>"])
    form, meant = gguf.GGMLQuantizationType[kind], {}
    for name, weight in load_file(source / "model.safetensors").items():
        short = name.removeprefix("model.").removesuffix(".weight")
        values = weight.float().numpy()
        if not short.startswith("layers."):
            place = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[short]
            writer.add_tensor(f"{place}.weight", values)
            continue
        _, layer, part = short.split(".", 2)
        heads = {"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}.get(part)
        count = config[heads] if heads is not None else 1
        if heads is not None:
            values = values.reshape(count, 2, values.shape[0] // count // 2, -1).swapaxes(1, 2).reshape(values.shape)
        place = f"blk.{layer}.{NAMES[part]}.weight"
        if "proj" not in part:
            writer.add_tensor(place, values)
            continue
        codes = quantize(np.ascontiguousarray(values), form)
        writer.add_tensor(place, codes, raw_dtype=form)
        read = dequantize(codes, form)
        if heads is not None:
            read = read.reshape(count, read.shape[0] // count // 2, 2, -1).swapaxes(1, 2).reshape(read.shape)
        meant[name] = torch.from_numpy(np.ascontiguousarray(read))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant
