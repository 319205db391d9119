"""Counting tokens without a tokenizer."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .heads import TAG

_PIECE = re.compile(rf"{TAG.pattern}|\n| ?\w+| ?(?!{TAG.pattern})[^\w\s]|[^\S\n]+")

PIECE_RULE = "tags, line breaks, words and punctuation marks"
"""What counts as a token without a tokenizer; a blank belongs to the word after it."""


class PieceVocabulary:
    """Counts tokens without a tokenizer; see :data:`PIECE_RULE`."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._pieces: list[str] = []

    def piece(self, token_id: int) -> str:
        """Return the text of one token."""
        return self._pieces[token_id]

    def text(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens in a row."""
        return "".join(map(self.piece, token_ids))

    def encode(self, text: str) -> list[int]:
        """Split text into pieces; joining them gives the text again."""
        ids = []
        for piece in _PIECE.findall(text):
            if piece not in self._ids:
                self._ids[piece] = len(self._pieces)
                self._pieces.append(piece)
            ids.append(self._ids[piece])
        return ids
