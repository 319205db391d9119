"""What viewers see of a scheduler: its groups, what they keep busy, and the events they get.

Nothing here knows the scheduler: its classes satisfy these protocols, and it hands them over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from ..core.interface import Group


class ObservedGroup(Protocol):
    """One client request and its group; hashed by identity."""

    @property
    def request_id(self) -> str:
        """The id that the client's request has in the engine."""

    @property
    def arrival_time(self) -> float:
        """When the request arrived, in seconds of ``time.time``."""

    @property
    def trace_headers(self) -> Mapping[str, str] | None:
        """The client's trace, if it sent one."""

    @property
    def error(self) -> str | None:
        """Why the request failed, if it did."""

    @property
    def group(self) -> Group:
        """What decides."""


class ObservedGroups(Protocol):
    """The groups that a scheduler has not ended yet."""

    def __bool__(self) -> bool:
        """Return whether there are any."""

    def __iter__(self) -> Iterator[ObservedGroup]:
        """Iterate over them, the oldest first."""


@dataclass(frozen=True)
class Load:
    """What the groups of an engine keep busy.

    Attributes:
        groups: Requests that are branched.
        running: Their branches in the batch.
        waiting: Their branches that are not.
        held_blocks: KV blocks held by groups.

    """

    groups: int
    running: int
    waiting: int
    held_blocks: int


class Viewer:
    """Somebody who is notified of groups; a viewer overrides the events that it shows."""

    def started(self, observed: ObservedGroup) -> None:
        """A request that may branch has arrived."""

    def changed(self, observed: ObservedGroup) -> None:
        """Branches of a group forked, joined or ended since the last look."""

    def ended(self, observed: ObservedGroup, outcome: str) -> None:
        """A request has ended."""

    def stalled(self) -> None:
        """Steps without work had to be ended."""

    def load(self, load: Load) -> None:
        """At every look: what groups keep busy."""

    def write(self, groups: Iterable[ObservedGroup]) -> None:
        """At every look: the groups that have not ended."""
