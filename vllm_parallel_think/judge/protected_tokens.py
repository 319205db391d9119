"""Tokens that only the standard test may accept: ends, special tokens, tags, stop strings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from vllm.config import ModelConfig
from vllm.tokenizers import cached_tokenizer_from_config

from ..core.config.profile import Profile
from ..tokenizer import TokenizerVocabulary


def protected_tokens(model_config: ModelConfig, profiles: Iterable[Profile]) -> torch.Tensor:
    """Return [1 + P, V] bool: protected tokens without a grammar, then under each profile.

    A tag may be spelt by several tokens, cut in any way. A token is protected under a profile if
    its text contains the first or the last character of one of the profile's tags: no tag then
    begins or ends with a token that the target would not have written.
    """
    tokenizer = cached_tokenizer_from_config(model_config)
    vocab_size = model_config.get_vocab_size()
    pieces = token_texts(model_config)
    special = torch.zeros(vocab_size, dtype=torch.bool)
    special[[i for i in _special_ids(model_config, tokenizer) if 0 <= i < vocab_size]] = True
    # Rows of the vocabulary head that no token has.
    special[len(tokenizer) :] = True
    groups = [special]
    for profile in profiles:
        mask = special.clone()
        texts = [tag for tag in profile.tags if isinstance(tag, str) and tag]
        edges = _edges(texts)
        mask[[i for i, piece in enumerate(pieces) if not edges.isdisjoint(piece)]] = True
        mask[[tag for tag in profile.tags if isinstance(tag, int) and tag < vocab_size]] = True
        groups.append(mask)
    return torch.stack(groups)


def token_texts(model_config: ModelConfig) -> list[str]:
    """Return the text of every token that the tokenizer has."""
    tokenizer = cached_tokenizer_from_config(model_config)
    piece = TokenizerVocabulary(tokenizer).piece
    return [piece(i) for i in range(min(model_config.get_vocab_size(), len(tokenizer)))]


def _edges(texts: Iterable[str]) -> set[str]:
    return {character for text in texts for character in (text[0], text[-1])}


class StopStrings:
    """Tokens with the first or last character of a stop string, for each set of them in use.

    The front end finds stop strings in the text, wherever tokens cut it: as with tags, none then
    begins or ends with a token that the target would not have written. Requests with equal stop
    strings share a row; the number of rows is fixed.

    Attributes:
        masks: [1 + rows, V] bool, on the device and never moved; row 0 protects nothing.

    """

    def __init__(
        self, pieces: Sequence[str], vocab_size: int, device: torch.device, num_rows: int = 32
    ) -> None:
        self.masks = torch.zeros(1 + num_rows, vocab_size, dtype=torch.bool, device=device)
        tokens = defaultdict[str, list[int]](list)
        for number, piece in enumerate(pieces):
            for character in set(piece):
                tokens[character].append(number)
        self._tokens = {character: torch.tensor(ids) for character, ids in tokens.items()}
        self._free = list(range(1, 1 + num_rows))
        self._rows: dict[frozenset[str], int] = {}
        self._users = [0] * (1 + num_rows)

    def acquire(self, stops: Collection[str]) -> int | None:
        """Return the row for a request's stop strings, or ``None`` while all rows are in use."""
        key = frozenset(stop for stop in stops if stop)
        if not key:
            return 0
        row = self._rows.get(key)
        if row is None:
            if not self._free:
                return None
            row = self._rows[key] = self._free.pop()
            mask = torch.zeros(self.masks.shape[1], dtype=torch.bool)
            for character in _edges(key):
                if (ids := self._tokens.get(character)) is not None:
                    mask[ids] = True
            if self.masks.is_cuda:
                mask = mask.pin_memory()
            self.masks[row].copy_(mask, non_blocking=True)
        self._users[row] += 1
        return row

    def release(self, row: int) -> None:
        """Give a row back that :meth:`acquire` returned; 0 is nobody's."""
        if row == 0:
            return
        self._users[row] -= 1
        if not self._users[row]:
            del self._rows[next(key for key, used in self._rows.items() if used == row)]
            self._free.append(row)


def _special_ids(model_config: ModelConfig, tokenizer: Any) -> set[int]:
    ids = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    for source in (
        model_config.try_get_generation_config().get("eos_token_id"),
        getattr(model_config.hf_text_config, "eos_token_id", None),
    ):
        ids.update([source] if isinstance(source, int) else source or ())
    return ids
