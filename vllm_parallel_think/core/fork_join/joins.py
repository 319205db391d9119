"""Joins: paths that are complete, and the conclusion that follows all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..branch_graph import Fork, Kind, Lane, Node, PathName
from ..config.request_options import RequestOptions
from .node_tree import NodeTree
from .tag_scanner import Grammar

LANGUAGE_TOKENS = 64
"""Tokens before a list that show the language of the answer."""


class Joins:
    """Joins the lanes of a fork once all of them are complete.

    Attributes:
        mode: ``kv`` reuses the K/V of all paths; ``reprefill`` computes a linear copy.

    """

    def __init__(
        self,
        grammar: Grammar,
        options: RequestOptions,
        tree: NodeTree,
        clock: Callable[[], float],
    ) -> None:
        self.mode = options.join or grammar.profile.join.mode
        self._grammar = grammar
        self._rule = grammar.profile.join
        self._tree = tree
        self._clock = clock
        self._waits: list[float] = []
        self._reads_like = ""
        """Text before the paths and their titles, which shows the answer's language."""

    def read_front(self, node: Node, names: Sequence[PathName]) -> None:
        """Take note of how the answer reads up to its paths, titles included."""
        if not self._rule.starts:
            return
        nodes = (*node.prefix, node)
        tokens = [t for n in nodes for t in n.tokens[n.num_given :][-LANGUAGE_TOKENS:]]
        text = self._grammar.vocabulary.text(tokens)
        self._reads_like = "\n".join((text, *(name.title for name in names)))

    def complete(self, lane: Lane) -> None:
        """Take note that nothing more will be written in a path; the last one brings the join."""
        lane.complete = True
        lane.completed_at = self._clock()
        fork = lane.fork
        assert fork is not None, "the trunk never completes as a path"
        if all(sibling.complete for sibling in fork.lanes):
            self._join(fork)

    def take_waits(self) -> list[float]:
        """Return how many seconds each path waited for its join, each path once."""
        waits, self._waits = self._waits, []
        return waits

    def _join(self, fork: Fork) -> None:
        joined_at = self._clock()
        self._waits += [joined_at - (lane.completed_at or joined_at) for lane in fork.lanes]
        parent = fork.parent
        inner = [node for lane in fork.lanes for node in lane.all_nodes]
        given = list(self._grammar.forced(self._grammar.join_start(self._reads_like)))
        if self.mode == "kv":
            prefix = (*parent.prefix, parent, *inner)
            start, copies = self._position(fork), []
        else:
            prefix = (*parent.prefix, parent)
            start, copies = parent.end, [t for n in inner for t in n.tokens[n.num_hidden :]]
            self._tree.retire(inner)
        parent.lane.all_nodes.extend(inner)
        self._tree.add(
            Kind.CONCLUSION,
            parent.lane,
            prefix=prefix,
            start=start,
            given=[*copies, *given],
            num_hidden=len(copies),
            critical_before=max(node.critical for node in inner),
            after=inner[-1],
        )

    def _position(self, fork: Fork) -> int:
        """Return the position of a conclusion's first token over reused K/V."""
        if self._rule.position == "total":
            lengths = (lane.end - lane.nodes[0].start for lane in fork.lanes)
            return fork.parent.tag_end + sum(lengths)
        return max(lane.end for lane in fork.lanes)
