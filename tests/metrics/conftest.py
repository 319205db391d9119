"""The simulator's model, and a way to read what a scrape of this process would say."""

from tests.engine.conftest import tiny_model

__all__ = ["tiny_model"]
