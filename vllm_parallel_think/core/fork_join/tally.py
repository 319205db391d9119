"""Sums over a request's nodes and forks, kept as they grow: a step does not walk over the nodes."""

from __future__ import annotations

from ..branch_graph import Kind, Node


class Tally:
    """What a request has written so far.

    Attributes:
        num_visible: Tokens the client sees, or will see.
        num_sampled: Sampled tokens.
        num_forced: Tokens the client sees that nobody sampled.
        critical: Sampled tokens on the longest chain.
        num_reused: Tokens whose K/V nodes took over from their prefix.
        num_forks: Forks.
        num_paths: Paths that they opened.
        num_cut: Paths that did not end themselves.
        widest: Paths of the widest fork, 1 without one.
        deepest: Deepest nesting.

    """

    def __init__(self) -> None:
        self.num_visible = self.num_sampled = self.num_forced = self.critical = 0
        self.num_reused = self.num_forks = self.num_paths = self.num_cut = self.deepest = 0
        self.widest = 1

    def add(self, node: Node) -> None:
        """Take note of a new node with its given tokens."""
        self.num_visible += node.num_visible
        self.num_sampled += node.num_sampled
        if node.kind is not Kind.OUTLINE:
            self.num_forced += node.num_given - node.num_hidden - node.num_pending
        self._reach(node)

    def fed(self, node: Node) -> None:
        """Take note that a node's last token was sampled."""
        self.num_visible += node.kind is not Kind.OUTLINE
        self.num_sampled += 1
        self._reach(node)

    def taken_back(self) -> None:
        """Take note that a sampled token left its node, to be given to the one after it."""
        self.num_visible -= 1
        self.num_sampled -= 1

    def forked(self, node: Node, num_paths: int) -> None:
        """Take note that so many paths were opened after a node."""
        self.num_forks += 1
        self.num_paths += num_paths
        self.widest = max(self.widest, num_paths)
        self.deepest = max(self.deepest, node.depth + 1)

    def _reach(self, node: Node) -> None:
        self.critical = max(self.critical, node.critical)
