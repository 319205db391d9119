"""What the scheduler sends to the worker, once a step and only in steps that concern groups."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from vllm.v1.core.sched.output import SchedulerOutput

from .core.config.hogwild_profile import Layout
from .core.hogwild.cache_layout import Run

NATURAL = -1
"""Position header of a block whose tokens keep the positions vLLM gives them."""

NO_THOUGHT = 0
"""Thought embedding of prompts, summaries and everything outside groups: none."""


@dataclass(frozen=True)
class BlockHeaders:
    """Headers of physical KV blocks that changed since the last step.

    Attributes:
        blocks: Physical block ids.
        fill: Valid slots of each block; slots after them are holes.
        position: RoPE position of each block's slot 0, or :data:`NATURAL`.
        thought: Thought embedding of each block's tokens, or :data:`NO_THOUGHT`.

    """

    blocks: tuple[int, ...] = ()
    fill: tuple[int, ...] = ()
    position: tuple[int, ...] = ()
    thought: tuple[int, ...] = ()


@dataclass(frozen=True)
class HogwildUpdate:
    """What changed in what the workers of a group see, beside a token more of each.

    Attributes:
        team: The client's request.
        layout: How the workers see each other.
        prompt: The prompt's tokens.
        first: How many steps of the history the worker process knows already; what it knows after
            them is forgotten.
        history: Finished steps after those, in order of completion.
        headers: Headers that are in the KV cache as a whole, by role.
        live: Request that writes a run, by role.
        ended: Whether the group is over; nothing else counts then.

    """

    team: str
    layout: Layout
    prompt: Run | None = None
    first: int = 0
    history: tuple[Run, ...] = ()
    headers: tuple[tuple[int, Run], ...] = ()
    live: tuple[tuple[int, str], ...] = ()
    ended: bool = False


@dataclass(frozen=True)
class KVSwap:
    """K/V that moves between the device and the host, before a step.

    Attributes:
        team: The client's request whose K/V it is; it has one copy at most.
        blocks: Physical blocks, in order.
        out: Whether they are copied to the host, or back from it (then the copy is given up).
            Without blocks a copy is just given up.

    """

    team: str
    blocks: tuple[int, ...]
    out: bool


@dataclass
class GroupSchedulerOutput(SchedulerOutput):
    """vLLM's scheduler output, with what the worker must know of groups.

    Attributes:
        headers: Changed block headers, to be applied before the step.
        has_branches: Whether a branch with a prefix of its own is in this batch.
        written: Tokens of the answer before branches that enter the batch, by request id; only
            for those whose penalties count them.
        teams: Changes of groups whose workers see each other.
        swaps: K/V to copy before the step, in order.

    """

    headers: BlockHeaders | None = None
    has_branches: bool = False
    written: dict[str, list[int]] = field(default_factory=dict)
    teams: tuple[HogwildUpdate, ...] = ()
    swaps: tuple[KVSwap, ...] = ()


_BASE_FIELDS = tuple(f.name for f in fields(SchedulerOutput))


def with_groups(
    output: SchedulerOutput,
    headers: BlockHeaders | None,
    has_branches: bool,
    written: dict[str, list[int]],
    teams: tuple[HogwildUpdate, ...] = (),
    swaps: tuple[KVSwap, ...] = (),
) -> GroupSchedulerOutput:
    """Return a copy of vLLM's output that carries what concerns groups."""
    values = {name: getattr(output, name) for name in _BASE_FIELDS}
    return GroupSchedulerOutput(
        **values,
        headers=headers,
        has_branches=has_branches,
        written=written,
        teams=teams,
        swaps=swaps,
    )
