"""vLLM's queues and its KV cache, as groups use them; nothing else here touches either."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.request_queue import RequestQueue, SchedulingPolicy, create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from ..compat.patches import CACHE_BLOCKS
from .group_table import Branch
from .held_blocks import HeldBlocks


class EngineQueues:
    """The rows of a vLLM scheduler: those that run, those that wait, and how they change place.

    Args:
        scheduler: The scheduler, groups included.
        plain: The same one as vLLM wrote it, whose methods know of no groups.

    """

    def __init__(self, scheduler: Scheduler, plain: Scheduler) -> None:
        self._scheduler = scheduler
        self._plain = plain

    @property
    def running(self) -> list[Request]:
        """Requests that take part in steps."""
        return self._scheduler.running

    @property
    def waiting_members(self) -> RequestQueue:
        """Requests that wait and hold blocks, or are members of groups."""
        return self._scheduler.kv_holding_waiting

    @property
    def request_ids(self) -> Collection[str]:
        """Ids of all unfinished requests."""
        return self._scheduler.requests

    @property
    def step_tokens(self) -> int:
        """Most tokens of a step."""
        return self._scheduler.max_num_scheduled_tokens

    @property
    def step_rows(self) -> int:
        """Most rows of a step."""
        return self._scheduler.max_num_active_reqs

    @property
    def by_priority(self) -> bool:
        """Whether vLLM preempts a row for one that is more important."""
        return self._scheduler.policy == SchedulingPolicy.PRIORITY

    @property
    def is_paused(self) -> bool:
        """Whether nothing at all is to be scheduled."""
        return self._scheduler._pause_state == PauseState.PAUSED_ALL

    @property
    def is_under_way(self) -> bool:
        """Whether any request waits for the output of a step."""
        return any(request.num_in_flight_tokens for request in self._scheduler.requests.values())

    def free_rows(self, num_admitted: int) -> int:
        """Return how many rows may still be admitted, beside those that run or were admitted."""
        scheduler = self._scheduler
        taken = len(scheduler.running) + scheduler.num_waiting_for_streaming_input + num_admitted
        return scheduler.max_num_active_reqs - taken

    def add(self, request: Request) -> None:
        """Hand a new request to vLLM."""
        self._plain.add_request(request)

    def finish(self, ids: str | Iterable[str] | None, status: RequestStatus) -> list[Request]:
        """End requests, whoever they belong to."""
        return self._plain.finish_requests(ids, status)

    def enter(self, request: Request) -> None:
        """Let a request that waited outside vLLM's queues wait in them."""
        self._scheduler.kv_holding_waiting.add_request(request)

    def put_back(self, requests: Sequence[Request]) -> None:
        """Put requests that were held back first into the queue, in order, unless they ended."""
        for request in reversed(requests):
            if request.request_id in self._scheduler.requests:
                self._scheduler.kv_holding_waiting.prepend_request(request)

    def take_out(self, request: Request) -> None:
        """Take a request out of the queues in which it may wait."""
        self._scheduler.kv_holding_waiting.remove_requests([request])
        self._scheduler.waiting.remove_requests([request])

    def withdraw(self, request: Request) -> None:
        """Take a request out of the queues for longer than a step."""
        self.take_out(request)
        self._scheduler.deferred_waiting.discard(request)

    def requeue(self, request: Request) -> None:
        """Let a member that was preempted wait before newcomers."""
        self._scheduler.waiting.remove_request(request)
        self._scheduler.kv_holding_waiting.prepend_request(request)

    def delay(self, request: Request) -> None:
        """Keep a running request out of the coming step."""
        # vLLM compares this with the number that the coming step will have.
        request.next_decode_eligible_step = self._scheduler.current_step + 2

    def preempt(self, request: Request) -> None:
        """Preempt a running request, between two steps."""
        if request in self._scheduler.running:
            self._scheduler.running.remove(request)
        self._scheduler._preempt_request(request, time.monotonic())
        # It may run again in the very next step, which vLLM's own preemption never allows.
        self._scheduler.prev_step_scheduled_req_ids.discard(request.request_id)

    def preempt_for_reset(self, requests: Sequence[Request]) -> None:
        """Preempt running requests, last ones first, and forget what they have under way."""
        timestamp = time.monotonic()
        for request in reversed(requests):
            if request not in self._scheduler.running:
                continue  # left with the workers of its group
            self._scheduler.running.remove(request)
            self._scheduler._preempt_request(request, timestamp, drop_stale_output=True)

    @contextmanager
    def without_newcomers(self, some_wait: bool) -> Iterator[None]:
        """Let nobody in who holds no blocks yet, if somebody waits for room."""
        scheduler = self._scheduler
        if not some_wait:
            yield
            return
        newcomers = scheduler.waiting
        scheduler.waiting = create_request_queue(scheduler.policy)
        try:
            yield
        finally:
            newcomers.prepend_requests(reversed(list(scheduler.waiting)))
            scheduler.waiting = newcomers

    @contextmanager
    def members_first(self, admitted: Sequence[Request]) -> Iterator[None]:
        """Let vLLM look at the members that were admitted before anybody else who waits.

        Whoever stands before them would take their slots, or, finding no room, end the scan.
        """
        scheduler = self._scheduler
        if not admitted:
            yield
            return
        scheduler.kv_holding_waiting.remove_requests(admitted)
        waiting = scheduler.kv_holding_waiting
        scheduler.kv_holding_waiting = create_request_queue(SchedulingPolicy.FCFS)
        for request in (*admitted, *waiting):
            scheduler.kv_holding_waiting.add_request(request)
        try:
            yield
        finally:
            left = scheduler.kv_holding_waiting
            scheduler.kv_holding_waiting = create_request_queue(scheduler.policy)
            for request in left:
                scheduler.kv_holding_waiting.add_request(request)

    def hide_end(self, request: Request) -> None:
        """Keep a branch's end from the front end, which would take it for the root's."""
        if self._scheduler.finished_req_ids_dict is not None:
            self._scheduler.finished_req_ids_dict[request.client_index].discard(request.request_id)

    def show_end(self, root: Request) -> None:
        """Let the front end know that a client's request is over."""
        if self._scheduler.finished_req_ids_dict is not None:
            self._scheduler.finished_req_ids_dict[root.client_index].add(root.request_id)


