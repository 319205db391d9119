"""May a branch fork? Why not?"""

from __future__ import annotations

from collections.abc import Sequence

from ..branch_graph import Node, PathName
from ..config.profile import Profile
from ..config.request_options import RequestOptions
from ..interface import Limits
from ..summary import FallbackReason, Fallbacks
from .budget import Budget
from .node_tree import NodeTree
from .tag_scanner import ForkSeen

Endings = dict[Node, tuple[PathName, ...] | None]
"""What a node's end tag asks for: paths to open, or (``None``) the end of its lane."""


class ForkPolicy:
    """Decides on forks by the profile, the client's options and the server's limits."""

    def __init__(
        self,
        profile: Profile,
        options: RequestOptions,
        limits: Limits,
        budget: Budget,
        tree: NodeTree,
        endings: Endings,
        fallbacks: Fallbacks,
        prompt_len: int,
    ) -> None:
        self._profile = profile
        self._options = options
        self._limits = limits
        self._budget = budget
        self._tree = tree
        self._endings = endings
        self._fallbacks = fallbacks
        self._prompt_len = prompt_len

    def may_fork(self, node: Node, seen: ForkSeen) -> bool:
        """Decide on a fork; a refusal lets the model go on sequentially, and is counted."""
        reason = self._refusal(node, seen)
        if reason is not None:
            self._fallbacks[reason] += 1
            if self._profile.fork.once and (scanner := self._tree.scanners.get(node)) is not None:
                scanner.stop_forks()
        return reason is None

    def _refusal(self, node: Node, seen: ForkSeen) -> FallbackReason | None:
        options, rule = self._options, self._profile.fork
        count = len(seen.names)
        if rule.num_paths is not None and not rule.at_start:
            count = min(count, options.max_paths)
        if not seen.opened:
            return FallbackReason.NOT_OPENED
        if count < (1 if rule.at_start else 2):
            return FallbackReason.FEWER_THAN_TWO_PATHS
        if count > options.max_paths:
            return FallbackReason.MAX_PATHS
        if node.depth >= min(options.max_depth, self._profile.max_depth):
            return FallbackReason.MAX_DEPTH
        under_way = sum(ending is not None for ending in self._endings.values())
        if node.lane.forks_left < 1 or (rule.once and self._tree.tally.num_forks + under_way):
            return FallbackReason.MAX_FORKS
        return self._lack_of_room(node, seen.names[:count])

    def _lack_of_room(self, node: Node, names: Sequence[PathName]) -> FallbackReason | None:
        used = node.end - self._prompt_len
        if self._profile.path.stride:
            # Positions run ahead of tokens; all forks are the trunk's, so nothing runs beside it.
            used = self._tree.tally.num_visible
        left = self._limits.max_tokens - used
        if left < max(self._profile.fork.min_tokens_left, len(names)):
            return FallbackReason.MAX_TOKENS
        if not self._budget.fits_in_index(node, names):
            return FallbackReason.MAX_MODEL_LEN
        if not self._limits.has_room(len(names) * self._budget.min_path_blocks(names)):
            return FallbackReason.HELD_KV_FRACTION
        return None
