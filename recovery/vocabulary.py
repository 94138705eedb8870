"""The vocabulary check: a KL between two models means something only if logit i is the same token in both.

A shared tokenizer class is not a shared vocabulary, so the full token-to-id maps are compared. Heads may be padded
to different widths (151936 logits for 151665 tokens); only the first `width` logits, those that have a token, count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from recovery.errors import UserError, first_line
from recovery.sources import is_gguf, pretrained

SPECIAL = ("bos_token_id", "eos_token_id", "unk_token_id")


@dataclass(frozen=True)
class Vocabulary:
    tokens: dict[str, int]
    special: dict[str, int | None]
    """Of a GGUF file: none."""
    head_width: int
    """Rows of the output head: the model's `vocab_size`."""

    @property
    def size(self) -> int:
        """One more than the largest token id."""
        return max(self.tokens.values()) + 1


def load_vocabulary(path: str, revision: str | None = None, *, model: bool = True) -> Vocabulary:
    """The vocabulary of a model folder or hub id, or of a tokenizer alone (model=False: no head to be padded).

    Raises UserError when there is no tokenizer or config.
    """
    from transformers import AutoConfig, AutoTokenizer

    if is_gguf(path):
        return gguf_vocabulary(path)
    try:
        place, arguments = pretrained(path, revision)
        tokenizer: Any = AutoTokenizer.from_pretrained(place, **arguments)
        config = AutoConfig.from_pretrained(place, **arguments) if model else None
    except (OSError, ValueError) as error:
        first = first_line(error)
        raise UserError(path, f"its tokenizer or config cannot be read ({first})", "give a complete model") from error
    special = {name: getattr(tokenizer, name, None) for name in SPECIAL}
    tokens = tokenizer.get_vocab()
    width = max(tokens.values()) + 1 if config is None else int(config.get_text_config().vocab_size)
    return Vocabulary(tokens, special, width)


def gguf_vocabulary(path: str) -> Vocabulary:
    """The token list of a GGUF file itself: tokenizers that are made from it may add tokens of their own.

    Special ids are left out, as converters choose them by their own lights. Raises UserError when there is no list.
    """
    from gguf import GGUFReader, TokenType

    try:
        reader = GGUFReader(path)
        tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(path, f"its tokens cannot be read ({error})", "copy or convert the file again") from error
    types = reader.fields.get("tokenizer.ggml.token_type")
    kinds = types.contents() if types is not None else [TokenType.NORMAL] * len(tokens)
    pairs = enumerate(zip(tokens, kinds, strict=True))
    used = {token: place for place, (token, kind) in pairs if kind != TokenType.UNUSED}  # which only pad the embedding
    return Vocabulary(used, {}, len(tokens))


def used_width(reference: Vocabulary, degraded: Vocabulary, where: str = "models.degraded") -> int:
    """The number of logits that both models share. Raises UserError naming the first tokens that differ."""
    compare(reference, degraded, where)
    narrow = [v.head_width for v in (reference, degraded) if v.head_width < reference.size]
    if len(narrow) == 1:
        raise UserError(
            where,
            f"{reference.size} tokens, but heads of {reference.head_width} and {degraded.head_width} rows",
            "use models whose heads both cover the tokenizer's tokens",
        )
    return min(reference.size, reference.head_width, degraded.head_width)


def compare(expected: Vocabulary, found: Vocabulary, where: str) -> None:
    """Raise UserError unless both token-to-id maps and special ids are equal."""
    own = found.tokens
    if not found.special:  # GGUF converters write some of SentencePiece's added tokens with plain spaces
        own = {token if token in expected.tokens else token.replace(" ", "▁"): place for token, place in own.items()}
    different = [
        (token, expected.tokens.get(token), own.get(token))
        for token in expected.tokens.keys() | own.keys()
        if expected.tokens.get(token) != own.get(token)
    ]
    if different:
        order = 1 << 62
        different.sort(key=lambda item: (min(order if i is None else i for i in item[1:]), item[0]))
        shown = ", ".join(f"{token!r} {_id(one)} against {_id(other)}" for token, one, other in different[:3])
        raise UserError(
            where,
            f"its vocabulary differs from the reference's in {len(different)} tokens, first: {shown}",
            "pair models of one vocabulary (a shared tokenizer class is not enough)",
        )
    for name in expected.special.keys() & found.special.keys():
        if expected.special[name] != found.special[name]:
            raise UserError(
                where,
                f"its {name} is {found.special[name]}, the reference's {expected.special[name]}",
                "mend the tokenizer files of one of them",
            )


def _id(value: int | None) -> str:
    return "missing" if value is None else str(value)
