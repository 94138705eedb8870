"""Log-likelihoods of answer choices for lm-eval's tasks, with each context computed once for all its choices.

lm-eval's own HFLM repeats the context for every choice of several tokens, pads, and takes logits at every position.
Here a question is one tree, its context and behind it the tokens of every choice, which do not see each other; trees
are packed without padding into forward passes (recovery.attention), and the head multiplies only what is scored: the
context's last state, which tells of the first token of every choice, and the choices' own. The scores are HFLM's up to
rounding (a test holds them together).

T tokens of a forward pass, N states that are scored in it, M choice tokens (several of one state where choices share
their context's last), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from torch import Tensor

from recovery.attention import Tree, packed
from recovery.batches import Batch, pack
from recovery.models import causal_lm, final_hidden, head_of
from recovery.progress import progress

Encoded = tuple[tuple[str, str], list[int], list[int]]
"""(context, continuation) as text, then the token ids of both, as TemplateLM encodes them."""
LOGIT_ROWS = 1024
"""States of which logits are made at a time."""


@dataclass
class Question:
    """Token ids of a context, and the choices that follow it: (number of the request, token ids)."""

    ids: tuple[int, ...]
    choices: list[tuple[int, list[int]]] = field(default_factory=list)

    @property
    def branches(self) -> list[tuple[int, list[int]]]:
        """What is fed of the choices: all but their last tokens, where there are any."""
        return [(number, ids[:-1]) for number, ids in self.choices if len(ids) > 1]

    @property
    def tokens(self) -> int:
        """Tokens that are fed to the model."""
        return len(self.ids) + sum(len(ids) for _, ids in self.branches)

    @property
    def places(self) -> list[int]:
        """Positions of the fed tokens."""
        last = len(self.ids)
        return [*range(last), *(last + step for _, ids in self.branches for step in range(len(ids)))]

    def tree(self, device: torch.device) -> Tree | None:
        """Which of the fed tokens see each other; None where nothing branches."""
        branches = self.branches
        if not branches:
            return None
        of = [0] * len(self.ids) + [number for number, (_, ids) in enumerate(branches, 1) for _ in ids]
        return Tree(torch.tensor(of, device=device), torch.tensor(self.places, device=device))


@dataclass(frozen=True)
class Scored:
    """Which states of a forward pass say what: all on the CPU."""

    places_N: Tensor
    """int64, ascending: of the states in the pass"""
    states_M: Tensor
    """int64: the state that predicts each choice token"""
    ids_M: Tensor
    """int64: the choice tokens"""
    requests_M: Tensor
    """int64: whose they are"""


def scored(questions: Sequence[Question]) -> Scored:
    places: list[int] = []
    states: list[int] = []
    ids: list[int] = []
    requests: list[int] = []
    begin = 0
    for question in questions:
        first = len(places)
        places.append(begin + len(question.ids) - 1)
        branch = begin + len(question.ids)
        for number, choice in question.choices:
            states += [first, *range(len(places), len(places) + len(choice) - 1)]
            places += range(branch, branch + len(choice) - 1)
            branch += len(choice) - 1
            ids += choice
            requests += [number] * len(choice)
        begin += question.tokens
    return Scored(*(torch.tensor(values) for values in (places, states, ids, requests)))


def batch_of(questions: Sequence[Question], wanted: Scored) -> Batch:
    """The questions one behind the other, on the CPU. wanted: `scored` of them."""
    ids = [[*question.ids, *(token for _, branch in question.branches for token in branch)] for question in questions]
    return Batch(
        rows=(),
        ids_T=torch.tensor([token for row in ids for token in row]),
        positions_T=torch.tensor([place for question in questions for place in question.places]),
        bounds=(0, *np.cumsum([len(row) for row in ids]).tolist()),
        loss_N=wanted.places_N,
        next_N=torch.zeros(0, dtype=torch.long),
    )


class ChoiceScorer(TemplateLM):
    """An lm-eval language model that answers `loglikelihood` requests.

    model: causal LM of transformers or PEFT, in eval mode. batch_tokens: most tokens of a forward pass, but one
    question at least. description: the text of the progress bar; None for no bar.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_tokens: int, description: str | None = None) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.batch_tokens = batch_tokens
        self.description = description
        config = model.config.get_text_config()
        self.max_length = int(getattr(config, "max_position_embeddings", 2048))
        self._head = head_of(model, causal_lm(model).get_output_embeddings().weight.shape[0])

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else start

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; a beginning of text is put in front where the tokenizer does so, but not a second one."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(self, requests: list[Encoded], **_: Any) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether greedy decoding would produce it) of every request."""
        groups: dict[tuple[int, ...], Question] = {}
        for number, (_texts, context_ids, choice_ids) in enumerate(requests):
            # What does not fit is cut from the left, as lm-eval does; the last token is never fed.
            kept = tuple(context_ids[-max(1, self.max_length + 1 - len(choice_ids)) :])
            groups.setdefault(kept, Question(kept)).choices.append((number, choice_ids))
        questions = list(groups.values())
        lengths = np.array([question.tokens for question in questions])
        bar = progress(int(lengths.sum()), "tok", self.description) if self.description else None
        answers: dict[int, tuple[float, bool]] = {}
        with packed(causal_lm(self.model)):
            for rows in pack(list(range(len(questions))), lengths, self.batch_tokens):
                answers |= self._score([questions[row] for row in rows])
                if bar is not None:
                    bar.update(int(lengths[list(rows)].sum()))
        if bar is not None:
            bar.close()
        return [answers[number] for number in range(len(requests))]

    @torch.inference_mode()
    def _score(self, questions: list[Question]) -> dict[int, tuple[float, bool]]:
        device = self.model.device
        wanted = scored(questions)
        batch = batch_of(questions, wanted).to(device)
        trees = tuple(question.tree(device) for question in questions)
        hidden_NH = final_hidden(self.model, batch, trees)[batch.loss_N]
        chosen_M, greedy_M = torch.empty(len(wanted.ids_M)), torch.empty(len(wanted.ids_M), dtype=torch.bool)
        for first in range(0, len(hidden_NH), LOGIT_ROWS):
            logits_NV = self._head.logits(hidden_NH[first : first + LOGIT_ROWS])
            here_M = (wanted.states_M >= first) & (wanted.states_M < first + LOGIT_ROWS)
            states_M, ids_M = (wanted.states_M[here_M] - first).to(device), wanted.ids_M[here_M].to(device)
            chosen_M[here_M] = (logits_NV[states_M, ids_M] - logits_NV.logsumexp(-1)[states_M]).float().cpu()
            greedy_M[here_M] = (logits_NV.argmax(-1)[states_M] == ids_M).cpu()
        requests, place_M = wanted.requests_M.unique(return_inverse=True)
        sums = torch.zeros(len(requests)).index_add_(0, place_M, chosen_M)
        missed = torch.zeros(len(requests)).index_add_(0, place_M, (~greedy_M).float())
        return {
            int(number): (float(total), not bool(wrong))
            for number, total, wrong in zip(requests, sums, missed, strict=True)
        }

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError("no task of ours asks for the likelihood of whole texts")

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError("no task of ours generates")
