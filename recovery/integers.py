"""GPTQ and AWQ checkpoints: weights of a few bits in 32-bit words, unpacked without the packages that packed them.

transformers leaves both formats to packages that want a GPU or a compiler. What they store is plain:

    weight[o, i] = scales[g(i), o] (codes[i, o] - zeros[g(i), o])

I inputs, O outputs, G groups of inputs that share a scale and a zero point, W words, N anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recovery.errors import UserError
from recovery.progress import progress
from recovery.sources import layout_of, weight_files

PARTS = ("qweight", "qzeros", "scales", "g_idx")
WORD_OF_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
"""By bits: a word whose codes are all 1. Makers of GPTQ's first layout take it from whole words of zero points, so that
a zero point of 0 borrows from the next."""
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word of AWQ's each of eight neighbouring outputs lies."""


def codes_of(words_WN: Tensor, bits: int) -> Tensor:
    """int32 words to int32 codes (32 W / bits, N): every column is one stream of bits, lowest first."""
    first = torch.arange(32 * len(words_WN) // bits) * bits
    word, shift = first // 32, (first % 32)[:, None].int()
    mask = 2**bits - 1
    # An arithmetic shift repeats the sign bit, so of a code that two words share only what lies in the first is kept.
    codes = (words_WN[word] >> shift) & (mask >> (shift + bits - 32).clamp(min=0))
    shared = (shift[:, 0] + bits > 32).nonzero()[:, 0]
    codes[shared] |= (words_WN[word[shared] + 1] << (32 - shift[shared])) & mask
    return codes


def gptq_weight(
    qweight_WO: Tensor,
    qzeros_GW: Tensor,
    scales_GO: Tensor,
    groups_I: Tensor,
    *,
    less_one: bool = False,
    symmetric: bool = False,
) -> Tensor:
    """float32 (O, I), bit for bit the product above. Codes are packed along the inputs, zero points along the outputs.

    groups_I: the group of each input; in any order, where columns were quantized by importance. less_one: zero points
    are stored less one (the first layout of the format). symmetric: all are in the middle, as kernels take it; what is
    stored is not read, as makers have differed about it at 3 bits.
    """
    bits, outputs = 32 * len(qweight_WO) // len(groups_I), scales_GO.shape[1]
    if symmetric:
        zeros_GO = torch.full(scales_GO.shape, 2 ** (bits - 1), dtype=torch.int32)
    elif less_one and bits in WORD_OF_ONES:
        zeros_GO = codes_of((qzeros_GW + WORD_OF_ONES[bits]).T, bits).T[:, :outputs]
    else:
        zeros_GO = (codes_of(qzeros_GW.T, bits).T[:, :outputs] + int(less_one)) & (2**bits - 1)
    groups_I = groups_I.long()
    return (scales_GO.float()[groups_I] * (codes_of(qweight_WO, bits) - zeros_GO[groups_I])).T.contiguous()


def awq_weight(qweight_IW: Tensor, qzeros_GW: Tensor, scales_GO: Tensor) -> Tensor:
    """float32 (O, I), bit for bit the product above. Four bits, all packed along the outputs, in AWQ's own order."""

    def codes(words: Tensor) -> Tensor:
        return codes_of(words.T, 4).T.unflatten(1, (-1, 8))[..., AWQ_PLACES].flatten(1)

    groups_I = torch.arange(len(qweight_IW)) // (len(qweight_IW) // len(scales_GO))
    return (scales_GO.float()[groups_I] * (codes(qweight_IW) - codes(qzeros_GW)[groups_I])).T.contiguous()


def plain_weights(
    path: str, revision: str | None, packing: Mapping[str, Any], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """All tensors of such a checkpoint by name, the packed matrices as `<module>.weight`.

    packing: the config's quantization_config, checked (recovery.sources.check_packing). dtype: of the unpacked ones;
    None for that of their scales. Raises UserError where a part of a matrix is missing or has another shape.
    """
    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.safetensors.index.json"]
        folder = Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    from safetensors import safe_open

    weights: dict[str, Tensor] = {}
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(file, framework="pt")) for file in weight_files(folder)]
        holders: dict[str, Any] = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - no mapping
        packed = [name.removesuffix(".qweight") for name in holders if name.endswith(".qweight")]
        parts = {f"{module}.{part}" for module in packed for part in PARTS}
        bar = progress(len(packed), "matrix", "unpack")
        for module in packed:
            found = {part: holders[name].get_tensor(name) for part in PARTS if (name := f"{module}.{part}") in holders}
            try:
                weight = _weight_of(found, packing)
            except (KeyError, RuntimeError, IndexError, ZeroDivisionError) as error:
                shapes = ", ".join(f"{part} {tuple(tensor.shape)} {tensor.dtype}" for part, tensor in found.items())
                found_here = f"{module} cannot be unpacked: it has {shapes}"
                raise UserError(path, found_here, "copy or quantize the model again") from error
            weights[f"{module}.weight"] = weight.to(found["scales"].dtype if dtype is None else dtype)
            bar.update()
        bar.close()
        left = [name for name in holders if name not in parts]
        if odd := next((name for name in left if name.endswith((".qzeros", ".scales", ".g_idx"))), None):
            raise UserError(path, f"{odd} belongs to no packed matrix", "give its weights dequantized")
        weights |= {name: holders[name].get_tensor(name) for name in left}
    return weights


def _weight_of(parts: Mapping[str, Tensor], packing: Mapping[str, Any]) -> Tensor:
    codes, zeros, scales = (parts[name] for name in PARTS[:3])
    if codes.dtype != torch.int32 or zeros.dtype != torch.int32:
        raise RuntimeError("words of another width")
    if packing["quant_method"] == "awq":
        return awq_weight(codes, zeros, scales)
    inputs = 32 * len(codes) // int(packing["bits"])
    size = int(packing.get("group_size", -1))
    groups_I = parts.get("g_idx", torch.arange(inputs) // (size if size > 0 else inputs))
    less_one, symmetric = layout_of(packing) == "gptq", packing.get("sym") is True
    return gptq_weight(codes, zeros, scales, groups_I, less_one=less_one, symmetric=symmetric)