class EngineBlocks:
    """The KV cache of a vLLM scheduler."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._manager = scheduler.kv_cache_manager
        self.pool = scheduler.kv_cache_manager.block_pool
        self.block_size: int = scheduler.block_size

    @property
    def num_free(self) -> int:
        """Blocks that anybody may take."""
        return self.pool.get_num_free_blocks()

    @property
    def num_blocks(self) -> int:
        """Blocks of the whole pool, without the one that is never given to anybody."""
        return self.pool.num_gpu_blocks - 1

    @property
    def watermark(self) -> int:
        """Blocks that vLLM keeps free whenever it admits somebody."""
        return self._manager.watermark_blocks

    def of(self, request: Request) -> Sequence[KVCacheBlock]:
        """Return the blocks of a request, those of its prefix included."""
        return self._manager.coordinator.get_blocks(request.request_id)[0]

    def own(self, branch: Branch) -> list[KVCacheBlock]:
        """Return the blocks of a branch without those of its prefix."""
        return list(self.of(branch.request)[branch.num_prefix_blocks :])

    def take(self, num_blocks: int) -> list[KVCacheBlock]:
        """Take blocks out of the pool."""
        return self.pool.get_new_blocks(num_blocks)

    def give(self, request: Request, blocks: list[KVCacheBlock], num_computed: int) -> None:
        """Let a waiting request go on from K/V that is there, as if another host had sent it."""
        managers = self._manager.coordinator.single_type_managers
        managers[0].req_to_blocks[request.request_id] = blocks
        managers[0].num_cached_block[request.request_id] = 0
        request.num_computed_tokens = num_computed

    def cache_only(self, is_plain: Callable[[Request], bool]) -> None:
        """Let only plain requests fill the prefix cache.

        What a branch's block holds depends on masks and positions, not on token ids alone.
        """

        def of_plain_requests(cache_blocks: Callable[..., None]) -> Callable[..., None]:
            def cache_plain_blocks(request: Request, *args: Any, **kwargs: Any) -> None:
                if is_plain(request):
                    cache_blocks(request, *args, **kwargs)

            return cache_plain_blocks

        CACHE_BLOCKS.apply(self._manager.coordinator, of_plain_requests)

    def check_integrity(self, held: HeldBlocks) -> None:
        """Compare the pool's count of references with the owners of blocks; for tests.

        Raises:
            RuntimeError: A block has another number of owners than the pool says.

        """
        requests = self._manager.coordinator.single_type_managers[0].req_to_blocks.values()
        owners = Counter(block.block_id for blocks in requests for block in blocks)
        owners += held.references
        for block in self.pool.blocks[1:]:
            if block.ref_cnt != owners[block.block_id]:
                raise RuntimeError(f"{block} has {owners[block.block_id]} owners")
        if self.num_free != self.num_blocks - len(owners):
            raise RuntimeError(f"{self.num_free} blocks are free, {len(owners)} have owners")
