"""Cache: the reference's signal for a whole corpus, once, so that training runs without the reference.

    python -m recovery.cache JOB
    torchrun --nproc-per-node 8 --module recovery.cache JOB

Ranks share the blocks; a restart goes on with those that are missing. The format is recovery.teacher_cache's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recovery.artifacts import Workspace
from recovery.batches import collate, loss_positions, pack
from recovery.config import CacheJob, Dtype, HiddenStatesTeacher, SparseLogitsTeacher
from recovery.corpus import Tokens, check_ids, read_split, read_table, shards_of
from recovery.head import Head
from recovery.models import (
    TORCH_DTYPES,
    check_training_path,
    device,
    final_hidden,
    head_of,
    join_ranks,
    load_model,
    of_first_rank,
)
from recovery.progress import progress
from recovery.stage import run_stage
from recovery.teacher_cache import block_path, blocks_of, bytes_per_token, write_block, write_head
from recovery.teacher_signal import TopLogprobs, read_signal
from recovery.vocabulary import load_vocabulary

log = logging.getLogger("recover-lora")
FORWARD_TOKENS = 2048
"""Tokens of one forward pass."""
DRAW_TOKENS = 128
"""Positions whose whole distribution is in memory at a time."""
Signal = dict[str, Tensor]
Compute = Callable[[Tokens, Sequence[int]], Signal]
"""Rows of a split to their signal, positions in the order of the rows."""


class Reference:
    """The reference's forward pass over rows of a corpus."""

    def __init__(self, model: Any, head: Head) -> None:
        self._model, self.head = model, head

    @torch.no_grad()
    def states(self, tokens: Tokens, rows: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """(row, its final hidden states (P, G) at loss positions), in the order of packing."""
        for group in pack(list(rows), tokens.lengths, FORWARD_TOKENS):
            batch = collate(tokens, group).to(device())
            counts = [loss_positions(int(tokens.lengths[row]), tokens.skip) for row in group]
            yield from zip(group, final_hidden(self._model, batch)[batch.loss_N].split(counts), strict=True)

    def hidden(self, tokens: Tokens, rows: Sequence[int], dtype: torch.dtype) -> Signal:
        found = {row: hidden_PG.to(dtype).cpu() for row, hidden_PG in self.states(tokens, rows)}
        return {"hidden": torch.cat([found[row] for row in rows])}

    def sparse(self, tokens: Tokens, rows: Sequence[int], teacher: SparseLogitsTeacher, seed: int) -> Signal:
        found: dict[int, Signal] = {}
        for row, hidden_PG in self.states(tokens, rows):
            random = np.random.Generator(np.random.Philox(key=[seed, int(tokens.index[row])]))
            uniform_PM = torch.from_numpy(random.random((len(hidden_PG), teacher.tail), dtype=np.float32))
            parts = [
                draw(self.head.logits(hidden_TG), teacher.top, uniform_TM.to(hidden_TG.device))
                for hidden_TG, uniform_TM in zip(
                    hidden_PG.split(DRAW_TOKENS), uniform_PM.split(DRAW_TOKENS), strict=True
                )
            ]
            found[row] = _concatenated(parts)
        return _concatenated([found[row] for row in rows])


def _concatenated(parts: Sequence[Signal]) -> Signal:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def draw(logits_TV: Tensor, top: int, uniform_TM: Tensor) -> Signal:
    """The sparse signal of some positions: the `top` largest, and one entry of the tail for each uniform number.

    Drawn with replacement in proportion to the teacher's own probabilities (arXiv 2503.16870, section 4), so that
    each of the M stands for rest / M. logits_TV: float32, overwritten.
    """
    torch.log_softmax(logits_TV, dim=-1, out=logits_TV)
    top_logprobs_TK, top_ids_TK = logits_TV.topk(top, dim=-1)
    mass_TV = logits_TV.exp().scatter_(1, top_ids_TK, 0.0)
    # In float64: the cumulative sum of a whole vocabulary would lose its small terms.
    cumulative_TV = mass_TV.cumsum(-1, dtype=torch.float64)
    rest_T = cumulative_TV[:, -1].clone()
    # The first id whose cumulative mass exceeds the number: never one without mass, where there is any.
    ids_TM = torch.searchsorted(cumulative_TV, uniform_TM.double() * rest_T[:, None], right=True)
    ids_TM.clamp_(max=logits_TV.shape[1] - 1)
    signal = {
        "top_ids": top_ids_TK.int(),
        "top_logprobs": top_logprobs_TK.half(),
        "tail_ids": ids_TM.int(),
        "tail_logprobs": logits_TV.gather(1, ids_TM).half(),
        "tail_weight": (rest_T / uniform_TM.shape[1]).float(),
        "rest": rest_T.float(),
    }
    return {name: tensor.cpu() for name, tensor in signal.items()}


def captured(signals: dict[int, TopLogprobs], tokens: Tokens, rows: Sequence[int]) -> Signal:
    """The sparse signal that servers gave while they generated: the token that stands in the text is the draw.

    Where it was drawn from the whole distribution and lies outside the top, it counts with weight 1; elsewhere
    nothing was drawn. A greedy token is no draw at all, so its position is biased (one bucket for the tail).
    """
    parts = []
    for row in rows:
        signal = signals[int(tokens.index[row])]
        count = loss_positions(int(tokens.lengths[row]), tokens.skip)
        # The loss positions predict the last `count` tokens of the row.
        first = len(signal) - count
        ids, emitted = signal.ids[first:], tokens.row(row)[len(tokens.row(row)) - count :]
        inside = (ids == emitted[:, None]).any(-1)
        part = {
            "top_ids": ids,
            "top_logprobs": signal.logprobs[first:].astype(np.float16),
            "tail_ids": np.where(inside, 0, emitted)[:, None].astype(np.int32),
            "tail_logprobs": signal.emitted[first:, None].astype(np.float16),
            "tail_weight": (signal.drawn[first:] & ~inside).astype(np.float32),
            "rest": signal.rest[first:],
        }
        parts.append({name: torch.from_numpy(np.array(array)) for name, array in part.items()})
    return _concatenated(parts)


def captured_compute(corpus: Path) -> Compute:
    """The signal of the corpus' own shards, read a shard at a time."""
    shards = {
        index: shard
        for shard in shards_of(corpus, "train")
        for index in read_table(shard, ["index"])["index"].to_pylist()
    }
    kept: dict[Path, dict[int, TopLogprobs]] = {}

    def compute(tokens: Tokens, rows: Sequence[int]) -> Signal:
        signals: dict[int, TopLogprobs] = {}
        for row in rows:
            shard = shards[int(tokens.index[row])]
            if shard not in kept:
                kept.clear()
                kept[shard] = _read_shard_signal(shard)
            signals[int(tokens.index[row])] = kept[shard][int(tokens.index[row])]
        return captured(signals, tokens, rows)

    return compute


def _read_shard_signal(shard: Path) -> dict[int, TopLogprobs]:
    table = read_table(shard, ["index", "tokens"])
    index = table["index"].to_pylist()
    rows = [np.asarray(row.values) for row in table["tokens"]]
    return dict(zip(index, read_signal(shard, index, rows), strict=True))


def fill(folder: Path, tokens: Tokens, token_bytes: int, compute: Compute, rank: int, ranks: int, name: str) -> None:
    """Write this rank's share of the split's blocks that are missing; the bar is of all of them."""
    blocks = list(enumerate(blocks_of(tokens, token_bytes)))
    missing = of_first_rank([number for number, _ in blocks if not block_path(folder, number).exists()], ranks)
    own = [blocks[number] for number in missing[rank::ranks]]
    total, left = int(tokens.lengths.sum()), sum(int(tokens.lengths[rows].sum()) for _, rows in own)
    bar = progress(total, "tok", name, total - left) if rank == 0 else None
    for number, rows in own:
        write_block(block_path(folder, number), tokens, rows, compute(tokens, rows))
        if bar is not None:
            bar.update(sum(int(tokens.lengths[row]) for row in rows))
    if bar is not None:
        bar.close()


def produce(job: CacheJob, workspace: Workspace) -> dict[str, Any]:
    rank, ranks = join_ranks("gloo")
    vocabulary = load_vocabulary(job.reference.path, job.reference.revision)
    width = min(vocabulary.size, vocabulary.head_width)
    texts = {"train": read_split(job.corpus.path, "train"), "held_out": read_split(job.corpus.path, "held_out")}
    if job.contexts is not None:
        texts["contexts"] = read_split(job.contexts.path, "held_out")
    for tokens in texts.values():
        check_ids(tokens, width, str(job.corpus.path))
    model = load_model(job.reference, job.dtype)
    check_training_path(model, width, "models.reference")
    reference = Reference(model, head_of(model, width))
    measured = HiddenStatesTeacher(dtype=job.dtype)
    teacher, hidden_width = job.teacher, reference.head.weight_VH.shape[1]

    def states(dtype: Dtype) -> Compute:
        return lambda tokens, rows: reference.hidden(tokens, rows, TORCH_DTYPES[dtype])

    for name, tokens in texts.items():
        kind = teacher if name == "train" else measured
        if isinstance(kind, HiddenStatesTeacher):
            compute = states(kind.dtype)
        elif kind.captured:
            compute = captured_compute(job.corpus.path)
        else:
            compute = partial(reference.sparse, teacher=kind, seed=job.seed)
        fill(workspace.path / name, tokens, bytes_per_token(kind, hidden_width), compute, rank, ranks, f"cache {name}")
    if rank == 0:
        write_head(workspace.path, reference.head)
    if ranks > 1:
        torch.distributed.barrier()
    size = sum(path.stat().st_size for path in (workspace.path / "train").glob("block-*"))
    positions = sum(loss_positions(length, texts["train"].skip) for length in texts["train"].lengths.tolist())
    details = {"loss_tokens": positions, "bytes": size, "bytes_per_token": size / max(positions, 1), "ranks": ranks}
    log.info("%d loss tokens, %.1f bytes a token, %.1f MB", positions, details["bytes_per_token"], size / 1e6)
    return details


if __name__ == "__main__":
    run_stage(CacheJob, produce, resumable=True, description=__doc__ or "")
