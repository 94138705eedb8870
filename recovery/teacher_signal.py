"""The sparse teacher signal: for every predicted token of a row, the teacher's k largest log-probabilities.

One safetensors file for each corpus shard, of the same number, so that it can be memory-mapped:

    index          int64   (rows)          global index of the row
    row_sha256     uint8   (rows, 32)      of the row's token ids as little-endian int32: binds the signal to its tokens
    first          int32   (rows)          place in the row of the first predicted token; the prompt is before it
    offsets        int64   (rows + 1)      row r owns the positions offsets[r] .. offsets[r + 1]
    top_ids        int32   (positions, k)  ids of the k largest, largest first
    top_logprobs   float32 (positions, k)  their log-probabilities, in nats, before any sampling rule
    emitted        float32 (positions)     log-probability of the token that stands there
    rest           float32 (positions)     probability of everything outside the k, summed in float64
    drawn          uint8   (positions)     1: the token was drawn from the full distribution at temperature 1, so where
                                           it lies outside the k it is an unbiased sample of the tail; 0: greedy

A predicted token takes 8 k + 9 bytes (`bytes_per_token`).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recovery.errors import DamagedArtifact
from recovery.files import write_atomic

FORMAT = "recover-lora sparse teacher signal 1"


def bytes_per_token(k: int) -> int:
    return 8 * k + 9


@dataclass(frozen=True)
class TopLogprobs:
    """The signal of one row, P predicted tokens of it."""

    ids: NDArray[np.int32]
    """(P, k), largest first."""
    logprobs: NDArray[np.float32]
    """(P, k), in nats."""
    emitted: NDArray[np.float32]
    """(P,)"""
    drawn: NDArray[np.bool_]
    """(P,)"""

    def __len__(self) -> int:
        return len(self.emitted)

    @property
    def rest(self) -> NDArray[np.float32]:
        """(P,), the probability outside the k; rounding below zero is cut."""
        inside = np.exp(self.logprobs.astype(np.float64)).sum(-1)
        return np.maximum(1 - inside, 0).astype(np.float32)

    @property
    def nbytes(self) -> int:
        return self.ids.nbytes + self.logprobs.nbytes + self.emitted.nbytes + self.drawn.nbytes

    def pack(self) -> bytes:
        """Raw bytes: P and k, then the arrays."""
        head = np.array(self.ids.shape, dtype="<i4")
        drawn = self.drawn.astype("u1")
        return b"".join(array.tobytes() for array in (head, self.ids, self.logprobs, self.emitted, drawn))

    @classmethod
    def unpack(cls, data: bytes) -> TopLogprobs:
        count, k = np.frombuffer(data, "<i4", 2).tolist()
        wide, narrow = 4 * count * k, 4 * count
        return cls(
            np.frombuffer(data, "<i4", count * k, 8).reshape(count, k),
            np.frombuffer(data, "<f4", count * k, 8 + wide).reshape(count, k),
            np.frombuffer(data, "<f4", count, 8 + 2 * wide),
            np.frombuffer(data, "u1", count, 8 + 2 * wide + narrow).astype(bool),
        )


def hash_row(tokens: Sequence[int] | NDArray[np.int32]) -> bytes:
    return hashlib.sha256(np.asarray(tokens, dtype="<i4").tobytes()).digest()


def write_signal(
    path: Path, index: Sequence[int], rows: Sequence[NDArray[np.int32]], signals: Sequence[TopLogprobs]
) -> None:
    """Write the signal of one shard's rows, whole or not at all."""
    from safetensors.numpy import save

    lengths = [len(signal) for signal in signals]
    digests = b"".join(hash_row(row) for row in rows)
    tensors = {
        "index": np.array(index, dtype=np.int64),
        "row_sha256": np.frombuffer(digests, np.uint8).reshape(-1, 32),
        "first": np.array([len(row) - length for row, length in zip(rows, lengths, strict=True)], dtype=np.int32),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "top_ids": np.concatenate([signal.ids for signal in signals]),
        "top_logprobs": np.concatenate([signal.logprobs for signal in signals]),
        "emitted": np.concatenate([signal.emitted for signal in signals]),
        "rest": np.concatenate([signal.rest for signal in signals]),
        "drawn": np.concatenate([signal.drawn for signal in signals]).astype(np.uint8),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, save(tensors, metadata={"format": FORMAT}))


def _wrong_kind(tensors: dict[str, Any], rows: int) -> str | None:
    """The name of a tensor that is missing or not as the format has it."""
    positions = len(tensors["emitted"]) if "emitted" in tensors and tensors["emitted"].ndim else 0
    k = tensors["top_ids"].shape[-1] if "top_ids" in tensors and tensors["top_ids"].ndim else 0
    wanted = {
        "index": ("int64", (rows,)),
        "row_sha256": ("uint8", (rows, 32)),
        "first": ("int32", (rows,)),
        "offsets": ("int64", (rows + 1,)),
        "top_ids": ("int32", (positions, k)),
        "top_logprobs": ("float32", (positions, k)),
        "emitted": ("float32", (positions,)),
        "rest": ("float32", (positions,)),
        "drawn": ("uint8", (positions,)),
    }
    for name, (dtype, shape) in wanted.items():
        if name not in tensors or tensors[name].dtype != dtype or tensors[name].shape != shape:
            return name
    offsets = tensors["offsets"].tolist()
    return None if offsets[0] == 0 and offsets[-1] == positions and offsets == sorted(offsets) else "offsets"


def check_signal(path: Path, index: Sequence[int], rows: Sequence[NDArray[np.int32]]) -> dict[str, Any]:
    """The tensors of one shard's signal, checked against the rows it belongs to. Raises DamagedArtifact by row."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    remedy = "remove its corpus and generate it again"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, AttributeError, TypeError) as error:  # the last two: dtypes that numpy lacks
        raise DamagedArtifact(str(path), f"not a readable signal ({error})", remedy) from error
    if wrong := _wrong_kind(tensors, len(rows)):
        raise DamagedArtifact(str(path), f"{wrong} is not of its dtype and shape", remedy)
    if tensors["index"].tolist() != list(index):
        raise DamagedArtifact(str(path), "it holds other rows than its shard", remedy)
    for place, row in enumerate(rows):
        if tensors["row_sha256"][place].tobytes() != hash_row(row):
            raise DamagedArtifact(str(path), f"row {index[place]} has other tokens than its shard", remedy)
        positions = int(tensors["offsets"][place + 1] - tensors["offsets"][place])
        if int(tensors["first"][place]) + positions != len(row):
            raise DamagedArtifact(str(path), f"row {index[place]} has another length than its shard", remedy)
    return tensors


def signal_path(shard: Path) -> Path:
    """Where the signal of a corpus shard's rows lies: `<corpus>/signal/<split>/<shard>.safetensors`."""
    return shard.parent.parent / "signal" / shard.parent.name / f"{shard.stem}.safetensors"


def read_signal(shard: Path, index: Sequence[int], rows: Sequence[NDArray[np.int32]]) -> list[TopLogprobs]:
    """The signal of a corpus shard's rows, in their order. Raises DamagedArtifact by row."""
    tensors = check_signal(signal_path(shard), index, rows)
    names = ("top_ids", "top_logprobs", "emitted", "drawn")
    return [
        TopLogprobs(*(tensors[name][first:last] for name in names))
        for first, last in itertools.pairwise(tensors["offsets"].tolist())
    ]
