"""Measurements sample by sample, against each sample measured alone and against transformers' own logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from recovery.corpus import Tokens
from tests.pipeline import measure, model_at


def test_every_sample_has_its_own_kl(tiny: Path):
    model, reference = (model_at(tiny) for _ in range(2))
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(0.5)
    lengths = np.array([5, 17, 1, 9, 30])
    ids = np.random.default_rng(0).integers(3, 200, size=lengths.sum()).astype(np.int32)
    tokens = Tokens(np.arange(5), np.concatenate([[0], lengths.cumsum()]), ids, skip=1)
    width = model.config.vocab_size
    found = measure(model, reference, tokens, width, 24, "")
    expected = []
    for row in range(5):
        sample = torch.from_numpy(tokens.row(row).astype(np.int64))[None]
        own, theirs = (one(input_ids=sample).logits[0, 1:-1].double().log_softmax(-1) for one in (model, reference))
        expected.append((float((theirs.exp() * (theirs - own)).sum()), max(0, int(lengths[row]) - 2)))
    assert [count for _, count in found.by_sample] == [count for _, count in expected]
    assert [kl for kl, _ in found.by_sample] == pytest.approx([kl for kl, _ in expected], abs=1e-5)
    assert found.kl == pytest.approx(sum(kl for kl, _ in expected) / sum(count for _, count in expected), rel=1e-5)
    assert found.tokens == sum(count for _, count in expected)
    # However the samples are packed.
    assert measure(model, reference, tokens, width, 1000, "").by_sample == pytest.approx(
        np.array(found.by_sample), abs=1e-5
    )
    alone = measure(model, reference, replace(tokens, skip=0), width, 24, "")
    assert alone.tokens == found.tokens + 4
