"""Drafts by looking up what a text, or its siblings, wrote after the same words before."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]


def continuation(
    own: Tokens, others: Iterable[Tokens], num: int, longest: int = 4, shortest: int = 2
) -> list[int]:
    """Return up to ``num`` tokens that followed the text's last words elsewhere.

    The longest run of last words counts first, the text itself before others, and the latest place
    in a text. Source: prompt lookup (github.com/apoorvumang/prompt-lookup-decoding), over several
    texts.

    Args:
        own: [T] the text so far.
        others: Texts of siblings.
        num: Most tokens wanted.
        longest: Most last words to look for.
        shortest: Fewest.

    """
    texts = [own, *others]
    for size in range(min(longest, len(own)), shortest - 1, -1):
        words = own[len(own) - size :]
        for text in texts:
            place = _last_place(text, words)
            if place is not None:
                return [int(token) for token in text[place : place + num]]
    return []


def _last_place(text: Tokens, words: Tokens) -> int | None:
    """Return where the text goes on behind the last occurrence of words, if it does."""
    size = len(words)
    if len(text) <= size:
        return None
    windows = np.lib.stride_tricks.sliding_window_view(text[:-1], size)
    found = np.flatnonzero((windows == words).all(axis=1))
    return int(found[-1]) + size if len(found) else None


class SiblingTexts:
    """Texts by group, also of requests that have ended, for a bounded number of groups."""

    def __init__(self, max_groups: int = 256) -> None:
        self._max_groups = max_groups
        self._groups: OrderedDict[str, dict[str, Tokens]] = OrderedDict()

    def update(self, texts: Mapping[str, Tokens], group_of: Mapping[str, str]) -> None:
        """Take note of how far requests have got; those without a group have no siblings."""
        for request, text in texts.items():
            group = group_of.get(request)
            if group is None:
                continue
            self._groups.setdefault(group, {})[request] = np.array(text, dtype=np.int64)
            self._groups.move_to_end(group)
        while len(self._groups) > self._max_groups:
            self._groups.popitem(last=False)

    def others(self, request: str, group: str | None) -> Sequence[Tokens]:
        """Return the texts of a request's siblings, the latest first."""
        if group is None:
            return []
        texts = self._groups.get(group, {})
        return [text for name, text in reversed(texts.items()) if name != request]
