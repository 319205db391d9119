"""Tokenizers small enough to see through: a pattern says what is one token."""

from __future__ import annotations

import re
from collections.abc import Sequence


class Pieces:
    """A vocabulary that grows as it meets new pieces; joining pieces gives the text again."""

    def __init__(self, pattern: str) -> None:
        self._pattern = re.compile(pattern, re.DOTALL)
        self._ids: dict[str, int] = {}
        self._pieces: list[str] = []

    def piece(self, token_id: int) -> str:
        return self._pieces[token_id] if token_id >= 0 else ""

    def encode(self, text: str) -> list[int]:
        tokens = []
        for piece in self._pattern.findall(text):
            if piece not in self._ids:
                self._ids[piece] = len(self._pieces)
                self._pieces.append(piece)
            tokens.append(self._ids[piece])
        return tokens

    def text(self, token_ids: Sequence[int]) -> str:
        return "".join(map(self.piece, token_ids))


def chars() -> Pieces:
    """One token per character."""
    return Pieces(".")


def tags() -> Pieces:
    """One token per tag, line break, word and mark, as models trained on a grammar have it."""
    return Pieces(r"</?\w+>|\n| ?\w+|.")


def odd() -> Pieces:
    """Tags in pieces; the tail of a tag swallows what follows, be it a line break or a bracket."""
    return Pieces(r">\n|></?|</?|[A-Za-z]{1,4}|.")


class Bytes:
    """One token per byte, as where a tokenizer knows no better for a character."""

    def piece(self, token_id: int) -> str:
        return self.text([token_id])

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def text(self, token_ids: Sequence[int]) -> str:
        return bytes(token for token in token_ids if token >= 0).decode("utf-8", "replace")


ALL = (chars, tags, odd)
