"""Block headers as the scheduler keeps them: ``fill``, ``position`` and ``thought`` by block."""

from __future__ import annotations

from collections.abc import Iterable

from ..scheduler_output import NATURAL, NO_THOUGHT, BlockHeaders

Header = tuple[int, int, int]
"""Fill, position and thought of a block, see :class:`BlockHeaders`."""


class BlockHeaderBook:
    """Collects header changes between two steps.

    A block that nobody in a group uses any more must get its plain header back before anybody else
    writes into it, or that request's text would be masked or moved.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._plain: Header = (block_size, NATURAL, NO_THOUGHT)
        self._current: dict[int, Header] = {}
        self._changed: dict[int, Header] = {}

    def place(self, block: int, position: int, thought: int = NO_THOUGHT) -> None:
        """Say where a branch's fresh block starts, and which path's thought it holds."""
        self._set(block, (self._block_size, position, thought))

    def seal(self, block: int, fill: int) -> None:
        """Say how many slots of a finished branch's last block are valid."""
        _, position, thought = self._current.get(block, self._plain)
        self._set(block, (fill, position, thought))

    def reset(self, blocks: Iterable[int]) -> None:
        """Give blocks back: they may be handed to anybody."""
        for block in blocks:
            if block in self._current:
                self._set(block, self._plain)

    def take(self) -> BlockHeaders | None:
        """Return the changes since the last call, or ``None``."""
        if not self._changed:
            return None
        changed, self._changed = self._changed, {}
        fill, position, thought = zip(*changed.values(), strict=True)
        return BlockHeaders(tuple(changed), fill, position, thought)

    @property
    def idle(self) -> bool:
        """Whether every block has its plain header, and the worker knows."""
        return not self._current and not self._changed

    def _set(self, block: int, header: Header) -> None:
        self._changed[block] = header
        if header == self._plain:
            self._current.pop(block, None)
        else:
            self._current[block] = header
