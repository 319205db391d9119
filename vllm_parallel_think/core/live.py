"""What a client sees of paths that are not on turn in the text."""

from __future__ import annotations

from typing import Any

from .branch_graph import Lane
from .fork_join.tag_scanner import Vocabulary

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
