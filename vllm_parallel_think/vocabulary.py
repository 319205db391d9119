"""A tokenizer as the grammar sees it."""

from __future__ import annotations

from typing import Any

from vllm.config import ModelConfig
from vllm.tokenizers import cached_tokenizer_from_config

from .core.errors import OptionError


class TokenizerVocabulary:
    """Text of single tokens, and tokens of forced text. Holds at most one string per token id."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._pieces: dict[int, str] = {}

    @classmethod
    def from_config(cls, model_config: ModelConfig) -> TokenizerVocabulary:
        """Load the served model's tokenizer.

        Raises:
            OptionError: The server was started without a tokenizer.

        """
        tokenizer = cached_tokenizer_from_config(model_config)
        if tokenizer is None:
            raise OptionError("parallel_think needs the tokenizer: drop --skip-tokenizer-init")
        return cls(tokenizer)

    def piece(self, token_id: int) -> str:
        """Return the text of one token, special tokens included."""
        text = self._pieces.get(token_id)
        if text is None:
            text = self._tokenizer.decode([token_id], skip_special_tokens=False)
            self._pieces[token_id] = text
        return text

    def encode(self, text: str) -> list[int]:
        """Tokenise text without adding special tokens around it."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))
