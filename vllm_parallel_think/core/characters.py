"""Text of tokens as whole characters: a byte-level token may hold a part of one."""

from __future__ import annotations

from .vocabulary import Pieces

_INCOMPLETE = "\ufffd"
"""How a tokenizer writes bytes that are not a whole character."""

_MAX_BYTES = 4
"""Bytes of the longest character in UTF-8: no more tokens than that share one."""

MAX_REST = _MAX_BYTES - 1
"""Most tokens that a character still needs once its first one is there."""


class Characters:
    """Reads tokens in a row; what one of them only begins comes with a later one."""

    def __init__(self, vocabulary: Pieces) -> None:
        self._vocabulary = vocabulary
        self._partial: list[int] = []

    @property
    def whole(self) -> bool:
        """Whether the text may be cut here: no character has begun that later tokens complete.

        Bytes that no token completes count as whole once the longest character would be over.
        """
        return not self._partial

    def feed(self, token_id: int) -> str:
        """Return the text that a token completes."""
        piece = self._vocabulary.piece(token_id)
        if not self._partial and _INCOMPLETE not in piece:
            return piece
        self._partial.append(token_id)
        piece = self._vocabulary.text(self._partial)
        if piece.endswith(_INCOMPLETE) and len(self._partial) < _MAX_BYTES:
            return ""
        self._partial.clear()
        return piece
