"""Groups whose workers see each other, as the worker process keeps them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput

from attention_kernels import PackedRow, Rotary, SegmentPlan, pack_rows

from ..core.hogwild.cache_layout import CacheLayout, Run
from ..scheduler_output import HogwildUpdate

RowIds = Callable[[CommonAttentionMetadata], Sequence[str]]
"""Returns the request of every row of a batch."""


@dataclass(frozen=True, eq=False)
class HogwildRows:
    """The rows of a batch that belong to workers.

    Attributes:
        rows: Their numbers in the batch.
        plan: What they attend to.
        rotary: How the model rotates.

    """

    rows: tuple[int, ...]
    plan: SegmentPlan
    rotary: Rotary


class HogwildState:
    """Follows the scheduler's output; knows what every row of a worker attends to.

    Blocks and lengths of what is being written come from vLLM's own fields; the scheduler adds no
    word in a step in which nothing starts or ends.
    """

    def __init__(self, block_size: int, rotary: Rotary, row_ids: RowIds) -> None:
        self._block_size = block_size
        self._rotary = rotary
        self._row_ids = row_ids
        self._layouts: dict[str, CacheLayout] = {}
        self._member: dict[str, tuple[CacheLayout, int]] = {}
        """Layout and role of every request that writes."""
        self._blocks: dict[str, list[int]] = {}
        self._length: dict[str, int] = {}
        self._active: dict[str, tuple[CacheLayout, int]] = {}

    @property
    def is_active(self) -> bool:
        """Whether workers are in the current batch."""
        return bool(self._active)

    def apply(self, output: SchedulerOutput, updates: Sequence[HogwildUpdate]) -> None:
        """Follow a step before it is computed."""
        for update in updates:
            self._update(update)
        if not self._layouts:
            self._active = {}
            return
        for new in output.scheduled_new_reqs:
            self._extend(output, new.req_id, new.block_ids, new.num_computed_tokens, whole=True)
        cached = output.scheduled_cached_reqs
        for req_id, blocks, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            whole = req_id in cached.resumed_req_ids
            self._extend(output, req_id, blocks, computed, whole)
        self._active = {
            req_id: self._member[req_id]
            for req_id in output.num_scheduled_tokens
            if req_id in self._member
        }

    def rest(self) -> None:
        """Follow a batch without workers."""
        self._active = {}

    def rows(self, metadata: CommonAttentionMetadata) -> HogwildRows | None:
        """Return the workers' rows of a batch, or ``None``; nothing waits for the device."""
        if not self._active:
            return None
        starts = metadata.query_start_loc_cpu.tolist()
        numbers, rows = [], []
        for number, req_id in enumerate(self._row_ids(metadata)[: metadata.num_reqs]):
            if req_id in self._active:
                numbers.append(number)
                rows.append(self._row(req_id, starts[number], starts[number + 1]))
        if not rows:
            return None
        plan = pack_rows(rows, self._block_size, metadata.query_start_loc.device)
        return HogwildRows(tuple(numbers), plan, self._rotary)

    def _update(self, update: HogwildUpdate) -> None:
        layout = self._layouts.get(update.team)
        if layout is not None:
            for req_id in layout.live.values():
                self._member.pop(req_id, None)
        if update.ended:
            self._layouts.pop(update.team, None)
            self._forget_blocks()
            return
        if layout is None:
            layout = self._layouts[update.team] = CacheLayout(update.layout)
        assert update.prompt is not None
        layout.prompt = self._packed(update.prompt)
        layout.history = (*layout.history[: update.first], *map(self._packed, update.history))
        layout.headers = {role: self._packed(run) for role, run in update.headers}
        layout.live = dict(update.live)
        self._member.update((req_id, (layout, role)) for role, req_id in update.live)
        self._forget_blocks()

    def _forget_blocks(self) -> None:
        for req_id in [r for r in self._blocks if r not in self._member]:
            del self._blocks[req_id], self._length[req_id]

    def _extend(
        self,
        output: SchedulerOutput,
        req_id: str,
        blocks: tuple[list[int], ...] | None,
        num_computed: int,
        whole: bool,
    ) -> None:
        if req_id not in self._member:
            return
        known = [] if whole else self._blocks.get(req_id, [])
        self._blocks[req_id] = known + (list(blocks[0]) if blocks is not None else [])
        self._length[req_id] = num_computed + output.num_scheduled_tokens[req_id]

    def _row(self, req_id: str, start: int, end: int) -> PackedRow:
        layout, role = self._active[req_id]

        def live_run(other: int) -> Run:
            request = layout.live[other]
            return self._packed(
                Run(self._blocks.get(request, ()), self._length.get(request, 0), other)
            )

        seen = layout.view(role, live_run)
        return PackedRow(
            start,
            end - start,
            [part.run.blocks for part in seen],
            [part.run.length for part in seen],
            [part.shift for part in seen],
        )

    def _packed(self, run: Run) -> Run:
        """Return a run whose blocks are an array of those that it fills."""
        span = -(-run.length // self._block_size)
        return Run(np.array(run.blocks[:span], dtype=np.int32), run.length, run.role)
