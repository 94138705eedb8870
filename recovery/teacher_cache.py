"""The teacher cache: the reference's signal for every loss position of a corpus, on disk.

    <cache>/train/block-00000.safetensors      consecutive rows of the corpus, in the form that `teacher.kind` chose
    <cache>/held_out/block-00000.safetensors   hidden states always: what is measured, is measured exactly
    <cache>/contexts/block-00000.safetensors   the same for the benchmark contexts
    <cache>/head.safetensors, head.json        the reference's output head, so that training needs no more of it

A block, R rows with P loss positions in all (G hidden width, K largest, M drawn):

    index       int64  (R)       global index of the row
    row_sha256  uint8  (R, 32)   of its token ids: binds the signal to its tokens
    crc32       int64  (R)       of its part of the tensors below, checked whenever it is read
    offsets     int64  (R + 1)   row r owns the positions offsets[r] .. offsets[r + 1]

    hidden      (P, G)           hidden_states: after the last norm, in `teacher.dtype`

    top_ids, top_logprobs        int32, float16 (P, K)       sparse_logits: nats
    tail_ids, tail_logprobs      int32, float16 (P, M)
    tail_weight                  float32 (P)                 of every drawn entry; 0: none, the position is biased
    rest                         float32 (P)                 exact probability outside the K

Which rows a block has depends on the corpus alone, so any number of ranks writes the same files.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recovery.batches import Batch, loss_positions
from recovery.config import HiddenStatesTeacher, SparseLogitsTeacher
from recovery.corpus import Tokens
from recovery.errors import DamagedArtifact
from recovery.files import read_json, write_atomic, write_json
from recovery.head import Head
from recovery.targets import DenseTargets, SparseTargets
from recovery.teacher_signal import hash_row

BLOCK_BYTES = 1 << 28
"""Most of a block."""
BLOCKS = 64
"""Blocks of a split that is large enough for them, so that as many ranks have work."""
SMALL_BYTES = 1 << 14
"""A split is not cut into smaller blocks than this."""
OPEN_BLOCKS = 64
HIDDEN = ("hidden",)
SPARSE = ("top_ids", "top_logprobs", "tail_ids", "tail_logprobs", "tail_weight", "rest")
ROWS = ("index", "row_sha256", "crc32", "offsets")
SCALARS = ("tail_weight", "rest")
"""One number a position."""
DTYPES = {
    "hidden": ("BF16", "F32"),
    "top_ids": ("I32",),
    "top_logprobs": ("F16",),
    "tail_ids": ("I32",),
    "tail_logprobs": ("F16",),
    "tail_weight": ("F32",),
    "rest": ("F32",),
}


def bytes_per_token(teacher: HiddenStatesTeacher | SparseLogitsTeacher, hidden_width: int) -> int:
    """Of the signal itself; a row adds 56 bytes."""
    if isinstance(teacher, HiddenStatesTeacher):
        return hidden_width * (2 if teacher.dtype == "bfloat16" else 4)
    return 6 * (teacher.top + teacher.tail) + 8


def blocks_of(tokens: Tokens, token_bytes: int) -> list[range]:
    """Row positions of each block: at least one row, else as many as fit a size that the corpus alone decides."""
    total = sum(loss_positions(length, tokens.skip) for length in tokens.lengths.tolist()) * token_bytes
    limit = min(BLOCK_BYTES, max(total // BLOCKS, SMALL_BYTES))
    blocks: list[range] = []
    first, size = 0, 0
    for row, length in enumerate(tokens.lengths.tolist()):
        own = loss_positions(length, tokens.skip) * token_bytes
        if row > first and size + own > limit:
            blocks.append(range(first, row))
            first, size = row, 0
        size += own
    return [*blocks, range(first, len(tokens))]


def block_path(folder: Path, number: int) -> Path:
    return folder / f"block-{number:05d}.safetensors"


def write_block(path: Path, tokens: Tokens, rows: Sequence[int], signal: dict[str, Tensor]) -> None:
    """Write one block, whole or not at all. signal: the tensors by name, positions of all rows in their order."""
    from safetensors.torch import save

    counts = [loss_positions(int(tokens.lengths[row]), tokens.skip) for row in rows]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    signal = {name: tensor.contiguous() for name, tensor in signal.items()}
    sums = [_crc32([tensor[offsets[r] : offsets[r + 1]] for tensor in signal.values()]) for r in range(len(rows))]
    digests = b"".join(hash_row(tokens.row(row)) for row in rows)
    tensors = {
        "index": torch.from_numpy(tokens.index[list(rows)].astype(np.int64)),
        "row_sha256": torch.frombuffer(bytearray(digests), dtype=torch.uint8).reshape(-1, 32),
        "crc32": torch.tensor(sums, dtype=torch.int64),
        "offsets": torch.from_numpy(offsets),
        **signal,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, save(tensors))


def _crc32(tensors: Sequence[Tensor]) -> int:
    total = 0
    for tensor in tensors:
        total = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data, total)
    return total


def write_head(folder: Path, head: Head) -> None:
    from safetensors.torch import save

    tensors = {"weight": head.weight_VH.cpu().contiguous()}
    if head.bias_V is not None:
        tensors["bias"] = head.bias_V.cpu().contiguous()
    write_atomic(folder / "head.safetensors", save(tensors))
    write_json(folder / "head.json", {"scale": head.scale, "softcap": head.softcap})


def read_head(folder: Path, student: Head, dtype: torch.dtype) -> Head:
    """The reference's head on the student's device; of equal weights there is one copy in memory.

    Raises DamagedArtifact for one that is none.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    device, path = student.weight_VH.device, folder / "head.safetensors"
    remedy = f"remove {folder} and run the same command to make it anew"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DamagedArtifact(str(path), f"not a readable head ({error})", remedy) from error
    about = read_json(folder / "head.json")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor.is_floating_point()}
    weight, bias = shapes.get("weight", ()), shapes.get("bias")
    if len(weight) != 2 or len(shapes) != len(tensors) or bias not in (None, weight[:1]):
        raise DamagedArtifact(str(path), f"tensors of shapes {shapes} are no head", remedy)
    weight_VH = tensors["weight"].to(dtype)
    own_VH = student.weight_VH
    # Under ZeRO-3 the student's own is not there as a whole.
    if own_VH.shape == weight_VH.shape and own_VH.dtype == dtype and torch.equal(own_VH.cpu(), weight_VH):
        weight_VH = own_VH
    bias_V = tensors["bias"].to(device, dtype) if "bias" in tensors else None
    return Head(weight_VH.to(device), bias_V, about["scale"], about["softcap"])


