"""Which worker's block headers the step reads that this process runs now."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .block_headers import BlockHeaderTensors

_current: weakref.ref[BlockHeaderTensors] | None = None


def enter(headers: BlockHeaderTensors | None) -> None:
    """Make a worker's headers those of whatever this process runs next; ``None``: nobody's.

    As with vLLM's own forward context, one engine at a time is at work in a process. A key in
    vLLM's configuration would not do: ``instance_id`` is renewed while the configuration is in use,
    which a worker that shares it with its engine sees.
    """
    global _current
    _current = None if headers is None else weakref.ref(headers)


def current() -> BlockHeaderTensors | None:
    """Return the headers of the worker that is at work, if it has made them."""
    return None if _current is None else _current()
