"""Loggers whose lines reach vLLM's log."""

from __future__ import annotations

import logging

PACKAGE = __name__.partition(".")[0]
ROOT = "vllm.parallel_think"
"""Beneath vLLM's own logger: the only one that vLLM gives a handler and the operator's level."""


def init_logger(name: str) -> logging.Logger:
    """Return the logger of a module of this package, given its ``__name__``.

    vLLM's ``init_logger`` takes the name as it stands. A logger outside ``vllm`` has no handler
    there, and Python's last resort shows warnings only.
    """
    return logging.getLogger(ROOT + name.removeprefix(PACKAGE))
