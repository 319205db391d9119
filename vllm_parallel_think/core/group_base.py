"""What the groups of all methods share, and what most of them have no use for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .branch_graph import Node
from .interface import Emission, Finish, Limits
from .ordered_output import OrderedOutput
from .summary import Fallbacks


class GroupBase:
    """Counts blocks and hands on what the client may see.

    Where the contract (:class:`~vllm_parallel_think.core.interface.Group`) asks for what only some
    methods have, this answers for those that have not: nothing is cut, retired, outvoted or
    sampled otherwise.

    Attributes:
        num_changes: Grows whenever ``ready`` may have a new answer: most steps only add tokens.
        fallbacks: How often something was not done, by reason.

    """

    def __init__(self, limits: Limits, output: OrderedOutput) -> None:
        self._limits = limits
        self._output = output
        self.num_changes = 1
        self.fallbacks = Fallbacks()

    @property
    def finish(self) -> Finish | None:
        """How the answer ended, once that is decided."""
        return self._output.finish

    @property
    def finished(self) -> bool:
        """Whether the client was told."""
        return self._output.finished

    @property
    def after_end(self) -> Sequence[Node]:
        """Nodes that the end of the answer cuts off, the first of them perhaps in part."""
        return self._output.after_end

    def release(self) -> Iterator[Emission]:
        """Yield what the client may see now, in the order of the text; the last says the end."""
        return self._output.release()

    def take_dropped(self) -> list[Node]:
        """Return branches that nobody will see, each once; their requests are of no more use."""
        return self._output.take_dropped()

    def blocks_of(self, node: Node) -> int:
        """Return how many KV blocks a node's own tokens fill."""
        return -(-len(node.tokens) // self._limits.block_size)

    def padded_prefix(self, node: Node) -> list[int]:
        """Return the token ids before a branch, padded node by node to whole blocks.

        The padding repeats a token that occurs anyway, so that penalties see no new one.
        """
        tokens: list[int] = []
        for seen in node.prefix:
            tokens.extend(seen.tokens)
            tokens.extend([seen.tokens[-1]] * (-len(seen.tokens) % self._limits.block_size))
        return tokens

    def settle(self) -> None:
        """Wait for nothing: what is reported is acted upon at once."""

    def take_cut(self) -> list[Node]:
        """Return branches that must stop now: none."""
        return []

    def take_retired(self) -> list[Node]:
        """Return nodes that nobody will attend to any more: none."""
        return []

    def take_join_waits(self) -> list[float]:
        """Return how long paths waited for their join: nothing was joined."""
        return []

    @property
    def outvoted(self) -> Sequence[Node]:
        """Nodes that are in the visible order no longer: none."""
        return ()

    def temperature(self, node: Node) -> float | None:
        """Return a sampling temperature that replaces the request's: none does."""
        return None
