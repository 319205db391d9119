"""What a group and its adapter tell each other."""

from __future__ import annotations

import enum
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal


class Verdict(enum.Enum):
    """What a branch does after a sampled token."""

    CONTINUE = "continue"
    CLOSE = "close"
    """Run one more step, so that the last token gets its K/V, then end."""
    END = "end"
    """End now; the last token has no K/V yet."""
    RETRACT = "retract"
    """End now, in front of the last token: it belongs to nothing and nobody sees it."""


class Cause(enum.Enum):
    """Why a branch's vLLM request ended."""

    CLOSED = "closed"
    """The step after :attr:`Verdict.CLOSE` was run."""
    VERDICT = "verdict"
    """The group asked for it with :attr:`Verdict.END`."""
    EOS = "eos"
    STOP_TOKEN = "stop_token"
    CUT = "cut"
    """Enough of its siblings have ended."""
    LENGTH = "length"
    """The engine's own limit."""


@dataclass(frozen=True)
class Limits:
    """What the server and the engine allow one group.

    Attributes:
        block_size: Tokens a KV block.
        index_blocks: Blocks that one vLLM request may span.
        max_tokens: Most visible tokens of the answer.
        max_forks: Most forks.
        has_room: Whether the pool can take this many more held blocks.
        min_tokens: Fewest visible tokens before anything but a limit may end the answer.
        ignore_eos: Whether nothing that the model writes ends the answer, but for stop tokens.
        vote_pattern: The operator's regular expression for final answers.
        clock: Seconds, for what is shown of the group; nothing is decided by it.

    """

    block_size: int
    index_blocks: int
    max_tokens: int
    max_forks: int
    has_room: Callable[[int], bool]
    min_tokens: int = 0
    ignore_eos: bool = False
    vote_pattern: re.Pattern[str] | None = None
    clock: Callable[[], float] = time.monotonic


@dataclass(frozen=True)
class Finish:
    """How the answer ended, in vLLM's words.

    Attributes:
        reason: vLLM's finish reason.
        stop_reason: The stop token, if one ended the answer.
        apart: Whether the last token is text: then the end is told apart from it, because vLLM
            takes the last token of an output that says ``stop`` for the one that stopped.

    """

    reason: Literal["stop", "length"]
    stop_reason: int | str | None = None
    apart: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class Chunk:
    """Sampled tokens as the engine produced them.

    Attributes:
        num_tokens: How many tokens the payload stands for.
        payload: The adapter's own object.

    """

    num_tokens: int
    payload: Any


@dataclass(frozen=True)
class Emission:
    """Tokens whose turn has come.

    Attributes:
        payload: The adapter's object, or ``None`` for forced tokens.
        keep: How many of the payload's tokens the client sees.
        forced: Forced tokens, if ``payload`` is ``None``.
        finish: Set on the last emission of the answer.

    """

    payload: Any
    keep: int
    forced: tuple[int, ...] = ()
    finish: Finish | None = None
