"""What was read of a text, in the order in which its branches were written."""

from __future__ import annotations

from dataclasses import dataclass

from ..branch_graph import PathName


@dataclass(frozen=True)
class Block:
    """Paths that ran side by side."""

    names: tuple[PathName, ...]
    by_end: bool
    """Whether the branch forked where no tag shows why: at its end of sequence, say."""
    paths: list[list[Step]]


@dataclass(frozen=True)
class Step:
    """What a branch generated, and the block it opened then; a lane's last step opens none."""

    text: str
    block: Block | None