class Blocks:
    """The signal of one split, row by row, memory-mapped.

    Raises DamagedArtifact when a row is missing or belongs to other tokens (on opening), or when its bytes are not
    what was written (on reading).
    """

    def __init__(self, folder: Path, tokens: Tokens, names: tuple[str, ...]) -> None:
        from safetensors import SafetensorError, safe_open

        self._folder, self._names = folder, names
        self._remedy = f"remove {folder.parent} and run the same command to make it anew"
        self._places: list[tuple[int, int]] = []
        """(block, row in it) by row position."""
        self._offsets: list[NDArray[np.int64]] = []
        self._sums: list[list[int]] = []
        self._open: OrderedDict[int, Any] = OrderedDict()
        for number, path in enumerate(sorted(folder.glob("block-*.safetensors"))):
            try:
                with safe_open(path, framework="pt") as block:
                    rows = {name: block.get_tensor(name) for name in ROWS}
                    kinds = {name: block.get_slice(name) for name in names}
                    self._check_kinds(path, rows, {n: (k.get_dtype(), k.get_shape()) for n, k in kinds.items()})
            except (OSError, SafetensorError) as error:
                raise DamagedArtifact(str(path), f"not a readable block ({error})", self._remedy) from error
            self._sums.append(rows["crc32"].tolist())
            self._offsets.append(rows["offsets"].numpy())
            counts = np.diff(self._offsets[-1]).tolist()
            for row, (own, digest) in enumerate(zip(rows["index"].tolist(), rows["row_sha256"].numpy(), strict=True)):
                position = len(self._places)
                self._check(path, own, digest.tobytes(), tokens, position)
                if counts[row] != loss_positions(int(tokens.lengths[position]), tokens.skip):
                    raise DamagedArtifact(str(path), f"row {own} has {counts[row]} positions", self._remedy)
                self._places.append((number, row))
        if len(self._places) != len(tokens):
            raise DamagedArtifact(str(folder), f"{len(self._places)} of {len(tokens)} rows", self._remedy)

    def _check_kinds(self, path: Path, rows: dict[str, Tensor], kinds: dict[str, tuple[str, list[int]]]) -> None:
        """Dtypes and shapes: a checksum of bytes does not cover what they are taken for."""
        count = len(rows["index"]) if rows["index"].ndim else 0
        wanted = {
            "index": (torch.int64, (count,)),
            "row_sha256": (torch.uint8, (count, 32)),
            "crc32": (torch.int64, (count,)),
            "offsets": (torch.int64, (count + 1,)),
        }
        wrong = [name for name, tensor in rows.items() if (tensor.dtype, tuple(tensor.shape)) != wanted[name]]
        if not wrong:
            offsets = rows["offsets"].tolist()
            wrong = ["offsets"] if offsets[0] != 0 or offsets != sorted(offsets) else []
            wrong += [n for n, (dtype, shape) in kinds.items() if dtype not in DTYPES[n] or shape[:1] != offsets[-1:]]
            wrong += [n for n, (_, shape) in kinds.items() if len(shape) != (1 if n in SCALARS else 2)]
        if wrong:
            raise DamagedArtifact(str(path), f"{wrong[0]} is not of its dtype and shape", self._remedy)

    def _check(self, path: Path, index: int, digest: bytes, tokens: Tokens, position: int) -> None:
        if position >= len(tokens) or index != tokens.index[position]:
            raise DamagedArtifact(str(path), f"row {index} is not where its corpus has it", self._remedy)
        if digest != hash_row(tokens.row(position)):
            raise DamagedArtifact(str(path), f"row {index} was made from other tokens", self._remedy)

    def __getitem__(self, position: int) -> list[Tensor]:
        """The row's tensors, by the names this was opened with."""
        number, row = self._places[position]
        block = self._block(number)
        first, end = self._offsets[number][row : row + 2].tolist()
        tensors = [block.get_slice(name)[first:end] for name in self._names]
        if _crc32(tensors) != self._sums[number][row]:
            index = int(block.get_tensor("index")[row])
            path = block_path(self._folder, number)
            raise DamagedArtifact(str(path), f"the bytes of row {index} are not what was written", self._remedy)
        return tensors

    def _block(self, number: int) -> Any:
        from safetensors import safe_open

        if number not in self._open:
            self._open[number] = safe_open(block_path(self._folder, number), framework="pt")
            if len(self._open) > OPEN_BLOCKS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def fetch(self, rows: tuple[int, ...]) -> tuple[Tensor, ...]:
        return tuple(torch.cat(parts) for parts in zip(*(self[row] for row in rows), strict=True))


