"""What the scheduler sends to the worker process of groups, with vLLM's output of a step."""

from __future__ import annotations

from vllm.v1.core.sched.output import SchedulerOutput

from ..core.branch_graph import Node
from ..core.hogwild.cache_layout import ANSWER, Run
from ..core.hogwild.group import HogwildGroup
from ..scheduler_output import HogwildUpdate, KVSwap, with_groups
from .block_headers import BlockHeaderBook
from .fault_fence import fence
from .group_table import GroupState, GroupTable
from .held_blocks import HeldBlocks


class StepMessage:
    """Collects what happens to groups between two steps, and adds it to the output of the next."""

    def __init__(
        self,
        groups: GroupTable,
        held_blocks: HeldBlocks,
        headers: BlockHeaderBook,
        block_size: int,
    ) -> None:
        self._groups = groups
        self._held_blocks = held_blocks
        self._headers = headers
        self._block_size = block_size
        self._swaps: list[KVSwap] = []
        self._ended: list[HogwildUpdate] = []

    @property
    def is_idle(self) -> bool:
        """Whether there are no groups, and the worker process knows of none."""
        return not self._groups and self._headers.idle

    def swap(self, swap: KVSwap) -> None:
        """Have K/V copied before the next step."""
        self._swaps.append(swap)

    def ended(self, state: GroupState) -> None:
        """Let the worker process forget a group."""
        group = state.group
        if isinstance(group, HogwildGroup) and group.branched:
            self._ended.append(HogwildUpdate(state.root.request_id, group.layout, ended=True))
        if state.stash:
            state.stash.clear()
            self.swap(KVSwap(state.root.request_id, (), out=False))

    def added_to(self, output: SchedulerOutput) -> SchedulerOutput:
        """Return the output of a step with what concerns groups, or as it is if nothing does."""
        has_branches = self._place_blocks(output)
        headers, written = self._headers.take(), self._written(output)
        updates, swaps = self._hogwild_updates(), tuple(self._swaps)
        self._swaps.clear()
        if headers is None and not (has_branches or written or updates or swaps):
            return output
        return with_groups(output, headers, has_branches, written, updates, swaps)

    def _place_blocks(self, output: SchedulerOutput) -> bool:
        """Write position headers of blocks that branches were given in this step."""
        for new in output.scheduled_new_reqs:
            self._place(new.req_id, new.block_ids, whole=True)
        cached = output.scheduled_cached_reqs
        for req_id, block_ids in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if block_ids is not None:
                self._place(req_id, block_ids, whole=req_id in cached.resumed_req_ids)
        return any(
            branch.node.prefix
            for req_id in output.num_scheduled_tokens
            if (branch := self._groups.branch(req_id)) is not None
        )

    def _place(self, req_id: str, block_ids: tuple[list[int], ...], whole: bool) -> None:
        branch = self._groups.branch(req_id)
        if branch is None or not branch.node.prefix:
            return
        own = block_ids[0]
        with fence(branch.state):
            if whole:
                own = own[branch.num_prefix_blocks :]
                branch.num_placed = 0
            for block in own:
                start = branch.node.start + branch.num_placed * self._block_size
                self._headers.place(block, start, branch.node.lane.thought)
                branch.num_placed += 1

    def _written(self, output: SchedulerOutput) -> dict[str, list[int]]:
        """Return what penalties of branches that enter the batch count beside their own tokens."""
        cached = output.scheduled_cached_reqs
        entering = {new.req_id for new in output.scheduled_new_reqs} | set(cached.resumed_req_ids)
        written = {}
        for req_id in entering:
            branch = self._groups.branch(req_id)
            params = branch.request.sampling_params if branch is not None else None
            if branch is None or params is None:
                continue
            if params.presence_penalty or params.frequency_penalty:
                with fence(branch.state):
                    if tokens := branch.state.group.written_before(branch.node):
                        written[req_id] = tokens
        return written

    def _hogwild_updates(self) -> tuple[HogwildUpdate, ...]:
        """Return what gangs look like, where that changed."""
        updates, self._ended = self._ended, []
        for state in self._groups:
            if state.error is not None:
                continue
            with fence(state):
                if (update := _update_of(state, self._held_blocks)) is not None:
                    updates.append(update)
        return tuple(updates)


def _update_of(state: GroupState, held_blocks: HeldBlocks) -> HogwildUpdate | None:
    """Return what moved in a gang since the worker process last heard of it, or ``None``."""
    group = state.group
    if not isinstance(group, HogwildGroup) or not group.branched or state.evicted:
        return None
    if state.error is not None:  # fails at the end of this step; its K/V may be gone
        return None
    if state.moves_sent == group.num_moves:
        return None

    def run(node: Node) -> Run:
        role = ANSWER if node is group.trunk else group.roles[node]
        ids = tuple(block.block_id for block in held_blocks.blocks(node))
        return Run(ids, len(node.tokens), role)

    first = min(state.history_sent, group.num_unmoved)
    live = [
        (role, state.requests[node].request_id)
        for role, node in group.live.items()
        if node in state.requests
    ]
    update = HogwildUpdate(
        state.root.request_id,
        group.layout,
        run(group.trunk),
        first,
        tuple(run(node) for node in group.history[first:]),
        tuple((role, run(node)) for role, node in group.headers.items()),
        tuple(live),
    )
    state.moves_sent = group.num_moves
    state.history_sent = group.num_unmoved = len(group.history)
    return update
