"""The simulator needs a model's configuration and tokenizer, not its weights."""

from tests.engine.conftest import tiny_model

__all__ = ["tiny_model"]
