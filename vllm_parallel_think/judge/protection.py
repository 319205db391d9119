"""Tokens that only the standard test may accept: ends, special tokens, and tags of grammars."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from vllm.config import ModelConfig
from vllm.tokenizers import cached_tokenizer_from_config

from ..core.profile import Profile
from ..vocabulary import TokenizerVocabulary


def protected_tokens(model_config: ModelConfig, profiles: Iterable[Profile]) -> torch.Tensor:
    """Return [1 + P, V] bool: protected tokens without a grammar, then under each profile.

    A tag may be spelt by several tokens, cut in any way. A token is protected under a profile if
    its text contains the first or the last character of one of the profile's tags: no tag then
    begins or ends with a token that the target would not have written.
    """
    tokenizer = cached_tokenizer_from_config(model_config)
    vocab_size = model_config.get_vocab_size()
    special = torch.zeros(vocab_size, dtype=torch.bool)
    special[[i for i in _special_ids(model_config, tokenizer) if 0 <= i < vocab_size]] = True
    # Rows of the vocabulary head that no token has.
    special[len(tokenizer) :] = True
    piece = TokenizerVocabulary(tokenizer).piece
    pieces = [piece(i) for i in range(min(vocab_size, len(tokenizer)))]
    groups = [special]
    for profile in profiles:
        mask = special.clone()
        texts = [tag for tag in profile.tags if isinstance(tag, str) and tag]
        edges = {character for tag in texts for character in (tag[0], tag[-1])}
        mask[[i for i, piece in enumerate(pieces) if not edges.isdisjoint(piece)]] = True
        mask[[tag for tag in profile.tags if isinstance(tag, int) and tag < vocab_size]] = True
        groups.append(mask)
    return torch.stack(groups)


def _special_ids(model_config: ModelConfig, tokenizer: Any) -> set[int]:
    ids = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    for source in (
        model_config.try_get_generation_config().get("eos_token_id"),
        getattr(model_config.hf_text_config, "eos_token_id", None),
    ):
        ids.update([source] if isinstance(source, int) else source or ())
    return ids
