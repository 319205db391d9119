"""Traces and errors for people and programs to look at."""

from __future__ import annotations

import json

from .answer import Trace
from .cursor import GrammarError


def render(result: Trace, counted_by: str) -> str:
    """Return a trace as lines of text.

    Args:
        result: The trace.
        counted_by: What its tokens are.

    """
    labels = ["  " * branch.depth + branch.label for branch in result.branches]
    width = max(6, *map(len, labels))
    lines = [f"{'branch':{width}}  generated  forced     positions  text"]
    for label, branch in zip(labels, result.branches, strict=True):
        span = f"{branch.start}..{branch.end}" if branch.end >= branch.start else "-"
        lines.append(
            f"{label:{width}}  {branch.num_generated:9}  {branch.num_forced:6}  {span:>12}"
            f"  {_excerpt(branch.text)}"
        )
    figures = result.summary
    lines += [
        "",
        f"{figures['forks']} forks, {figures['paths']} paths, depth {figures['depth']}; "
        f"{result.num_sequential} blocks written sequentially; join: {figures['join']}",
        f"generated {figures['generated_tokens']}, forced {figures['forced_tokens']}, "
        f"critical path {figures['critical_path_tokens']} tokens; "
        f"parallelism ratio {figures['parallelism_ratio']}",
        f"tokens are {counted_by}; positions count from the answer's first token",
    ]
    return "\n".join(lines + [f"note: {note}" for note in result.notes])


def _excerpt(text: str, length: int = 32) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def render_json(result: Trace | GrammarError, counted_by: str) -> str:
    """Return a trace, or the error in its place, as a JSON object."""
    if isinstance(result, GrammarError):
        return json.dumps({"error": result.as_dict()}, ensure_ascii=False, indent=2)
    values = {"tokens": counted_by, **result.as_dict()}
    return json.dumps(values, ensure_ascii=False, indent=2)
