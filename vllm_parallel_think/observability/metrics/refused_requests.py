"""Counting refused requests, in the front end that refuses them."""

from __future__ import annotations

from ...compat.logger import init_logger
from .instruments import REFUSALS, instruments

logger = init_logger(__name__)

_enabled = False


def enable() -> None:
    """Create the counter with all its reasons at zero; safe to call again."""
    global _enabled
    made = instruments()
    if made is not None:
        for reason in REFUSALS:
            made.refused.at(reason)
    _enabled = made is not None


def count(reason: str) -> None:
    """Count one refusal, under a reason of :data:`REFUSALS`; never raises."""
    if not _enabled:
        return
    try:
        made = instruments()
        if made is not None:
            made.refused.at(reason if reason in REFUSALS else "other").inc()
    except Exception:
        logger.exception("a refused request was not counted")
