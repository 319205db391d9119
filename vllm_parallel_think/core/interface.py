"""The contract between a group and the scheduler: what each tells the other, and when.

A *group* is the life of one client request, whatever method it branches by. It is pure: it knows
nothing of vLLM, and nothing of physical blocks beyond their size.
"""

from __future__ import annotations

import enum
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from .branch_graph import Node
from .summary import Fallbacks, Summary


class Verdict(enum.Enum):
    """What a branch does after a sampled token."""

    CONTINUE = "continue"
    CLOSE = "close"
    """Run one more step, so that the last token gets its K/V, then end."""
    END = "end"
    """End now; the last token has no K/V yet."""
    RETRACT = "retract"
    """End now, before the last token: it belongs to nothing and nobody sees it."""


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


class Group(Protocol):
    """The life of one client request.

    The scheduler makes a group when it admits the request, which is the group's ``trunk``, and
    keeps it until the client has the last output or has gone. In between, for every step of the
    engine:

    1. For each node that was in the batch: its sampled tokens one by one (:meth:`feed`); if its
       request ended, why (:meth:`end`) and whether its K/V is held (:meth:`sealed`).
    2. Once all of them were reported: :meth:`settle`, then :meth:`take_dropped`, :meth:`take_cut`
       (each answered with :meth:`end`) and, where :attr:`num_changes` has grown,
       :meth:`take_retired` and :meth:`ready` (each answered with :meth:`started`).
    3. :meth:`release`, whose last emission says the end; after it the group is only looked at.

    The same tokens come out in whatever order a step's nodes are reported. What only shows a group
    (:meth:`summary`, :meth:`live_view`, :attr:`nodes`, ...) may be called at any time and changes
    nothing. A node belongs to its group and must not be given to another one.

    Errors: a constructor raises :class:`~vllm_parallel_think.core.errors.OptionError` where the
    request cannot have a group. After that nothing here is raised because of what a model wrote or
    a client sent; any exception is a fault of the code, and the scheduler fails this one request.

    Attributes:
        trunk: The node that the client's own request computes; there from the start.
        opening: Tokens that the engine appends to the prompt, read once before the first step.
        num_changes: Grows whenever :meth:`ready` may have a new answer; never shrinks.
        fallbacks: How often something was not done, by reason; the scheduler may count its own.

    """

    trunk: Node
    opening: tuple[int, ...]
    num_changes: int
    fallbacks: Fallbacks

    # What the scheduler reports.

    def feed(self, node: Node, token: int) -> Verdict:
        """Take a token that was sampled for a node; it becomes the last of ``node.tokens``.

        Called for nodes whose request runs, never for an end-of-sequence token. After any verdict
        but ``CONTINUE`` the node gets no more tokens, and :meth:`end` follows. A node dropped in
        the same step may still be fed; that changes nothing, and the verdict is ``END``.
        """

    def end(self, node: Node, cause: Cause, stop_reason: int | None = None) -> None:
        """Take note that a node's request ended, once for each node.

        Args:
            node: The node; its end-of-sequence token, if any, was not fed. A dropped one is
                ignored.
            cause: Why it ended. Unless that is ``CLOSED`` or ``EOS``, the last token has no K/V
                yet.
            stop_reason: The token of ``stop_token_ids`` that ended it.

        """

    def sealed(self, node: Node, *, kept: bool) -> None:
        """Take note that a node's K/V is held for the group, or is gone.

        Called after :meth:`end` of a node that others may attend to, after its lost K/V was
        computed again, and with ``kept=False`` whenever blocks are given back before the group's
        end; then :meth:`ready` names the node again if somebody still needs it.
        """

    def started(self, node: Node) -> None:
        """Take note that a node has its request: the trunk at first, or one :meth:`ready` named."""

    def settle(self) -> None:
        """Act on a step of the engine as a whole, once all of its nodes were reported."""

    # What the scheduler does then.

    def take_dropped(self) -> list[Node]:
        """Return nodes that nobody will see, each once; their requests are to be aborted."""

    def take_cut(self) -> list[Node]:
        """Return nodes that must stop with what they have; each is to be ended with ``CUT``."""

    def take_retired(self) -> list[Node]:
        """Return nodes that nobody will attend to any more, each once; some may be held."""

    def ready(self) -> list[Node]:
        """Return nodes that need a request now, in the order in which to add them.

        New nodes, nodes whose request was set aside (``parked``), and done ones whose lost K/V
        somebody needs. All of their prefix is sealed. A node is named until it was
        :meth:`started`; after the answer's end none is.
        """

    def padded_prefix(self, node: Node) -> list[int]:
        """Return the token ids before a node's own, padded node by node to whole blocks."""

    def written_before(self, node: Node) -> list[int]:
        """Return the answer's tokens that a node sees before its first sampled one."""

    def temperature(self, node: Node) -> float | None:
        """Return a sampling temperature for a new node, or ``None`` for the request's."""

    def release(self) -> Iterator[Emission]:
        """Yield what the client may see now, in the order of the text; the last says the end.

        What was sampled is taken from the nodes' ``outbox``, where the scheduler puts it. Every
        emission counts as sent, so all of them must be taken.
        """

    # What it looks at.

    @property
    def finish(self) -> Finish | None:
        """How the answer ended, once that is decided; the client may not have all of it yet."""

    @property
    def finished(self) -> bool:
        """Whether the client was told of the end."""

    @property
    def branched(self) -> bool:
        """Whether the request is no longer the one that the client sent; never taken back."""

    @property
    def has_paths(self) -> bool:
        """Whether it opened paths; a request may branch and go on as one answer all the same."""

    @property
    def nodes(self) -> Sequence[Node]:
        """All nodes that the answer is made of, or may be."""

    @property
    def outvoted(self) -> Sequence[Node]:
        """Nodes that were written and are no part of the answer."""

    @property
    def after_end(self) -> Sequence[Node]:
        """Nodes that the end of the answer cuts off, the first of them perhaps in part."""

    def blocks_of(self, node: Node) -> int:
        """Return how many KV blocks a node's own tokens fill."""

    @property
    def blocks_needed(self) -> int:
        """Blocks that the whole group takes, with one to grow for each node being written."""

    def summary(self) -> Summary:
        """Return the group's figures so far."""

    def live_view(self) -> list[dict[str, Any]] | None:
        """Return where every path stands, if the client asked to see that and there are any."""

    def take_join_waits(self) -> list[float]:
        """Return how many seconds each path waited for its join, each path once."""
