"""Who steps, waits and makes room, against a pool of plain numbers that obeys each decision."""

from __future__ import annotations

import ast
import inspect
import sys
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_parallel_think.scheduler import step_policy
from vllm_parallel_think.scheduler.step_policy import (
    Decision,
    Need,
    StepBudget,
    StepRow,
    Way,
    allowed_tokens,
    is_standstill,
    may_resume,
    need_of,
    who_gives_way,
)

BLOCK = 16


@dataclass
class Gang:
    """Members of a gang, and blocks that its group holds beside theirs."""

    age: int
    members: list[StepRow]
    held: int = 0

    @property
    def blocks(self) -> int:
        return self.held + sum(row.blocks for row in self.members)


@dataclass
class Engine:
    """A pool, a step, and who makes room in it."""

    num_blocks: int
    tokens: int
    slots: int
    gangs: list[Gang]
    others: list[StepRow]
    evicted: list[int] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    admitted: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)

    @property
    def free_blocks(self) -> int:
        holding = sum(gang.blocks for gang in self.holding)
        return self.num_blocks - holding - sum(row.blocks for row in self.others)

    @property
    def holding(self) -> list[Gang]:
        return [gang for gang in self.gangs if gang.age not in self.evicted]

    @property
    def free_slots(self) -> int:
        gangs = [row for gang in self.holding for row in gang.members if row.running]
        entering = [
            row
            for gang in self.holding
            if gang.age in self.admitted
            for row in gang.members
            if not row.running
        ]
        return self.slots - len(gangs) - len(entering) - len(self.others)

    def step(self) -> tuple[StepBudget, dict[str, int]]:
        budget = StepBudget(self.tokens)
        for gang in sorted(self.gangs, key=lambda gang: gang.age):
            if gang.age in self.evicted:
                continue
            need = need_of(gang.members, BLOCK, watermark=1)
            if budget.holds(need, self.free_slots) and self.clear(gang, budget, need):
                budget.promise(need)
                self.admitted.append(gang.age)
            else:
                self.held.append(gang.age)
        return budget, allowed_tokens(self.others, budget, self.free_blocks, BLOCK, True)

    def clear(self, gang: Gang, budget: StepBudget, need: Need) -> bool:
        while budget.short_of(need, self.free_blocks):
            holding = self.holding
            decision = who_gives_way(
                [(int(row.request_id),) for row in self.others],
                [(other.age,) for other in holding],
                (gang.age,),
            )
            if decision.way is Way.PREEMPT:
                self.others.pop(decision.index)
            elif decision.way is Way.EVICT:
                self.evicted.append(holding[decision.index].age)
            else:
                if decision.way is Way.REFUSE:
                    self.refused.append(holding[decision.index].age)
                return False
        return True


