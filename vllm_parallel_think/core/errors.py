"""Errors that people can act on."""


class OptionError(Exception):
    """A setting is wrong. The message says what was wrong, what is allowed, and which flag or key.

    Deliberately not a ``ValueError``: pydantic wraps those into pages of its own when they are
    raised while vLLM builds its configuration.
    """


QUOTED_CHARACTERS = 80
"""Of a value that an error quotes; who sent it knows the rest."""


def quoted(value: object) -> str:
    """Return a value as an error quotes it: whatever it is, in one short line."""
    if isinstance(value, str) and len(value) > QUOTED_CHARACTERS:
        return f"{value[:QUOTED_CHARACTERS]!r}… ({len(value)} characters)"
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or a number of too many digits
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= QUOTED_CHARACTERS else f"{text[:QUOTED_CHARACTERS]}…"


def shortened(text: str, most: int = QUOTED_CHARACTERS) -> str:
    """Return a text of somebody else's in one line, cut where it is very long."""
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= most else f"{text[:most]}…"


MAX_ID = 120
"""Characters of a request's id that people get to see; clients choose it by ``X-Request-Id``."""


def short_id(request_id: str) -> str:
    """Return an id for people: a long one without its middle, as vLLM tells ids apart at the end.

    Nothing is looked up by it.
    """
    if len(request_id) <= MAX_ID:
        return request_id
    tail = MAX_ID // 3
    return f"{request_id[: MAX_ID - tail - 1]}…{request_id[-tail:]}"
