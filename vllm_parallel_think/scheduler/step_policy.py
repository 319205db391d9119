"""Who steps, who waits and who makes room: decisions from plain figures, without effects.

vLLM alone does not keep a gang together: a prefill chunk of somebody else eats the step's tokens
before a new member is looked at, nobody is admitted in a step that preempts, slots and blocks run
out. So whatever a gang needs is made sure of before vLLM schedules; a gang that cannot have it is
held for that step as a whole. Otherwise its text would depend on the load beside it.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Age = tuple[Any, ...]
"""Sort key of a row or a group: the one that must make room last comes first."""


class Way(enum.Enum):
    """How room is made."""

    PREEMPT = "preempt"
    """Preempt a row that belongs to no group; vLLM lets it wait and computes it again."""
    EVICT = "evict"
    """Take all blocks of a group."""
    WAIT = "wait"
    """Nobody: the turn of whoever asks comes when an older group has ended."""
    REFUSE = "refuse"
    """Nobody: the only group that is left needs more than there is."""
    NOBODY = "nobody"
    """There is nobody who holds anything."""


@dataclass(frozen=True)
class Decision:
    """Who makes room.

    Attributes:
        way: How.
        index: Which of the rows that may be preempted, or of the groups.

    """

    way: Way
    index: int = -1


def who_gives_way(
    rows: Sequence[Age], groups: Sequence[Age], asking: Age | None = None
) -> Decision:
    """Choose who makes room: the youngest ordinary row, else the youngest group.

    The oldest group always gets on.

    Args:
        rows: Ages of running rows that belong to no group.
        groups: Ages of the groups that hold blocks.
        asking: Age of the group that needs room, if one of them does: it is not evicted for
            itself.

    """
    if rows:
        return Decision(Way.PREEMPT, _youngest(rows))
    if not groups:
        return Decision(Way.NOBODY)
    youngest = _youngest(groups)
    if len(groups) == 1:
        return Decision(Way.REFUSE, youngest)
    if groups[youngest] == asking:
        return Decision(Way.WAIT)
    return Decision(Way.EVICT, youngest)


def _youngest(ages: Sequence[Age]) -> int:
    return max(range(len(ages)), key=ages.__getitem__)


@dataclass(frozen=True)
class StepRow:
    """A request, as a step sees it.

    Attributes:
        request_id: Whose row.
        lacking: Tokens that are not computed yet.
        computed: Tokens that are.
        blocks: Blocks it has.
        running: Whether it has a slot.

    """

    request_id: str
    lacking: int
    computed: int
    blocks: int
    running: bool = True

    def new_blocks(self, new_tokens: int, block_size: int) -> int:
        """Return the blocks it lacks for so many more tokens."""
        return max(0, -(-(self.computed + new_tokens) // block_size) - self.blocks)


@dataclass(frozen=True)
class Need:
    """What a gang's members lack for one step together."""

    tokens: int
    slots: int
    blocks: int


def need_of(members: Sequence[StepRow], block_size: int, watermark: int) -> Need:
    """Return what a gang lacks; the watermark is kept free when any member is admitted."""
    slots = sum(not row.running for row in members)
    blocks = sum(row.new_blocks(row.lacking, block_size) for row in members)
    return Need(sum(row.lacking for row in members), slots, blocks + (watermark if slots else 0))


@dataclass
class StepBudget:
    """What the gangs that were admitted so far left of a step.

    Attributes:
        tokens: Tokens nobody was promised.
        blocks: Free blocks that were promised.

    """

    tokens: int
    blocks: int = 0

    def holds(self, need: Need, free_slots: int) -> bool:
        """Whether tokens and slots suffice; no eviction could change that for this step."""
        return need.tokens <= self.tokens and need.slots <= free_slots

    def short_of(self, need: Need, free_blocks: int) -> bool:
        """Whether blocks must come free first."""
        return free_blocks < self.blocks + need.blocks

    def promise(self, need: Need) -> None:
        """Keep what a gang needs for it."""
        self.tokens -= need.tokens
        self.blocks += need.blocks


def allowed_tokens(
    others: Sequence[StepRow], budget: StepBudget, free_blocks: int, block_size: int, admits: bool
) -> dict[str, int]:
    """Return the most tokens of a step for each running row that belongs to no gang.

    It keeps others from taking what gangs were promised, and from preempting anybody for more. A
    prompt's chunk becomes as small as what is left; members that enter are looked at only after all
    running rows.

    Args:
        others: Running rows.
        budget: What gangs left.
        free_blocks: Blocks in the pool that nobody has, promised ones included.
        block_size: Tokens a block.
        admits: Whether a member enters in this step.

    """
    tokens, free = budget.tokens, free_blocks - budget.blocks
    allowed: dict[str, int] = {}
    # Rows that decode go first, then chunks of prompts, as far as there is room.
    for row in sorted(others, key=lambda row: row.lacking > 1):
        room = (row.blocks + max(0, free)) * block_size - row.computed
        new_tokens = min(row.lacking, room)
        if admits:
            new_tokens = min(new_tokens, tokens)
        new_tokens = max(0, new_tokens)
        allowed[row.request_id] = new_tokens
        tokens -= min(tokens, new_tokens)
        free -= row.new_blocks(new_tokens, block_size)
    return allowed


def is_standstill(
    *,
    preempted_member: bool,
    preempted_other: bool,
    under_way: bool,
    all_held: bool,
    blocks_are_held: bool,
) -> bool:
    """Whether a step did nothing although groups hold blocks, and nothing will change that.

    A member that was preempted in this very step found no room beside what groups hold. Let in
    again it would only get as far as before, step after step, so that counts although its last
    output is still under way. When anybody else was preempted, blocks came free after members were
    looked at: the next step goes on.

    Args:
        preempted_member: Whether a member of a group was preempted in the step.
        preempted_other: Whether anybody else was.
        under_way: Whether the output of an earlier step is to come.
        all_held: Whether every row that runs was kept from the step. One that was not was only not
            looked at, as the scan ended with a row that preempted itself.
        blocks_are_held: Whether a group has blocks to give away.

    """
    if preempted_other or (under_way and not preempted_member):
        return False
    return all_held and blocks_are_held


def may_resume(
    own: Age, waiting: Iterable[Age], *, free_blocks: int, needed: int, engine_idle: bool
) -> bool:
    """Whether a group that was evicted comes back.

    Args:
        own: Its age.
        waiting: Ages of groups with a branch that waits; an older one is perhaps the one that this
            one made room for.
        free_blocks: Blocks that nobody has.
        needed: Blocks it would use at once.
        engine_idle: Whether nobody else could use them.

    """
    if engine_idle:
        return True
    return free_blocks >= needed and all(own <= age for age in waiting)
