"""When each part of a request was written, for pictures and spans."""

from __future__ import annotations

from dataclasses import dataclass

from .branch_graph import Node, State
from .interface import Group


@dataclass(frozen=True)
class TimelineSegment:
    """A run of tokens of one lane; times are by the group's clock.

    Attributes:
        lane: The lane's place in the tree; ``0`` is the trunk.
        parent: Place of the lane it was forked from; empty for the trunk.
        kind: ``trunk``, ``path``, ``close`` (what is computed after a path's end) or
            ``conclusion``.
        name: What the text calls the path; empty for the trunk.
        title: The path's title, where the grammar has one.
        depth: Nesting; the trunk has 0.
        started: When it was handed to vLLM; ``None`` while it waits for its prefix.
        first: When its first token was sampled, if one was.
        ended: When it ended, if it has.
        tokens: Sampled tokens so far.
        cut: Whether the client does not see all of it, as the answer ended before.

    """

    lane: str
    parent: str
    kind: str
    name: str
    title: str
    depth: int
    started: float | None
    first: float | None
    ended: float | None
    tokens: int
    cut: bool


def segments(group: Group) -> list[TimelineSegment]:
    """Return a request's parts in the order of the text."""
    cut_off = set(group.after_end)
    nodes = [*group.nodes, *group.outvoted]
    return [_segment(node, node.state is State.DROPPED or node in cut_off) for node in nodes]


def _segment(node: Node, cut: bool) -> TimelineSegment:
    lane = node.lane
    return TimelineSegment(
        lane=lane.address,
        parent=lane.fork.parent.lane.address if lane.fork is not None else "",
        kind=node.kind.value,
        name=lane.name,
        title=lane.title,
        depth=lane.depth,
        started=node.started_at,
        first=node.first_at,
        ended=node.ended_at,
        tokens=node.num_sampled,
        cut=cut,
    )
