"""What tokens say: which hold a line break, and whether two models mean the same by them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

PADDING = re.compile(r"\[PAD\d+\]")
"""What GGUF files call rows of an embedding that no token has."""


def line_ids(tokenizer: Any) -> frozenset[int]:
    """Return the tokens whose text holds a line break.

    Many vocabularies have dozens or thousands: a line's end and an empty line are one token, or a
    full stop and a line's end.
    """
    return frozenset(i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i]))


@dataclass(frozen=True)
class VocabularyContents:
    """A model's tokens.

    Attributes:
        name: Path or name of the model.
        tokens: Token by id.
        extra: Tokens that mean no text: added ones, and padding.
        num_rows: Rows of the model's embedding, which may be padded.

    """

    name: str
    tokens: Mapping[int, str]
    extra: Collection[int]
    num_rows: int

    @classmethod
    def of(cls, name: str, tokenizer: Any, num_rows: int) -> VocabularyContents:
        """Return the vocabulary of a tokenizer."""
        tokens = {i: str(token) for token, i in tokenizer.get_vocab().items()}
        padding = (i for i, token in tokens.items() if PADDING.fullmatch(token))
        return cls(name, tokens, {*tokenizer.get_added_vocab().values(), *padding}, num_rows)

    @classmethod
    def load(cls, path: str) -> VocabularyContents:
        """Read the vocabulary of a model's files; its weights are not read."""
        from transformers import AutoConfig, AutoTokenizer

        num_rows = AutoConfig.from_pretrained(path).get_text_config().vocab_size
        return cls.of(path, AutoTokenizer.from_pretrained(path), num_rows)


def check_pair(target: str, draft: str) -> None:
    """Refuse a draft whose vocabulary is not its target's, before any weights are read.

    Raises:
        ValueError: Says what differs, and what to do.

    """
    refuse_other(VocabularyContents.load(target), VocabularyContents.load(draft))


def refuse_other(target: VocabularyContents, draft: VocabularyContents) -> None:
    """Refuse a draft to which token ids mean something else than to its target.

    A padded embedding on one side is no difference, nor are special tokens that one side lacks,
    as long as the other has rows for them.

    Raises:
        ValueError: Says what differs, and what to do.

    """
    differs = _other_tokens(target, draft)
    for one, other in ((target, draft), (draft, target)):
        differs = differs or _missing_tokens(one, other)
    if differs:
        raise ValueError(
            f"{draft.name} cannot draft for {target.name}, whose vocabulary is another one: "
            f"{differs}; take a smaller model of the target's family, or make a draft of the "
            "target with `python -m spec_decode distill`"
        )


def _other_tokens(target: VocabularyContents, draft: VocabularyContents) -> str | None:
    both = target.tokens.keys() & draft.tokens.keys()
    if others := [i for i in both if target.tokens[i] != draft.tokens[i]]:
        first = min(others)
        return (
            f"{len(others)} of {len(both)} token ids stand for other tokens, the first is {first}, "
            f"{target.tokens[first]!r} to the target and {draft.tokens[first]!r} to the draft"
        )
    return None


def _missing_tokens(one: VocabularyContents, other: VocabularyContents) -> str | None:
    if missing := [
        i
        for i in one.tokens.keys() - other.tokens.keys()
        if i not in one.extra or i >= other.num_rows
    ]:
        first = min(missing)
        return (
            f"{other.name} lacks {len(missing)} tokens of {one.name}, the first is "
            f"{one.tokens[first]!r} ({first})"
        )
    return None
