"""A tokenizer as the grammar sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .core.errors import OptionError

if TYPE_CHECKING:
    from vllm.config import ModelConfig


class TokenizerVocabulary:
    """Text of tokens, and tokens of forced text. Holds at most one string per token id.

    Tokens are decoded after an ordinary one, whose text is cut off again: SentencePiece tokenizers
    drop the blank before whatever they decode first.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._pieces: dict[int, str] = {}
        self._anchor = self.encode("a")[-1:]
        self._anchor_text = self._decode(self._anchor)

    @classmethod
    def from_config(cls, model_config: ModelConfig) -> TokenizerVocabulary:
        """Load the served model's tokenizer.

        Raises:
            OptionError: The server was started without a tokenizer.

        """
        from vllm.tokenizers import cached_tokenizer_from_config  # takes seconds to import

        tokenizer = cached_tokenizer_from_config(model_config)
        if tokenizer is None:
            raise OptionError("parallel_think needs the tokenizer: drop --skip-tokenizer-init")
        return cls(tokenizer)

    def piece(self, token_id: int) -> str:
        """Return the text of one token, special tokens included."""
        text = self._pieces.get(token_id)
        if text is None:
            text = self._pieces[token_id] = self.text([token_id])
        return text

    def text(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens in a row, special tokens included."""
        text = self._decode([*self._anchor, *token_ids])
        if not text.startswith(self._anchor_text):
            return self._decode(token_ids)
        return text[len(self._anchor_text) :]

    def encode(self, text: str) -> list[int]:
        """Tokenise text without adding special tokens around it."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _decode(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=False)
        return text
