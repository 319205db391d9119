"""How much a branch may write: index space, positions and budgets."""

from __future__ import annotations

from collections.abc import Sequence

from ..branch_graph import Kind, Lane, Node, PathName
from ..characters import MAX_REST
from ..config.request_options import RequestOptions
from ..interface import Limits
from .outline import CLOSE_FENCE
from .tag_scanner import Grammar

MIN_PATH_TOKENS = 16
"""A fork must leave every path room for this many sampled tokens."""

MIN_CONCLUSION_TOKENS = 32
"""A fork must leave the conclusion room for this many sampled tokens."""


class Budget:
    """The arithmetic of one group's limits."""

    def __init__(self, grammar: Grammar, options: RequestOptions, limits: Limits) -> None:
        self._grammar = grammar
        self._profile = grammar.profile
        self._options = options
        self._limits = limits

    def blocks_of(self, node: Node) -> int:
        """Return how many KV blocks a node's own tokens fill."""
        return -(-len(node.tokens) // self._limits.block_size)

    def fits_in_index(self, node: Node, names: Sequence[PathName]) -> bool:
        """Whether paths after a node have room for some tokens, and a conclusion after them."""
        enough = self.path_room(node, len(names)) >= self.min_path_blocks(names)
        return enough and self._positions_fit(node, names)

    def path_room(self, node: Node, count: int) -> int:
        """Blocks each of ``count`` paths may fill, so that the conclusion's index space fits.

        A conclusion spans its prefix and all paths, block by block, which is far more than its
        positions; sharing the room out at the fork makes a path's length independent of its
        siblings.
        """
        block_size = self._limits.block_size
        used = self._used(node.lane)
        start = self._grammar.longest_join_start
        conclusion = -(-(start + MIN_CONCLUSION_TOKENS + 1) // block_size)
        after = self._grammar.forced(self._profile.fork.after)
        if after and node.kind is not Kind.CLOSE:  # a node of its own, with the trigger
            conclusion += -(-(1 + len(after)) // block_size)
        inside = self._close_blocks() if node.depth else 0
        return (node.lane.room - used - conclusion - inside) // count

    def min_path_blocks(self, names: Sequence[PathName]) -> int:
        """Return the blocks that the shortest path worth a fork fills."""
        start = self._profile.path.start
        longest = max(len(self._grammar.forced(start, name)) for name in names)
        # One more, as the step that computes an end tag samples a token of no use.
        length = longest + MIN_PATH_TOKENS + MAX_REST + 1
        return -(-length // self._limits.block_size) + self._close_blocks()

    def fits_draft(self, lane: Lane, num_given: int) -> bool:
        """Whether one more title fits after so many given tokens, whatever stands before them."""
        outline = self._profile.outline
        assert outline is not None
        room = (lane.room - self._used(lane)) * self._limits.block_size
        return room > num_given + outline.max_title_tokens

    def bound(self, node: Node, num_visible: int) -> None:
        """Say how much a new node may sample, and how much it must.

        Args:
            node: The node, not yet in its lane.
            num_visible: Visible tokens of the nodes that are there.

        """
        self._bound_below(node, num_visible)
        room, most = self._rooms(node), self._visible_left(node, num_visible)
        budgets = self._budgets(node)
        if node.depth:  # a path that runs out of room is cut between characters, too
            budgets += [left - MAX_REST for left in room]
        most += room
        if most or budgets:
            node.limit = max(1, min(most + budgets))
            node.most = max(node.limit, min(most, default=node.limit + MAX_REST))

    def _bound_below(self, node: Node, num_visible: int) -> None:
        """Say what the client's ``min_tokens`` asks of a node.

        What stands before a path must not depend on how fast its siblings are, so only what
        the path sees counts.
        """
        own = node.num_visible
        if self._options.vote and node.depth:
            node.num_front = own  # the whole answer, if it wins
        elif node.depth:
            node.num_front = own + sum(seen.num_visible for seen in node.prefix)
            return
        else:
            node.num_front = own + num_visible
        if node.kind is not Kind.OUTLINE:
            node.least = max(0, self._limits.min_tokens - node.num_front)

    def _rooms(self, node: Node) -> list[int]:
        """Return for how many tokens there are blocks and positions."""
        lane, rooms = node.lane, []
        if node.kind is not Kind.TRUNK:
            room = lane.room - self._used(lane) - (self._close_blocks() if lane.depth else 0)
            rooms.append(room * self._limits.block_size - len(node.tokens) - 1)
            if self._profile.path.stride:
                rooms.append(self._positions_left(node.end, in_path=lane.depth > 0))
        return rooms

    def _visible_left(self, node: Node, num_visible: int) -> list[int]:
        """Return how much of the client's ``max_tokens`` is left to a node that may end it."""
        if self._options.vote and node.depth:
            return [self._limits.max_tokens]
        if node.kind in (Kind.CONCLUSION, Kind.REST) and node.depth == 0:
            return [self._limits.max_tokens - num_visible - node.num_visible]
        return []

    def _budgets(self, node: Node) -> list[int]:
        """Return after how many tokens a node is to be cut."""
        lane, budgets = node.lane, []
        if lane.budget_end is not None:
            budgets.append(lane.budget_end - node.critical_before)
        if self._options.critical_tokens is not None:
            budgets.append(self._options.critical_tokens - node.critical_before)
        summarises = node.kind is Kind.CONCLUSION and lane.depth == 0
        if self._options.summary_tokens is not None and summarises:
            budgets.append(self._options.summary_tokens)
        if node.kind is Kind.OUTLINE and self._profile.outline is not None:
            budgets.append(self._profile.outline.max_title_tokens)
        return budgets

    def _positions_fit(self, node: Node, names: Sequence[PathName]) -> bool:
        """Whether paths that start further and further on all end below the model's length.

        Without a stride a position is never above the token's place in the index space.
        """
        stride, start = self._profile.path.stride, self._profile.path.start
        if not stride:
            return True
        longest = max(len(self._grammar.forced(start, name)) for name in names)
        first = node.tag_end + (len(names) - 1) * stride + longest
        return self._positions_left(first, in_path=True) >= MIN_PATH_TOKENS + MAX_REST

    def _positions_left(self, position: int, *, in_path: bool) -> int:
        """Positions for sampled tokens from here on, less those of what must still follow."""
        after = 1
        if in_path:
            rule = self._profile
            parts = (rule.path.close, rule.path.after)
            after += MIN_CONCLUSION_TOKENS + self._grammar.longest_join_start
            after += sum(len(self._grammar.forced(p)) for p in parts)
        return self._limits.index_blocks * self._limits.block_size - position - after

    def _used(self, lane: Lane) -> int:
        return sum(self.blocks_of(node) for node in lane.all_nodes if not node.retired)

    def _close_blocks(self) -> int:
        rule = self._profile.path
        length = 1 + sum(len(self._grammar.forced(part)) for part in (rule.close, rule.after))
        if self._profile.outline is not None:
            length += len(self._grammar.forced((CLOSE_FENCE,)))
        return -(-length // self._limits.block_size)
