"""Log-likelihoods of answer choices for lm-eval's tasks, with each context computed once for all its choices.

lm-eval's own HFLM repeats the context for every choice of several tokens and takes logits at every position. Here a
batch of contexts, padded on the left, is run once; it gives the first token of every choice, and with it the whole
answer where choices are single tokens (MMLU, BoolQ). The other tokens continue from the cached keys and values. The
scores are HFLM's up to rounding (a test holds them together).

N contexts of a batch, R choices that have more than one token, P longest context, C longest continuation less its
last token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from torch import Tensor

from recovery.progress import progress

Encoded = tuple[tuple[str, str], list[int], list[int]]
"""(context, continuation) as text, then the token ids of both, as TemplateLM encodes them."""


@dataclass
class Context:
    """Token ids of a context, and the choices that follow it: (number of the request, token ids)."""

    ids: tuple[int, ...]
    choices: list[tuple[int, list[int]]] = field(default_factory=list)

    @property
    def continued(self) -> list[int]:
        """Lengths, less their last token, of the choices of more than one token."""
        return [len(ids) - 1 for _, ids in self.choices if len(ids) > 1]

    @property
    def tokens(self) -> int:
        """Tokens that are fed to the model, without padding."""
        return len(self.ids) + sum(self.continued)


def batches(contexts: Sequence[Context], batch_tokens: int) -> Iterator[list[Context]]:
    """Contexts by falling length, in batches that feed at most `batch_tokens` tokens, padding counted (but one at
    least). Keys and values are held for as many, times the number of choices."""
    order = sorted(contexts, key=lambda context: (-len(context.ids), -max(context.continued, default=0), context.ids))
    batch: list[Context] = []
    rows = longest = 0
    for context in order:
        rows += len(context.continued)
        longest = max([longest, *context.continued])
        if batch and (len(batch) + 1) * len(batch[0].ids) + rows * longest > batch_tokens:
            yield batch
            batch = []
            rows, longest = len(context.continued), max(context.continued, default=0)
        batch.append(context)
    if batch:
        yield batch


class ChoiceScorer(TemplateLM):
    """An lm-eval language model that answers `loglikelihood` requests.

    model: causal LM of transformers or PEFT, in eval mode. batch_tokens: see `batches`. description: the text of the
    progress bar; None for no bar.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_tokens: int, description: str | None = None) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.batch_tokens = batch_tokens
        self.description = description
        config = model.config.get_text_config()
        self.max_length = int(getattr(config, "max_position_embeddings", 2048))

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
        groups: dict[tuple[int, ...], Context] = {}
        for number, (_texts, context_ids, choice_ids) in enumerate(requests):
            # What does not fit is cut from the left, as lm-eval does; the last token is never fed.
            kept = tuple(context_ids[-max(1, self.max_length + 1 - len(choice_ids)) :])
            groups.setdefault(kept, Context(kept)).choices.append((number, choice_ids))
        contexts = list(groups.values())
        bar = (
            progress(sum(context.tokens for context in contexts), "tok", self.description) if self.description else None
        )
        answers: dict[int, tuple[float, bool]] = {}
        for batch in batches(contexts, self.batch_tokens):
            answers |= self._score(batch)
            if bar is not None:
                bar.update(sum(context.tokens for context in batch))
        if bar is not None:
            bar.close()
        return [answers[number] for number in range(len(requests))]

    @torch.inference_mode()
    def _score(self, batch: list[Context]) -> dict[int, tuple[float, bool]]:
        device = self.model.device
        widest = len(batch[0].ids)
        lengths_N = torch.tensor([len(context.ids) for context in batch], device=device)
        # The padding's own ids and positions are never looked at.
        ids_NP = torch.tensor([[0] * (widest - len(c.ids)) + list(c.ids) for c in batch], device=device)
        mask_NP = torch.arange(widest, device=device) >= (widest - lengths_N)[:, None]
        output = self.model(
            input_ids=ids_NP,
            attention_mask=mask_NP.long(),
            position_ids=(mask_NP.long().cumsum(1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
        )
        first_NV = output.logits[:, -1]
        rest = self._continue(batch, output.past_key_values, mask_NP, lengths_N)
        answers: dict[int, tuple[float, bool]] = {}
        for row, context in enumerate(batch):
            for number, ids in context.choices:
                logits_LV = torch.cat([first_NV[row : row + 1], *rest.get(number, [])])
                logprobs_LV = logits_LV.float().log_softmax(-1)
                ids_L = torch.tensor(ids, device=device)
                chosen = logprobs_LV.gather(1, ids_L[:, None]).sum()
                answers[number] = (float(chosen), bool((logprobs_LV.argmax(-1) == ids_L).all()))
        return answers

    def _continue(
        self, batch: list[Context], cache: Any, mask_NP: Tensor, lengths_N: Tensor
    ) -> dict[int, list[Tensor]]:
        """Logits (L - 1, V) after the first token of every choice of L > 1 tokens, by request."""
        device = self.model.device
        owners: list[int] = []
        choices: list[tuple[int, list[int]]] = []
        for row, context in enumerate(batch):
            for number, ids in context.choices:
                if len(ids) > 1:
                    owners.append(row)
                    choices.append((number, ids))
        if not choices:
            return {}
        width = max(len(ids) for _, ids in choices) - 1
        ids_RC = torch.tensor([ids[:-1] + [0] * (width + 1 - len(ids)) for _, ids in choices], device=device)
        owners_R = torch.tensor(owners, device=device)
        cache.batch_select_indices(owners_R)
        # Padding on the right lies where a causal model cannot look.
        logits_RCV = self.model(
            input_ids=ids_RC,
            attention_mask=torch.cat([mask_NP[owners_R], torch.ones_like(ids_RC, dtype=torch.bool)], 1).long(),
            position_ids=lengths_N[owners_R, None] + torch.arange(width, device=device),
            past_key_values=cache,
            use_cache=True,
        ).logits
        return {number: [logits_RCV[row, : len(ids) - 1]] for row, (number, ids) in enumerate(choices)}

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError("no task of ours asks for the likelihood of whole texts")

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError("no task of ours generates")
