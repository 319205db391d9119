"""What the client sees of a group, in the order of the text and within its budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .branch_graph import Kind, Node, State
from .interface import Chunk, Emission, Finish, Limits


class OrderedOutput:
    """Releases nodes' tokens as their turn comes; subclasses decide the order and the end."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.finish: Finish | None = None
        """How the answer ended, once that is decided."""
        self.finished = False
        """Whether the client was told."""
        self._order: list[Node] = []
        self._dropped: list[Node] = []
        self._cursor = 0
        self._num_passed = 0
        """Visible tokens of the nodes in front of the cursor."""
        self._entered = False
        self._num_emitted = 0

    @property
    def branched(self) -> bool:
        """Whether the request is no longer the one request that the client sent."""
        raise NotImplementedError

    @property
    def has_paths(self) -> bool:
        """Whether it opened paths; a request may branch and go on as one answer all the same."""
        return self.branched

    def release(self) -> Iterator[Emission]:
        """Yield what the client may see now, in the order of the text; the last says the end."""
        while not self.finished:
            node = self._order[self._cursor]
            forced = () if self._entered else tuple(node.forced_visible)
            self._entered = True
            if node.kind is Kind.OUTLINE:
                node.outbox.clear()
            if forced:
                yield self._emit(node, None, len(forced), forced)
            elif node.outbox:
                chunk: Chunk = node.outbox.popleft()
                yield self._emit(node, chunk.payload, chunk.num_tokens)
            elif finish := self._finish_behind(node):
                self.finished = True
                yield Emission(None, 0, (), finish)
            elif node.state is State.DONE and self._cursor + 1 < len(self._order):
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
        finish = None if node.outbox else self._finish_behind(node)
        if self.branched and (keep < num_tokens or (finish is None and keep == left)):
            finish = Finish("length")
        elif finish is not None and finish.apart:
            finish = None  # the next emission says it
        self.finished = finish is not None
        return Emission(payload, keep, forced[:keep], finish)

    def _finish_behind(self, node: Node) -> Finish | None:
        """Return how the answer ends right behind a node, if it does."""
        is_last = node is self._order[-1] and node.state is State.DONE
        return self.finish if is_last else None

    @property
    def behind_end(self) -> Sequence[Node]:
        """Nodes that the end of the answer cuts off, the first of them perhaps in part."""
        if not self.finished:
            return ()
        return self._order[self._cursor + (not self._order[self._cursor].outbox) :]

    def _drop(self, node: Node) -> None:
        """Give a node up: nobody will see what it has not written yet."""
        if node.state is not State.DROPPED:
            node.state = State.DROPPED
            node.ended_at = self._limits.clock()
            self._dropped.append(node)

    def take_dropped(self) -> list[Node]:
        """Return branches that nobody will see, each once; their requests are of no more use."""
        dropped, self._dropped = self._dropped, []
        return dropped