def filled(row: StepRow, missing: int = 0) -> StepRow:
    """Return a row with all blocks of what it computed, but for so many."""
    return replace(row, blocks=max(0, -(-row.computed // BLOCK) - missing))


@st.composite
def engines(draw: st.DrawFn) -> Engine:
    size = st.integers(0, 40)
    gangs = []
    for age in range(draw(st.integers(1, 4))):
        members = []
        for number in range(draw(st.integers(1, 4))):
            running = draw(st.booleans())
            computed = draw(size) if running else 0
            lacking = draw(st.integers(1, 3 if running else 40))
            members.append(filled(StepRow(f"{age}.{number}", lacking, computed, 0, running)))
        gangs.append(Gang(age, members, draw(st.integers(0, 6))))
    others = [
        filled(StepRow(str(100 + number), draw(st.integers(1, 60)), draw(size), 0))
        for number in range(draw(st.integers(0, 4)))
    ]
    running = sum(row.running for gang in gangs for row in gang.members) + len(others)
    used = sum(gang.blocks for gang in gangs) + sum(row.blocks for row in others)
    return Engine(
        num_blocks=used + draw(st.integers(0, 12)),
        tokens=draw(st.integers(1, 128)),
        slots=running + draw(st.integers(0, 6)),
        gangs=draw(st.permutations(gangs)),
        others=others,
    )


@given(engines())
def test_no_more_is_promised_than_there_is(engine: Engine) -> None:
    budget, allowed = engine.step()
    assert budget.tokens >= 0
    assert engine.free_slots >= 0
    assert budget.blocks <= engine.free_blocks
    taken = sum(
        row.new_blocks(allowed[row.request_id], BLOCK)
        for row in engine.others
        if allowed[row.request_id]
    )
    assert budget.blocks + taken <= engine.free_blocks
    assert sum(allowed.values()) <= budget.tokens
    assert all(0 <= allowed[row.request_id] <= row.lacking for row in engine.others)


@given(engines())
def test_a_gang_steps_as_a_whole_or_not_at_all(engine: Engine) -> None:
    _, allowed = engine.step()
    admitted, held, evicted = map(set, (engine.admitted, engine.held, engine.evicted))
    assert not admitted & held and not admitted & evicted
    assert admitted | held | evicted == {gang.age for gang in engine.gangs}
    members = {row.request_id for gang in engine.gangs for row in gang.members}
    assert not members & set(allowed), "only rows of others are bounded"


@given(engines())
def test_the_oldest_gets_on(engine: Engine) -> None:
    oldest = min(engine.gangs, key=lambda gang: gang.age)
    need = need_of(oldest.members, BLOCK, watermark=1)
    fits = need.tokens <= engine.tokens and need.slots <= engine.free_slots
    enough = need.blocks + oldest.blocks <= engine.num_blocks
    engine.step()
    assert oldest.age not in engine.evicted
    assert (oldest.age in engine.admitted) == (fits and enough)
    assert (oldest.age in engine.refused) == (fits and not enough)
    assert set(engine.refused) <= {oldest.age}, "others wait until it has ended"


@given(engines())
def test_nobody_younger_keeps_what_an_older_gang_was_evicted_for(engine: Engine) -> None:
    engine.step()
    if engine.evicted:
        assert min(engine.evicted) > max(engine.admitted, default=-1)
        assert not engine.others, "rows without a group go first"


@given(
    st.lists(st.tuples(st.integers(0, 2), st.floats(0, 9)), max_size=4),
    st.lists(st.tuples(st.integers(0, 2), st.floats(0, 9)), max_size=4, unique=True),
)
def test_the_youngest_makes_room(
    rows: list[tuple[int, float]], groups: list[tuple[int, float]]
) -> None:
    decision = who_gives_way(rows, groups)
    if rows:
        assert decision.way is Way.PREEMPT and rows[decision.index] == max(rows)
    elif len(groups) > 1:
        assert decision.way is Way.EVICT and groups[decision.index] == max(groups)
    else:
        assert decision == (Decision(Way.REFUSE, 0) if groups else Decision(Way.NOBODY))


def test_a_gang_is_not_evicted_for_itself() -> None:
    assert who_gives_way([], [(0,), (1,)], asking=(1,)) == Decision(Way.WAIT)
    assert who_gives_way([], [(0,), (1,)], asking=(0,)) == Decision(Way.EVICT, 1)
    assert who_gives_way([], [(0,)], asking=(0,)) == Decision(Way.REFUSE, 0)
    assert who_gives_way([(7,)], [(0,)], asking=(0,)) == Decision(Way.PREEMPT, 0)


def test_rows_that_decode_go_before_chunks_of_prompts() -> None:
    prompt = StepRow("prompt", lacking=100, computed=0, blocks=0)
    decoding = StepRow("decoding", lacking=1, computed=16, blocks=1)
    budget = StepBudget(tokens=20, blocks=2)
    assert allowed_tokens([prompt, decoding], budget, 5, BLOCK, True) == {
        "decoding": 1,
        "prompt": 19,
    }
    # Of five free blocks two are promised, one goes to the row that decodes.
    assert allowed_tokens([prompt, decoding], budget, 5, BLOCK, False)["prompt"] == 2 * BLOCK


def test_a_watermark_is_kept_only_where_somebody_enters() -> None:
    row = StepRow("a", lacking=1, computed=16, blocks=1)
    assert need_of([row], BLOCK, watermark=3) == Need(tokens=1, slots=0, blocks=1)
    assert need_of([replace(row, running=False)], BLOCK, watermark=3) == Need(1, 1, 4)


@pytest.mark.parametrize(
    ("changed", "standstill"),
    [
        ({}, True),
        ({"under_way": True}, False),
        ({"under_way": True, "preempted_member": True}, True),
        ({"preempted_other": True}, False),
        ({"preempted_other": True, "preempted_member": True}, False),
        ({"all_held": False}, False),
        ({"blocks_are_held": False}, False),
    ],
)
def test_what_counts_as_a_standstill(changed: dict[str, bool], standstill: bool) -> None:
    figures = {
        "preempted_member": False,
        "preempted_other": False,
        "under_way": False,
        "all_held": True,
        "blocks_are_held": True,
    }
    assert is_standstill(**{**figures, **changed}) is standstill


def test_an_evicted_group_resumes_when_there_is_room_and_no_elder_waits() -> None:
    room = {"free_blocks": 4, "needed": 4, "engine_idle": False}
    assert may_resume((5,), [(5,), (6,)], **room)
    assert not may_resume((5,), [(6,), (4,)], **room)
    assert not may_resume((5,), [], **{**room, "needed": 5})
    assert may_resume((5,), [(4,)], **{**room, "needed": 5, "engine_idle": True})


def test_decisions_need_nothing_but_python() -> None:
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(inspect.getsource(step_policy)))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else ["." * node.level + (node.module or "")]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= set(sys.stdlib_module_names), "no vLLM, no torch, nothing of ours"
