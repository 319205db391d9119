"""All nodes of a group of writers: whose they are, and in which order the text has them."""

from __future__ import annotations

from collections.abc import Sequence

from ..branch_graph import Kind, Lane, Node
from .history import place_after
from .writer import Writer


class NodeTable:
    """Nodes by role, and the sums over them.

    Attributes:
        order: Nodes in the order of the text; a step comes into it when it is finished.
        roles: Whose each node is, in the order in which they were made.
        headers: Nodes of the two headers.
        answer: The node that writes the answer after all steps, if there is one.
        num_tokens: Tokens of all nodes, the prompt's included.
        num_hidden: Tokens of the prompt and of the headers, which are no part of the answer.
        num_settled: Visible tokens of the nodes in the text, when they came into it.
        num_forced: Those of them that nobody sampled.

    """

    def __init__(self, order: list[Node]) -> None:
        self.order = order
        self.roles: dict[Node, int] = {}
        self.headers: list[Node] = []
        self.answer: Node | None = None
        self.num_tokens = self.num_hidden = self.num_settled = self.num_forced = 0

    def add(
        self,
        kind: Kind,
        lane: Lane,
        role: int,
        given: list[int],
        *,
        num_hidden: int = 0,
        num_pending: int = 0,
        critical_before: int = 0,
    ) -> Node:
        """Add a node, which is no part of the text yet."""
        node = Node(
            index=len(self.roles),
            kind=kind,
            lane=lane,
            prefix=(),
            start=0,
            tokens=given,
            num_given=len(given),
            num_hidden=num_hidden,
            critical_before=critical_before,
            limit=None,
            num_pending=num_pending,
            place=len(lane.nodes),
        )
        lane.nodes.append(node)
        lane.all_nodes.append(node)
        self.roles[node] = role
        self.num_tokens += len(given)
        return node

    def append(self, node: Node) -> None:
        """Put a node at the end of the text."""
        self._put(node, len(self.order))

    def insert_after(self, step: Node, node: Node) -> None:
        """Put a node right after a step in the text."""
        self._put(node, place_after(self.order, step))

    def _put(self, node: Node, place: int) -> None:
        self.order.insert(place, node)
        self.num_settled += node.num_visible
        self.num_forced += len(node.forced_visible)

    def num_visible(self, writers: Sequence[Writer]) -> int:
        """Return how many tokens of the answer stay as they are, those without K/V included."""
        return self.num_settled + sum(writer.carry is not None for writer in writers)

    def newest(self, writers: Sequence[Writer]) -> list[Node]:
        """Return nodes that may still be written: headers, each writer's step and the answer."""
        answer = [self.answer] if self.answer is not None else []
        steps = sorted((writer.node for writer in writers), key=lambda node: node.index)
        return [*self.headers, *steps, *answer]
