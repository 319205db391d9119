"""Errors that people can act on."""


class OptionError(Exception):
    """A setting is wrong. The message says what was wrong, what is allowed, and which flag or key.

    Deliberately not a ``ValueError``: pydantic wraps those into pages of its own when they are
    raised while vLLM builds its configuration.
    """
