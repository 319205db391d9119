"""What the core needs of a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Pieces(Protocol):
    """Tokens to text."""

    def piece(self, token_id: int) -> str:
        """Return the text of one token, special tokens included."""

    def text(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens in a row: a character may take several of them."""


class Vocabulary(Pieces, Protocol):
    """Tokens to text, and text to tokens."""

    def encode(self, text: str) -> list[int]:
        """Tokenise text without adding special tokens around it."""
