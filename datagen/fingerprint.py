"""The fingerprint of a model: a fixed greedy probe with log-probabilities.

A server's model is known by name only; these tell whether its weights are the ones of the recipe. transformers computes
them once a model, on the machine of the client, and they are remembered by the model's hash.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recovery.config import Dtype, ModelInput
from recovery.errors import UserError
from recovery.files import write_json

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 6, 8, 8
TOP = 20
# Mean difference of a token's log-probability, in nats. Between engines it is about 1e-5 in float32 and 0.02 in
# bfloat16; 4-bit weights differ by 0.2 and more.
TOLERANCE: Mapping[Dtype, float] = {"float32": 0.005, "bfloat16": 0.08}
# Two first choices closer than this may change places by rounding.
TIE: Mapping[Dtype, float] = {"float32": 0.01, "bfloat16": 0.25}


@dataclass(frozen=True)
class Probe:
    """The greedy continuation of one prompt. top[i]: {token id: log-probability} of the largest at new token i."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    top: tuple[dict[int, float], ...]


def prompts_of(eligible: Sequence[int], bos: int | None) -> list[list[int]]:
    """Token ids spread evenly over the vocabulary: unusual texts, in which every weight counts."""
    picks = np.linspace(0, len(eligible) - 1, PROMPTS * PROMPT_TOKENS).astype(int)
    ids = np.asarray(eligible)[picks].reshape(PROMPT_TOKENS, PROMPTS).T.tolist()
    return [([] if bos is None else [bos]) + row for row in ids]


def probe_model(model: Any, prompts: Sequence[Sequence[int]], width: int) -> list[Probe]:
    """The fingerprint of a transformers causal LM."""
    import torch

    probes = []
    with torch.inference_mode():
        for prompt in prompts:
            ids, top = list(prompt), []
            for _ in range(NEW_TOKENS):
                logits = model(input_ids=torch.tensor([ids], device=model.device), logits_to_keep=1).logits[0, -1]
                best = torch.log_softmax(logits.float(), -1)[:width].topk(min(TOP, width))
                top.append(dict(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
                ids.append(int(best.indices[0]))
            probes.append(Probe(tuple(prompt), tuple(ids[len(prompt) :]), tuple(top)))
    return probes


def to_json(probes: Sequence[Probe]) -> list[dict[str, Any]]:
    return [asdict(probe) for probe in probes]


def from_json(stored: Sequence[Mapping[str, Any]]) -> list[Probe]:
    """Raises KeyError, TypeError, ValueError or AttributeError for what `to_json` did not write."""
    return [
        Probe(tuple(p["prompt"]), tuple(p["tokens"]), tuple({int(k): v for k, v in top.items()} for top in p["top"]))
        for p in stored
    ]


def reference_fingerprint(
    model: ModelInput, dtype: Dtype, prompts: Sequence[Sequence[int]], width: int, folder: Path
) -> list[Probe]:
    """The model's own fingerprint, from `folder` if it was computed before."""
    path = folder / f"{model.digest.replace('/', '_').replace(':', '_')[:80]}-{dtype}.json"
    wanted = [list(prompt) for prompt in prompts]
    try:
        probes = from_json(json.loads(path.read_text()))
        if [list(probe.prompt) for probe in probes] == wanted:
            return probes
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # a cache: computed anew
    from recovery.models import load_model

    # On the CPU: a server may have filled the device already.
    probes = probe_model(load_model(model, dtype, placed=False), prompts, width)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, to_json(probes))
    return probes


def difference(expected: Sequence[Probe], found: Sequence[Probe], dtype: Dtype) -> str | None:
    """Why `found` is not the same model as `expected`; None when it is.

    A prompt is compared up to the first token that differs, which must be a tie. Raises UserError for probes of
    different prompts.
    """
    gaps = []
    for ours, theirs in zip(expected, found, strict=True):
        if ours.prompt != theirs.prompt:
            raise UserError("fingerprint", "of other prompts", "probe again")
        for place, (token, top) in enumerate(zip(theirs.tokens, theirs.top, strict=True)):
            wanted = ours.top[place]
            best = wanted[ours.tokens[place]]
            known = wanted.get(token, min(wanted.values()))
            if token != ours.tokens[place] and best - known > TIE[dtype]:
                return f"its greedy token {token} has log-probability {known:.2f} there, the best has {best:.2f}"
            gaps.append(abs(top[token] - known))
            if token != ours.tokens[place]:
                break
    mean = float(np.mean(gaps))
    if mean > TOLERANCE[dtype]:
        return f"log-probabilities differ by {mean:.3f} nats on average, {TOLERANCE[dtype]} is allowed in {dtype}"
    return None
