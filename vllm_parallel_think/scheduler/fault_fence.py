"""A fault in one group ends that group, never the engine."""

from __future__ import annotations

from types import TracebackType

from ..compat.logger import init_logger
from ..core.errors import OptionError, short_id
from .group_table import GroupState

logger = init_logger(__name__)

_INTERNAL = "internal error; the server's log says which, beside this request's id"


def fence(state: GroupState) -> _Fence:
    """Return a context in which an exception makes one group fail at the end of the step.

    What follows the ``with`` statement runs after a fault too.
    """
    return _Fence(state)


class _Fence:
    """A class, not a generator: it is entered for every row of a group in every step."""

    __slots__ = ("_state",)

    def __init__(self, state: GroupState) -> None:
        self._state = state

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        _fault(self._state, error)
        return True


def _fault(state: GroupState, error: Exception) -> None:
    """Take note of why a group fails.

    What went wrong first is what the client is told: the rest follows from it. An error that is no
    sentence for people stays in the log.
    """
    logger.error("request %s failed", short_id(state.root.request_id), exc_info=error)
    if state.error is None:
        state.error = str(error) if isinstance(error, OptionError) else _INTERNAL
