"""Things that may fail for a while: when to try again, and saying so once each way."""

from __future__ import annotations

import time
from collections.abc import Callable

FIRST_PAUSE = 10.0
LONGEST_PAUSE = 600.0
"""Seconds between tries: the pause doubles while things go on failing."""


class Outage:
    """Whether something fails at the moment.

    What goes up and down all the time is tried as seldom as what stays down, so it fills no log.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lasts = False
        self._pause = 0.0
        self._next_try = 0.0
        self._over_at = -LONGEST_PAUSE

    def due(self) -> bool:
        """Return whether it may be tried now; reads the clock only during an outage."""
        return not self._lasts or self._clock() >= self._next_try

    def failed(self) -> bool:
        """Record a failure; return whether it is the first, which is to be said."""
        now, first = self._clock(), not self._lasts
        if first and now - self._over_at >= LONGEST_PAUSE:
            self._pause = 0.0
        self._pause = min(max(2 * self._pause, FIRST_PAUSE), LONGEST_PAUSE)
        self._next_try = now + self._pause
        self._lasts = True
        return first

    def ended(self) -> bool:
        """Record a success; return whether it ends an outage, which is to be said."""
        if not self._lasts:
            return False
        self._lasts = False
        self._over_at = self._clock()
        return True
