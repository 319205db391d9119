"""What the scheduler tells the worker, once a step and only in steps that concern groups."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from vllm.v1.core.sched.output import SchedulerOutput

NATURAL = -1
"""Position header of a block whose tokens keep the positions vLLM gives them."""

NO_THOUGHT = 0
"""Thought embedding of prompts, summaries and everything outside groups: none."""


@dataclass(frozen=True)
class BlockHeaders:
    """Headers of physical KV blocks that changed since the last step.

    Attributes:
        blocks: Physical block ids.
        fill: Valid slots of each block; slots behind them are holes.
        position: RoPE position of each block's slot 0, or :data:`NATURAL`.
        thought: Thought embedding of each block's tokens, or :data:`NO_THOUGHT`.

    """

    blocks: tuple[int, ...] = ()
    fill: tuple[int, ...] = ()
    position: tuple[int, ...] = ()
    thought: tuple[int, ...] = ()


@dataclass
class GroupSchedulerOutput(SchedulerOutput):
    """vLLM's scheduler output, with what the worker must know of groups.

    Attributes:
        headers: Changed block headers, to be applied before the step.
        has_branches: Whether a branch with a prefix of its own is in this batch.
        written: Tokens of the answer in front of branches that enter the batch, by request id; only
            for those whose penalties count them.

    """

    headers: BlockHeaders | None = None
    has_branches: bool = False
    written: dict[str, list[int]] = field(default_factory=dict)


_BASE_FIELDS = tuple(f.name for f in fields(SchedulerOutput))


def with_groups(
    output: SchedulerOutput,
    headers: BlockHeaders | None,
    has_branches: bool,
    written: dict[str, list[int]],
) -> GroupSchedulerOutput:
    """Return a copy of vLLM's output that carries what concerns groups."""
    values = {name: getattr(output, name) for name in _BASE_FIELDS}
    return GroupSchedulerOutput(
        **values, headers=headers, has_branches=has_branches, written=written
    )
