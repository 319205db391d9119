"""vLLM's scheduler with sequence groups: the hooks that vLLM calls, and who answers them.

Every branch is a vLLM request of its own that starts from blocks the group holds, as if it had hit
the prefix cache. What was sampled and what ended is reported to groups, and what they ask for is
done; batching, chunked prefill and preemption stay vLLM's.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, cast

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from ..observability.observer import Observer
from ..settings import Settings
from .block_headers import BlockHeaderBook
from .engine_queues import EngineBlocks, EngineQueues
from .fault_fence import fence
from .gang import GangScheduling
from .group_lifecycle import GroupLifecycle
from .group_opening import EngineLimits, GroupOpening
from .group_table import GroupTable
from .held_blocks import HeldBlocks
from .preemption import Preemption
from .step_message import StepMessage
from .token_feed import TokenFeed


class GroupHooks(Scheduler):
    """Answers vLLM's calls where a request is part of a group; decides nothing itself.

    Attributes:
        groups: Groups of unfinished requests.
        held_blocks: KV blocks that they hold beside vLLM's requests.
        lifecycle: Opens, advances and ends them.
        preemption: Evicts and resumes them.
        gangs: Lets those whose workers see each other step together.
        observer: Shows them to people.

    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model = self.vllm_config.model_config
        self.settings = Settings.from_config(self.vllm_config)
        self.groups = GroupTable()
        self.queues = queues = EngineQueues(self, cast(Scheduler, super()))
        self.blocks = blocks = EngineBlocks(self)
        self.opening = GroupOpening(self.vllm_config, self.settings, self._limits())
        headers = BlockHeaderBook(self.block_size)
        self.held_blocks = HeldBlocks(blocks.pool, headers, self.block_size)
        blocks.cache_only(self._is_plain)
        self.observer = Observer(
            self.vllm_config, self.groups, lambda: self.groups.load(self.held_blocks.num_held)
        )
        self.message = StepMessage(self.groups, self.held_blocks, headers, self.block_size)
        self.lifecycle = GroupLifecycle(
            self.groups,
            self.opening,
            self.held_blocks,
            queues,
            blocks,
            self.message,
            self.observer,
            most_held=self.settings.options.held_kv_fraction * blocks.num_blocks,
            vocab_size=model.get_vocab_size(),
        )
        self.preemption = Preemption(
            self.groups,
            self.held_blocks,
            queues,
            blocks,
            self.lifecycle,
            self.message,
            self.observer,
        )
        self.gangs = GangScheduling(self.groups, queues, blocks, self.preemption)
        ends = model.try_get_generation_config().get("eos_token_id")
        self.token_feed = TokenFeed({ends} if isinstance(ends, int) else set(ends or ()))
        if self.log_stats:
            default = self.settings.default
            shown = [default] if default in self.opening.grammars else []
            self.observer.count(default, shown, blocks.num_blocks)

    def _limits(self) -> EngineLimits:
        return EngineLimits(
            self.block_size,
            self.blocks.num_blocks,
            self.max_model_len,
            self.queues.step_tokens,
            self.queues.step_rows,
        )

    def _is_plain(self, request: Request) -> bool:
        """Whether a request is computed with plain causal attention: the client's own is."""
        branch = self.groups.branch(request.request_id)
        return branch is None or request is branch.state.root

    def check_integrity(self) -> None:
        """See that every reference on a KV block has an owner; for tests.

        Raises:
            RuntimeError: A block has another number of owners than the pool says, or a group lacks
                the blocks of a finished node.

        """
        self.blocks.check_integrity(self.held_blocks)
        for state in self.groups:
            if not all(node in self.held_blocks for node in state.group.nodes if node.sealed):
                raise RuntimeError(f"{state.root.request_id} lacks the blocks of a finished node")

    # Hooks, in the order of a request's life.

    def add_request(self, request: Request) -> None:
        if request.request_id not in self.requests:
            self.lifecycle.open(request)
        super().add_request(request)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        if self.message.is_idle:
            return super().schedule(throttle_prefills)
        self.preemption.begin_step()
        some_wait = self.preemption.resume()
        some_wait = self.gangs.align() or some_wait
        # A worker that starts a step must not be put off while the others go on.
        throttle_prefills = throttle_prefills and not any(s.is_gang for s in self.groups)
        with self.preemption.inside_step():
            # Newcomers would take the room that a group which was evicted is waiting for.
            with (
                self.queues.members_first(self.gangs.admitted),
                self.queues.without_newcomers(some_wait),
            ):
                output = super().schedule(throttle_prefills)
            self.gangs.restore_aside()
            self.gangs.note_strays(output)
            self.preemption.keep_going(output, self.gangs.is_held)
            self.gangs.end_step()
            return self.message.added_to(output)

    def _holds_kv_blocks(self, request: Request) -> bool:
        # Members go before newcomers: a newcomer that does not fit would stop the scan before them,
        # while their group holds the blocks it waits for.
        return self.groups.is_member(request) or Scheduler._holds_kv_blocks(request)

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        branch = self.groups.branch(request.request_id)
        if branch is not None and not all(seen.sealed for seen in branch.node.prefix):
            return False
        return super()._handle_blocked_waiting_request(request)

    def _get_local_prefix_cache_hit(
        self, request: Request, *bounds: Any
    ) -> tuple[KVCacheBlocks, int, int, bool]:
        # vLLM 0.33 adds a bound on the hit, for outputs that configure.py refuses.
        branch = self.groups.branch(request.request_id)
        if branch is not None and branch.node.prefix:
            with fence(branch.state):
                blocks = self.held_blocks.prefix(branch.node)
                return KVCacheBlocks((blocks,)), len(blocks) * self.block_size, 0, False
        return super()._get_local_prefix_cache_hit(request, *bounds)

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        # vLLM asks this of every row; none of a row's tokens puts it off without stopping others.
        num_new_tokens = self.gangs.most_tokens(request, num_new_tokens)
        return super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)

    def _preempt_request(
        self, request: Request, timestamp: float, drop_stale_output: bool = False
    ) -> None:
        branch = self.groups.branch(request.request_id)
        if branch is None or not branch.state.group.branched:
            self.preemption.other_leaves()
            super()._preempt_request(request, timestamp, drop_stale_output)
        elif not self.preemption.member_leaves(branch):
            own = self.blocks.own(branch)
            super()._preempt_request(request, timestamp, drop_stale_output)
            self.lifecycle.after_preemption(branch, own)

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        update = super()._update_request_with_output
        branch = self.groups.branch(request.request_id)
        if branch is None:
            return update(request, new_token_ids, is_stale)
        update = partial(update, request, is_stale=is_stale)
        return self.token_feed.take(branch, new_token_ids, is_stale, update)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if self.groups:
            self.lifecycle.update(outputs)
        return outputs

    def _free_request(
        self, request: Request, delay_free_blocks: bool = False
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        branch = self.groups.branch(request.request_id)
        if branch is None:
            return super()._free_request(request, delay_free_blocks)
        own = self.lifecycle.before_free(branch)
        result = super()._free_request(request, delay_free_blocks)
        self.lifecycle.after_free(branch, own)
        return result

    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> list[Request]:
        if not self.groups:
            return super().finish_requests(request_ids, finished_status)
        return self.lifecycle.finish(request_ids, finished_status)

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        if reset_running_requests:
            self.preemption.preempt_for_reset()
        return super().reset_prefix_cache(reset_running_requests, reset_connector)

    def get_num_unfinished_requests(self) -> int:
        return super().get_num_unfinished_requests() + self.preemption.num_evicted


class GroupScheduler(GroupHooks, Scheduler):
    """vLLM's scheduler with sequence groups."""


class AsyncGroupScheduler(GroupHooks, AsyncScheduler):
    """vLLM's asynchronous scheduler with sequence groups."""