class CachedHiddenStates:
    """`teacher.kind: hidden_states`: whole distributions from stored states and the reference's head."""

    def __init__(self, folder: Path, tokens: Tokens, head: Head) -> None:
        self.head = head
        self._blocks = Blocks(folder, tokens, HIDDEN)

    def fetch(self, rows: tuple[int, ...]) -> tuple[Tensor, ...]:
        return self._blocks.fetch(rows)

    def targets(self, batch: Batch, fetched: tuple[Tensor, ...]) -> DenseTargets:
        (hidden_NG,) = fetched
        place = self.head.weight_VH
        return DenseTargets(hidden_NG[: len(batch.loss_N)].to(place.device, place.dtype, non_blocking=True), self.head)


class CachedSparseLogits:
    """`teacher.kind: sparse_logits`: the largest probabilities and tokens drawn from the tail."""

    def __init__(self, folder: Path, tokens: Tokens) -> None:
        self._blocks = Blocks(folder, tokens, SPARSE)

    def fetch(self, rows: tuple[int, ...]) -> tuple[Tensor, ...]:
        return self._blocks.fetch(rows)

    def targets(self, batch: Batch, fetched: tuple[Tensor, ...]) -> SparseTargets:
        device = batch.loss_N.device
        here = [tensor[: len(batch.loss_N)].to(device, non_blocking=True) for tensor in fetched]
        return SparseTargets.of(dict(zip(SPARSE, here, strict=True)))
