"""How much writers may write: rows and tokens of a step, and room for an answer after all steps."""

from __future__ import annotations

from ..branch_graph import Node
from ..characters import MAX_REST
from ..interface import Limits
from .node_table import NodeTable
from .prompts import HogwildPrompts


class WriterBudget:
    """The arithmetic of one group of writers."""

    def __init__(self, prompts: HogwildPrompts, limits: Limits, num_writers: int) -> None:
        self._prompts = prompts
        self._limits = limits
        self._num_writers = num_writers
        self._context = limits.index_blocks * limits.block_size

    @property
    def widest_step(self) -> tuple[int, int]:
        """Tokens and rows that the group can have in one step of the engine."""
        headers = [tokens for tokens in (self._prompts.others, self._prompts.own) if tokens]
        steps = self._num_writers * self._prompts.longest_step
        tokens = max(steps + sum(map(len, headers)), len(self._prompts.forced))
        return tokens, self._num_writers + len(headers)

    def is_full(self, nodes: NodeTable) -> bool:
        """Whether the writers must stop so that an answer still fits."""
        answer = len(self._prompts.forced) + self._prompts.profile.answer.max_tokens
        # Each writer may write one token more, and the rest of a character, and start or close a
        # step, before all of them have stopped.
        spare = self._num_writers * (2 + MAX_REST + self._prompts.longest_step)
        if nodes.num_tokens + spare + answer >= self._context:
            return True
        visible = nodes.num_tokens - nodes.num_hidden
        most = self._limits.max_tokens
        return visible + spare + min(answer, most // 2) >= most

    def bound_answer(self, node: Node, nodes: NodeTable, num_before: int, most: int | None) -> None:
        """Say how much the answer after all steps may sample, and how much it must.

        Args:
            node: The answer's node, already in the table.
            nodes: The table.
            num_before: Visible tokens before the first one that it samples.
            most: Tokens it is to keep to, if any.

        """
        left = self._limits.max_tokens - num_before
        node.least = max(0, self._limits.min_tokens - num_before)
        node.most = max(1, min(left, self._context - nodes.num_tokens))
        budget = left if most is None or self._limits.ignore_eos else max(most, node.least)
        node.limit = min(node.most, max(1, budget))
