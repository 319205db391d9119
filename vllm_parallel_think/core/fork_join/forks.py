"""Forks: what is computed after a tag that ended a node, and the paths that it opens."""

from __future__ import annotations

from collections.abc import Sequence

from ..branch_graph import Fork, Kind, Lane, Node, PathName
from ..config.profile import Forced
from ..config.request_options import RequestOptions
from .budget import Budget
from .fork_policy import Endings
from .joins import Joins
from .node_tree import NodeTree
from .tag_scanner import Grammar, PointScanner


class Forks:
    """Follows nodes that a tag ended: opens paths, or completes one.

    Attributes:
        latest: The latest fork of the trunk.

    """

    def __init__(
        self,
        grammar: Grammar,
        options: RequestOptions,
        budget: Budget,
        tree: NodeTree,
        endings: Endings,
        joins: Joins,
        last_of_prompt: list[int],
    ) -> None:
        self.latest: Fork | None = None
        self._grammar = grammar
        self._profile = grammar.profile
        self._options = options
        self._budget = budget
        self._tree = tree
        self._endings = endings
        self._joins = joins
        self._last_of_prompt = last_of_prompt
        self._first_only = grammar.forced(self._profile.join.first_only)

    def follow(self, node: Node, ending: tuple[PathName, ...] | None, *, pending: bool) -> None:
        """Go on after a tag, once what is forced after it is computed.

        Args:
            node: What the tag ended.
            ending: Paths to open, or ``None`` to complete the lane.
            pending: Whether the node's last token has no K/V yet.

        """
        rule = self._profile.path if ending is None else self._profile.fork
        self._compute_after(node, pending, (), rule.after, ending)

    def close_path(self, node: Node, *, pending: bool) -> None:
        """Complete a path that did not end itself."""
        close = self._profile.path.close
        scanner = self._tree.scanners.get(node)
        if isinstance(scanner, PointScanner):
            close = (scanner.close("".join(map(str, close))),)
        forced = self._grammar.forced(close, node.lane.path)
        self._compute_after(node, pending, forced, self._profile.path.after, None)

    def _compute_after(
        self,
        node: Node,
        pending: bool,
        close: tuple[int, ...],
        after: Forced,
        ending: tuple[PathName, ...] | None,
    ) -> None:
        """Compute what an ended node lacks (its last token, a tag, a separator), then go on."""
        tail = self._grammar.forced(after)
        given = [*close, *tail]
        if pending:
            given.insert(0, self._tree.take_last_token(node))
        if not given:
            self.go_on(node, ending)
            return
        closing = self._tree.add_after(Kind.CLOSE, node, given, num_pending=int(pending))
        closing.num_after = len(tail)
        if ending is not None:
            self._endings[closing] = ending

    def go_on(self, node: Node, ending: tuple[PathName, ...] | None) -> None:
        """Go on after a node that has all of its K/V."""
        if ending is None:
            self._joins.complete(node.lane)
        else:
            self._fork(node, ending[: self._options.max_paths])

    def _fork(self, node: Node, names: Sequence[PathName]) -> None:
        # Shared out like the index space, so that no path's forks depend on its siblings' haste.
        share, node.lane.forks_left = divmod(node.lane.forks_left - 1, len(names) + 1)
        node.lane.forks_left += share
        room = self._budget.path_room(node, len(names))
        fork = Fork(node)
        if node.depth == 0:
            self.latest = fork
            self._joins.read_front(node, names)
        self._tree.tally.forked(node, len(names))
        critical, after = node.critical, node
        budget_end = self._budget_end(node)
        for number, name in enumerate(names):
            lane = Lane(
                depth=node.depth + 1,
                room=room,
                forks_left=share,
                fork=fork,
                name=name.name,
                title=name.title,
                tag=name.tag,
                thought=self._thought(name),
                budget_end=budget_end,
            )
            fork.lanes.append(lane)
            given, num_hidden = self._start(number, name)
            after = self._tree.add(
                Kind.PATH,
                lane,
                prefix=(*node.prefix, node),
                start=node.tag_end + number * self._profile.path.stride,
                given=given,
                num_hidden=num_hidden,
                critical_before=critical,
                after=after,
            )

    def _budget_end(self, node: Node) -> int | None:
        """Return the critical length at which the budget of a node's paths is used up."""
        ends = [] if node.lane.budget_end is None else [node.lane.budget_end]
        budget = self._options.path_tokens or self._profile.path.max_tokens
        if budget is not None:
            ends.append(node.critical + budget)
        return min(ends, default=None)

    def _start(self, number: int, name: PathName) -> tuple[list[int], int]:
        """Return what a path is given, and how much of that the client never sees."""
        if self._options.vote:
            return list(self._last_of_prompt), 1
        given = list(self._grammar.forced(self._profile.path.start, name))
        return given, len(self._first_only) if number else 0

    def _thought(self, name: PathName) -> int:
        """Return the number of a path's thought embedding; independent answers have none."""
        has_one = self._profile.path.num_tags is not None and not self._options.vote
        return int(name.tag) if has_one else 0
