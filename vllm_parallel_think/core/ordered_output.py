"""What the client sees of a group: its tokens in the order of the text, and where paths stand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .branch_graph import Kind, Lane, Node, State
from .interface import Chunk, Emission, Finish, Limits
from .vocabulary import Vocabulary

LIVE_TOKENS = 64
"""Tokens of each path that a live view shows."""


def show_path(lane: Lane, vocabulary: Vocabulary) -> dict[str, Any]:
    """Return where a path stands: counts, and how its text ends."""
    tail: list[int] = []
    for node in reversed(lane.all_nodes):
        if (missing := LIVE_TOKENS - len(tail)) <= 0:
            break
        first = max(node.num_given, len(node.tokens) - missing)
        pending = node.tokens[node.num_hidden : node.num_hidden + node.num_pending]
        tail = pending + node.tokens[first:] + tail
    return {
        "path": lane.name,
        "title": lane.title,
        "tokens": lane.num_sampled,
        "done": lane.complete,
        "tail": vocabulary.text(tail[-LIVE_TOKENS:]).strip("\ufffd"),
    }


class OrderedOutput:
    """Releases nodes' tokens as their turn comes, within the client's budget.

    Attributes:
        order: Visible nodes in the order of the text; the group puts them there.
        finish: How the answer ended, once that is decided.
        finished: Whether the client was told.
        lane_ends: How the answer ends where a lane does, whatever comes after that in the text.
        is_held: Whether nothing may go out yet.

    """

    def __init__(self, limits: Limits, branched: Callable[[], bool]) -> None:
        """Start without any nodes.

        Args:
            limits: What the client may see.
            branched: Says whether the request is no longer the one that the client sent: only then
                vLLM does not bound its length.

        """
        self._limits = limits
        self._branched = branched
        self.order: list[Node] = []
        self.finish: Finish | None = None
        self.finished = False
        self.lane_ends: dict[Lane, Finish] = {}
        self.is_held = False
        self._dropped: list[Node] = []
        self._cursor = 0
        self._num_passed = 0
        """Visible tokens of the nodes before the cursor."""
        self._entered = False
        self._num_emitted = 0

    def release(self) -> Iterator[Emission]:
        """Yield what the client may see now, in the order of the text; the last says the end."""
        while not (self.finished or self.is_held):
            node = self.order[self._cursor]
            forced = () if self._entered else tuple(node.forced_visible)
            self._entered = True
            if node.kind is Kind.OUTLINE:
                node.outbox.clear()
            if forced:
                yield self._emit(node, None, len(forced), forced)
            elif node.outbox:
                chunk: Chunk = node.outbox.popleft()
                yield self._emit(node, chunk.payload, chunk.num_tokens)
            elif finish := self._finish_after(node):
                self.finished = True
                yield Emission(None, 0, (), finish)
            elif node.state is State.DONE and self._cursor + 1 < len(self.order):
                self._cursor += 1
                self._num_passed += node.num_visible
                self._entered = False
            else:
                return

    def _emit(
        self, node: Node, payload: Any, num_tokens: int, forced: tuple[int, ...] = ()
    ) -> Emission:
        left = self._limits.max_tokens - self._num_emitted
        keep = min(num_tokens, left)
        self._num_emitted += keep
        finish = None if node.outbox else self._finish_after(node)
        if self._branched() and (keep < num_tokens or (finish is None and keep == left)):
            finish = Finish("length")
        elif finish is not None and finish.apart:
            finish = None  # the next emission says it
        self.finished = finish is not None
        return Emission(payload, keep, forced[:keep], finish)

    def _finish_after(self, node: Node) -> Finish | None:
        """Return how the answer ends right after a node, if it does."""
        if node.state is not State.DONE:
            return None
        if node is node.lane.nodes[-1] and node.lane in self.lane_ends:
            return self.lane_ends[node.lane]
        return self.finish if node is self.order[-1] else None

    @property
    def after_end(self) -> Sequence[Node]:
        """Nodes that the end of the answer cuts off, the first of them perhaps in part."""
        if not self.finished:
            return ()
        return self.order[self._cursor + (not self.order[self._cursor].outbox) :]

    def drop(self, node: Node) -> None:
        """Give a node up: nobody will see what it has not written yet."""
        if node.state is not State.DROPPED:
            node.state = State.DROPPED
            node.ended_at = self._limits.clock()
            self._dropped.append(node)

    def drop_after(self, node: Node) -> None:
        """Give up what follows a node in the text and is not done."""
        for later in self.order[self.order.index(node) + 1 :]:
            if later.state is not State.DONE:
                self.drop(later)

    def drop_beyond_budget(self) -> None:
        """Give up nodes that are out of the client's sight.

        A node is when the tokens known before it, and its own, already fill the client's budget:
        what stands before it only grows, so dropping it changes no visible token.
        """
        before = self._num_passed
        for node in self.order[self._cursor :]:
            before += node.num_visible
            if before >= self._limits.max_tokens and node.state is not State.DONE:
                self.drop(node)

    def take_dropped(self) -> list[Node]:
        """Return nodes that were given up, each once."""
        dropped, self._dropped = self._dropped, []
        return dropped
