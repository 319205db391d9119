"""Finished steps in the order in which they were finished: what every writer sees."""

from __future__ import annotations

from ..branch_graph import Node


class History:
    """Finished steps of a group, and whether their K/V is there.

    Attributes:
        steps: The steps; their K/V is there by the time that another node starts.
        num_tokens: Their tokens.

    """

    def __init__(self) -> None:
        self.steps: list[Node] = []
        self.num_tokens = 0
        self._num_checked = 0
        """Steps whose K/V was found to be there."""
        self._lost: list[Node] = []

    def append(self, node: Node) -> None:
        """Add a step that has just been finished."""
        self.steps.append(node)
        self.num_tokens += len(node.tokens)

    def insert_after(self, step: Node, node: Node) -> int:
        """Add what belongs right after a recent step; return its place."""
        place = place_after(self.steps, step)
        self.steps.insert(place, node)
        self.num_tokens += len(node.tokens)
        self._num_checked = min(self._num_checked, place)
        return place

    def note_lost(self, node: Node) -> None:
        """Take note that a node's K/V is gone, for now or for good."""
        self._lost.append(node)

    def check(self, trunk: Node) -> None:
        """Make sure that the K/V of all that a step sees is there.

        Raises:
            RuntimeError: A fault: it is not, and nobody computes it again.

        """
        lost = [node for node in self._lost if node is trunk or node in self.steps]
        new = self.steps[self._num_checked :] if self._num_checked else [trunk, *self.steps]
        if lost := [node for node in (*lost, *new) if not node.sealed]:
            raise RuntimeError(f"K/V of node {lost[0].index} was lost")
        self._lost.clear()
        self._num_checked = len(self.steps)


def place_after(nodes: list[Node], node: Node) -> int:
    """Return the place after a node that is one of the last; that after all, if it is none."""
    for place in range(len(nodes), 0, -1):
        if nodes[place - 1] is node:
            return place
    return len(nodes)
