"""How much a branch may write: index space, positions and budgets."""

from __future__ import annotations

from collections.abc import Sequence

from .exchange import Limits
from .graph import Kind, Lane, Node
from .options import RequestOptions
from .scan import Grammar, PathName

MIN_PATH_TOKENS = 16
"""A fork must leave every path room for this many sampled tokens."""

MIN_CONCLUSION_TOKENS = 32
"""A fork must leave the conclusion room for this many sampled tokens."""


class Room:
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
        """Whether paths behind a node have room for some tokens, and a conclusion behind them."""
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
        start = len(self._grammar.forced(self._profile.join.start))
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
        length = longest + MIN_PATH_TOKENS + 1
        return -(-length // self._limits.block_size) + self._close_blocks()

    def limit(self, node: Node, num_visible: int) -> int | None:
        """Return the most tokens a new node may sample; ``None`` leaves that to vLLM.

        Args:
            node: The node, not yet in its lane.
            num_visible: Visible tokens of the nodes that are there.

        """
        lane, limits = node.lane, []
        if node.kind is not Kind.TRUNK:
            room = lane.room - self._used(lane) - (self._close_blocks() if lane.depth else 0)
            limits.append(room * self._limits.block_size - len(node.tokens) - 1)
            if self._profile.path.stride:
                limits.append(self._positions_left(node.end, in_path=lane.depth > 0))
        if self._options.vote and lane.depth:
            limits.append(self._limits.max_tokens)
        if lane.budget_end is not None:
            limits.append(lane.budget_end - node.critical_before)
        if self._options.critical_tokens is not None:
            limits.append(self._options.critical_tokens - node.critical_before)
        if node.kind is Kind.CONCLUSION and lane.depth == 0:
            before = num_visible + node.num_visible
            limits.append(self._limits.max_tokens - before)
            if self._options.summary_tokens is not None:
                limits.append(self._options.summary_tokens)
        return max(1, min(limits)) if limits else None

    def _positions_fit(self, node: Node, names: Sequence[PathName]) -> bool:
        """Whether paths that start further and further on all end below the model's length.

        Without a stride a position is never above the token's place in the index space.
        """
        stride, start = self._profile.path.stride, self._profile.path.start
        if not stride:
            return True
        longest = max(len(self._grammar.forced(start, name)) for name in names)
        first = node.tag_end + (len(names) - 1) * stride + longest
        return self._positions_left(first, in_path=True) >= MIN_PATH_TOKENS

    def _positions_left(self, position: int, *, in_path: bool) -> int:
        """Positions for sampled tokens from here on, less those of what must still follow."""
        behind = 1
        if in_path:
            rule = self._profile
            parts = (rule.path.close, rule.path.after, rule.join.start)
            behind += MIN_CONCLUSION_TOKENS + sum(len(self._grammar.forced(p)) for p in parts)
        return self._limits.index_blocks * self._limits.block_size - position - behind

    def _used(self, lane: Lane) -> int:
        return sum(self.blocks_of(node) for node in lane.all_nodes if not node.retired)

    def _close_blocks(self) -> int:
        rule = self._profile.path
        length = 1 + sum(len(self._grammar.forced(part)) for part in (rule.close, rule.after))
        return -(-length // self._limits.block_size)
