"""The scorer against lm-eval's own HFLM and its evaluate(), on every architecture."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eval.scoring import ChoiceScorer, Question, batch_of, scored
from tests.conftest import ARCHITECTURES
from tests.pipeline import model_at

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "dogs",
    "ran",
    "over",
    "green",
    "hills",
    "and",
    "sang",
    "to",
    "birds",
]


class Request:
    """The part of lm-eval's Instance that a model reads."""

    def __init__(self, context: str, continuation: str) -> None:
        self.args = (context, continuation)


def text(start: int, words: int) -> str:
    return " ".join(WORDS[(start + step * 3) % len(WORDS)] for step in range(words))


def requests() -> list[Any]:
    """Contexts of many lengths (beyond the window and the sliding window too), choices of one token and of many."""
    made = []
    for number in range(5):
        context = text(number, 1 + 3 * number) + (" " if number == 3 else "")
        made += [Request(context, choice) for choice in (" a cat", " dogs ran over the hills", " b", " c")]
    made += [Request("Answer", letter) for letter in "ABCD"]
    made += [Request(text(0, 70), " " + text(3, 2)), Request(text(0, 70), "!"), Request("", " alone")]
    return made


def load(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    return model_at(folder), AutoTokenizer.from_pretrained(folder)


def harness(model: Any, tokenizer: Any) -> Any:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.models import huggingface

    return cast(Any, huggingface).HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, softmax_dtype="float32")


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_scores_equal_those_of_lm_evals_own_model(models: dict[str, Path], kind: str):
    model, tokenizer = load(models[kind])
    assert len(tokenizer(text(0, 70)).input_ids) > model.config.max_position_embeddings
    wanted = harness(model, tokenizer).loglikelihood(requests(), disable_tqdm=True)
    for batch_tokens in (1, 400, 100_000):
        found = ChoiceScorer(model, tokenizer, batch_tokens).loglikelihood(requests(), disable_tqdm=True)
        assert [pair[0] for pair in found] == pytest.approx([pair[0] for pair in wanted], abs=2e-4)
        assert [pair[1] for pair in found] == [pair[1] for pair in wanted]


def test_a_peft_adapter_is_part_of_the_score(models: dict[str, Path]):
    from peft import LoraConfig, get_peft_model

    model, tokenizer = load(models["llama"])
    plain = ChoiceScorer(model, tokenizer, 512).loglikelihood(requests(), disable_tqdm=True)
    adapted: Any = get_peft_model(model, LoraConfig(r=4, target_modules=["k_proj"], init_lora_weights=False)).eval()
    found = ChoiceScorer(adapted, tokenizer, 512).loglikelihood(requests(), disable_tqdm=True)
    wanted = harness(adapted, tokenizer).loglikelihood(requests(), disable_tqdm=True)
    assert [pair[0] for pair in found] == pytest.approx([pair[0] for pair in wanted], abs=2e-4)
    assert max(abs(a[0] - b[0]) for a, b in zip(found, plain, strict=True)) > 0.01


def test_a_context_is_computed_once_and_nothing_is_padded(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    model, tokenizer = load(models["olmo"])
    fed: list[torch.Size] = []
    decoder = model.get_decoder()
    forward = decoder.forward

    def counted(*arguments: Any, **named: Any) -> Any:
        fed.append(named["input_ids"].shape)
        return forward(*arguments, **named)

    monkeypatch.setattr(decoder, "forward", counted)
    scorer: Any = ChoiceScorer(model, tokenizer, 4096)
    several = [Request("context" * 9, choice) for choice in ("abc", "abcdef", "z")]
    scorer.loglikelihood([*several, Request("other", "ab")], disable_tqdm=True)
    assert fed == [(1, (63 + 2 + 5) + (5 + 1))]
    fed.clear()
    scorer.loglikelihood([Request("context" * 9, letter) for letter in "ABCD"], disable_tqdm=True)
    assert fed == [(1, 63)]


shapes = st.lists(
    st.tuples(st.integers(1, 50), st.lists(st.integers(1, 9), min_size=1, max_size=4)), min_size=1, max_size=30
)


@given(shapes)
def test_every_choice_token_is_predicted_by_the_state_before_it(drawn: list[tuple[int, list[int]]]):
    questions, number = [], 0
    for length, sizes in drawn:
        choices = [
            (number + place, [1000 * (number + place) + step for step in range(size)])
            for place, size in enumerate(sizes)
        ]
        questions.append(Question(tuple(range(-length, 0)), choices))
        number += len(sizes)
    found = scored(questions)
    batch = batch_of(questions, found)
    assert batch.bounds[-1] == len(batch.ids_T) == len(batch.positions_T) == sum(q.tokens for q in questions)
    assert found.places_N.tolist() == sorted(set(found.places_N.tolist()))
    before = batch.ids_T[batch.loss_N[found.states_M]]
    place = batch.positions_T[batch.loss_N[found.states_M]]
    sizes = {n: len(ids) for question in questions for n, ids in question.choices}
    contexts = {n: len(question.ids) for question in questions for n, _ in question.choices}
    seen: dict[int, int] = dict.fromkeys(sizes, 0)
    for token, state, where, request in zip(
        found.ids_M.tolist(), before.tolist(), place.tolist(), found.requests_M.tolist(), strict=True
    ):
        step = seen[request]
        assert token == 1000 * request + step
        assert state == (-1 if step == 0 else token - 1)
        assert where == contexts[request] + step - 1
        seen[request] += 1
    assert seen == sizes


def test_scores_are_the_same_bits_again(models: dict[str, Path]):
    model, tokenizer = load(models["qwen2"])
    first, second = (ChoiceScorer(model, tokenizer, 512).loglikelihood(requests(), disable_tqdm=True) for _ in range(2))
    assert first == second
