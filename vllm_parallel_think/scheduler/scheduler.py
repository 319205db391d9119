"""Groups in vLLM's scheduler: a mixin over ``Scheduler`` and ``AsyncScheduler``.

Every branch is a vLLM request of its own that starts from blocks the group holds, as if it had hit
the prefix cache. The mixin reports to :class:`~vllm_parallel_think.core.interface.Group`
what was sampled and what ended, and does what the group asks for; batching, chunked prefill and
preemption stay vLLM's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import RequestQueue, create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from ..compat.logger import init_logger
from ..compat.patches import CACHE_BLOCKS
from ..core.branch_graph import Kind, Node, State
from ..core.config.hogwild_profile import HogwildProfile
from ..core.config.loading import builtin_profiles
from ..core.config.request_options import LIVE_KEY, parse_request
from ..core.config.server_options import CONFIG_KEY
from ..core.errors import OptionError, short_id
from ..core.fork_join.group import ForkJoinGroup
from ..core.fork_join.tag_scanner import Grammar
from ..core.hogwild.group import HogwildGroup
from ..core.hogwild.prompts import HogwildPrompts
from ..core.interface import Cause, Group, Limits, Verdict
from ..observability.observer import Observer
from ..scheduler_output import HogwildUpdate, KVSwap, with_groups
from ..settings import Settings
from ..tokenizer import TokenizerVocabulary
from ..validation import workers_refusal
from . import client_output
from .block_headers import BlockHeaderBook
from .branch_request import branch_request
from .gang import LockStepMixin, is_gang
from .group_table import Branch, GroupState, GroupTable
from .held_blocks import HeldBlocks
from .step_message import end_of, update_of

logger = init_logger(__name__)

_COMPLETE = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)
"""Ends after which all tokens of a branch are in the KV cache."""


class GroupSchedulerMixin(LockStepMixin):
    """Adds sequence groups to a vLLM scheduler."""

    waiting: RequestQueue

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settings = Settings.from_config(self.vllm_config)
        self._vocab_size = self.vllm_config.model_config.get_vocab_size()
        self._grammars = self._usable_grammars()
        self._profiles = {name: grammar.profile for name, grammar in self._grammars.items()}
        self._no_workers = workers_refusal(self.vllm_config)
        pattern = self._settings.options.vote_pattern
        self._vote_pattern = re.compile(pattern) if pattern is not None else None
        self._families = GroupTable()
        self._headers = BlockHeaderBook(self.block_size)
        self._ledger = HeldBlocks(self.kv_cache_manager.block_pool, self._headers, self.block_size)
        self._num_requests_made = 0
        self._preempted_member = self._preempted_other = False
        self._swaps: list[KVSwap] = []
        self._ended_teams: list[HogwildUpdate] = []
        self._aside: list[Request] = []
        self._admitted: list[Request] = []
        self._allowed: dict[str, int] = {}
        self._num_empty_steps = 0
        self._is_scheduling = False
        ends = self.vllm_config.model_config.try_get_generation_config().get("eos_token_id")
        self._eos_tokens = {ends} if isinstance(ends, int) else set(ends or ())
        self._keep_branches_out_of_prefix_cache()
        self._observer = Observer(
            self.vllm_config, self._families, lambda: self._families.load(self._ledger.num_held)
        )
        if self.log_stats:
            pool = self.kv_cache_manager.block_pool.num_gpu_blocks - 1
            shown = [self._settings.default] if self._settings.default in self._grammars else []
            self._observer.count(self._settings.default, shown, pool)

    def _usable_grammars(self) -> dict[str, Grammar | HogwildPrompts]:
        """Bind profiles to the tokenizer; a built-in one that nobody chose may not suit it."""
        vocabulary = TokenizerVocabulary.from_config(self.vllm_config.model_config)
        grammars: dict[str, Grammar | HogwildPrompts] = {}
        for name, profile in self._settings.profiles.items():
            try:
                grammar: Grammar | HogwildPrompts
                if isinstance(profile, HogwildProfile):
                    grammar = HogwildPrompts(profile, vocabulary)
                else:
                    grammar = Grammar(profile, vocabulary)
                grammar.check(self.vllm_config.model_config.get_vocab_size())
            except OptionError as error:
                if name == self._settings.default or name not in builtin_profiles():
                    raise
                logger.info("requests cannot name %s: %s", name, error)
            else:
                grammars[name] = grammar
        return grammars

    # -- requests in ---------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        if request.request_id not in self.requests:
            family = self._new_family(request)
            if family is not None:
                self._families.add(family)
                self._observer.started(family)
                family.group.started(family.group.trunk)
        super().add_request(request)

    def _new_family(self, request: Request) -> GroupState | None:
        """Return a family for a request that may branch; never raises."""
        params = request.sampling_params
        if params is None or request.prompt_token_ids is None or request.resumable:
            return None
        if request.mm_features or request.prompt_embeds is not None:
            return None  # a replay computes token ids only
        if self._families.family(request.request_id) is not None:
            return None
        try:
            options = parse_request(
                params.extra_args,
                self._settings.options,
                self._profiles,
                self._settings.default,
                no_workers=self._no_workers,
            ).within(request.max_tokens)
            if options.profile is None:
                return None
            words, prompt = self._grammars[options.profile], request.prompt_token_ids
            group: Group
            if isinstance(words, HogwildPrompts):
                group = HogwildGroup(prompt, words, options, self._limits(request))
            else:
                group = ForkJoinGroup(prompt, words, options, self._limits(request))
        except OptionError as error:
            # The front end answers such a request with HTTP 400; other ways in get a plain request.
            request_id = short_id(request.request_id)
            logger.warning("request %s runs without branches: %s", request_id, error)
            return None
        except Exception:  # a fault of one group must not end the engine
            logger.exception("request %s runs without branches", short_id(request.request_id))
            return None
        if not self._open(request, group):
            return None
        family = GroupState(request, group)
        if isinstance(group, HogwildGroup):
            family.error = self._too_wide(group)
        return family

    def _limits(self, request: Request) -> Limits:
        options = self._settings.options
        assert request.sampling_params is not None
        max_tokens = request.max_tokens
        if options.max_total_tokens is not None:
            max_tokens = min(max_tokens, options.max_total_tokens)
        pool = self.kv_cache_manager.block_pool.num_gpu_blocks - 1
        return Limits(
            block_size=self.block_size,
            index_blocks=min((self.max_model_len - 1) // self.block_size, pool),
            max_tokens=max_tokens,
            max_forks=options.max_forks,
            has_room=self._has_room,
            min_tokens=request.sampling_params.min_tokens,
            ignore_eos=request.sampling_params.ignore_eos,
            vote_pattern=self._vote_pattern,
        )

    def _has_room(self, num_blocks: int) -> bool:
        pool = self.kv_cache_manager.block_pool.num_gpu_blocks - 1
        return self._ledger.num_held + num_blocks <= self._settings.options.held_kv_fraction * pool

    def _open(self, request: Request, group: Group) -> bool:
        """Append the profile's opening to the prompt; return whether there is room for it."""
        opening = list(group.opening)
        limit = self._settings.options.max_total_tokens
        if limit is not None:
            request.max_tokens = min(request.max_tokens, limit)
        if not opening:
            return True
        # Rules for workers are no part of the answer.
        visible = 0 if isinstance(group, HogwildGroup) else len(opening)
        if visible >= request.max_tokens or request.num_tokens + len(opening) >= self.max_model_len:
            return False
        assert request.prompt_token_ids is not None
        request.prompt_token_ids = [*request.prompt_token_ids, *opening]
        request._all_token_ids.extend(opening)
        request.num_prompt_tokens += len(opening)
        request.max_tokens -= visible
        request.update_block_hashes()
        return True

    # -- scheduling ----------------------------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        # A preemption inside this call is vLLM's own, in the middle of a step.
        try:
            return self._schedule(throttle_prefills)
        finally:
            self._is_scheduling = False

    def _schedule(self, throttle_prefills: bool) -> SchedulerOutput:
        if not self._families and self._headers.idle:
            return super().schedule(throttle_prefills)
        self._preempted_member = self._preempted_other = False
        some_wait = self._unpark()
        some_wait = self._align_gangs() or some_wait
        # A worker that starts a step must not be put off while the others go on.
        throttle_prefills = throttle_prefills and not any(map(is_gang, self._families))
        self._is_scheduling = True
        # Newcomers would take the room that a family which gave way is waiting for.
        with self._members_first(), self._without_newcomers(some_wait):
            output = super().schedule(throttle_prefills)
        self._restore_aside()
        self._note_strays(output)
        self._keep_going(output)
        has_branches = self._place_blocks(output)
        headers, written = self._headers.take(), self._written(output)
        teams, swaps = self._team_updates(), tuple(self._swaps)
        self._swaps.clear()
        if headers is None and not (has_branches or written or teams or swaps):
            return output
        return with_groups(output, headers, has_branches, written, teams, swaps)

    @contextmanager
    def _without_newcomers(self, some_wait: bool) -> Iterator[None]:
        """Let nobody in who holds no blocks yet, if somebody waits for room."""
        if not some_wait:
            yield
            return
        newcomers = self.waiting
        self.waiting = create_request_queue(self.policy)
        try:
            yield
        finally:
            newcomers.prepend_requests(reversed(list(self.waiting)))
            self.waiting = newcomers

    def _team_updates(self) -> tuple[HogwildUpdate, ...]:
        """Return what workers' groups look like, where that changed."""
        updates, self._ended_teams = self._ended_teams, []
        for family in self._families:
            if family.error is not None:
                continue
            try:
                update = update_of(family, self._ledger)
            except Exception as error:
                self._fault(family, error)
                continue
            if update is not None:
                updates.append(update)
        return tuple(updates)

    def _get_local_prefix_cache_hit(
        self, request: Request, *bounds: Any
    ) -> tuple[KVCacheBlocks, int, int, bool]:
        # vLLM 0.33 adds a bound on the hit, for outputs that configure.py refuses.
        branch = self._families.branch(request.request_id)
        if branch is None or not branch.node.prefix:
            return super()._get_local_prefix_cache_hit(request, *bounds)
        try:
            blocks = self._ledger.prefix(branch.node)
        except KeyError as error:
            self._fault(branch.family, error)
            return super()._get_local_prefix_cache_hit(request, *bounds)
        return KVCacheBlocks((blocks,)), len(blocks) * self.block_size, 0, False

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        branch = self._families.branch(request.request_id)
        if branch is not None and not all(seen.sealed for seen in branch.node.prefix):
            return False
        return super()._handle_blocked_waiting_request(request)

    def _holds_kv_blocks(self, request: Request) -> bool:
        # Members go before newcomers: a newcomer that does not fit would stop the scan in front of
        # them, while their family holds the blocks it waits for.
        return self._is_member(request) or Scheduler._holds_kv_blocks(request)

    def _preempt_request(
        self, request: Request, timestamp: float, drop_stale_output: bool = False
    ) -> None:
        branch = self._families.branch(request.request_id)
        if branch is None or not branch.family.group.branched:
            self._preempted_other = True
            super()._preempt_request(request, timestamp, drop_stale_output)
            return
        self._preempted_member = True
        if is_gang(branch.family) and not branch.family.parked:
            if not self._is_scheduling:
                # None of its workers goes on without the others.
                self._give_way(branch.family)
                return
            branch.family.error = "a worker was preempted while others took the step"
        own = self._own_blocks(branch)
        super()._preempt_request(request, timestamp, drop_stale_output)
        self._ledger.forget(own)
        branch.num_placed = 0
        self.waiting.remove_request(request)
        self.kv_holding_waiting.prepend_request(request)

    def _own_blocks(self, branch: Branch) -> list[Any]:
        blocks = self.kv_cache_manager.coordinator.get_blocks(branch.request.request_id)[0]
        num_prefix = sum(map(branch.family.group.blocks_of, branch.node.prefix))
        return list(blocks[num_prefix:])

    def _place_blocks(self, output: SchedulerOutput) -> bool:
        """Send position headers of blocks that branches were given in this step."""
        for new in output.scheduled_new_reqs:
            self._place(new.req_id, new.block_ids, whole=True)
        cached = output.scheduled_cached_reqs
        for req_id, block_ids in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if block_ids is not None:
                self._place(req_id, block_ids, whole=req_id in cached.resumed_req_ids)
        return any(
            branch.node.prefix
            for req_id in output.num_scheduled_tokens
            if (branch := self._families.branch(req_id)) is not None
        )

    def _place(self, req_id: str, block_ids: tuple[list[int], ...], whole: bool) -> None:
        branch = self._families.branch(req_id)
        if branch is None or not branch.node.prefix:
            return
        own = block_ids[0]
        try:
            if whole:
                own = own[sum(map(branch.family.group.blocks_of, branch.node.prefix)) :]
                branch.num_placed = 0
            for block in own:
                start = branch.node.start + branch.num_placed * self.block_size
                self._headers.place(block, start, branch.node.lane.thought)
                branch.num_placed += 1
        except Exception as error:
            self._fault(branch.family, error)

    def _written(self, output: SchedulerOutput) -> dict[str, list[int]]:
        """Return what penalties of branches that enter the batch count beside their own tokens."""
        cached = output.scheduled_cached_reqs
        entering = {new.req_id for new in output.scheduled_new_reqs} | set(cached.resumed_req_ids)
        written = {}
        for req_id in entering:
            branch = self._families.branch(req_id)
            params = branch.request.sampling_params if branch is not None else None
            if branch is None or params is None:
                continue
            if params.presence_penalty or params.frequency_penalty:
                try:
                    tokens = branch.family.group.written_before(branch.node)
                except Exception as error:
                    self._fault(branch.family, error)
                    continue
                if tokens:
                    written[req_id] = tokens
        return written

    # -- what was sampled ----------------------------------------------------------------------

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        branch = self._families.branch(request.request_id)
        if branch is None:
            return super()._update_request_with_output(request, new_token_ids, is_stale)
        status = request.status
        try:
            return self._feed(branch, new_token_ids, is_stale)
        except Exception as error:
            self._fault(branch.family, error)
            # A request that counts as finished already would never be taken out of the queues.
            request.status = status
            return [], False

    def _feed(
        self, branch: Branch, new_token_ids: list[int], is_stale: bool
    ) -> tuple[list[int], bool]:
        """Feed tokens one at a time, so that a branch ends exactly at its tag."""
        request, node, group = branch.request, branch.node, branch.family.group
        update = partial(super()._update_request_with_output, request, is_stale=is_stale)
        kept: list[int] = []
        for token in new_token_ids:
            if node.state in (State.CLOSING, State.DONE) or node.kind is Kind.CLOSE:
                # The step was run for the K/V of its input; what it sampled is of no use.
                if is_stale:
                    return kept, False
                if node.state is not State.DONE:
                    group.end(node, Cause.CLOSED)
                request.status = RequestStatus.FINISHED_STOPPED
                return kept, True
            taken, stopped = update([token])
            if stopped and self._is_eos(branch, token):
                group.end(node, Cause.EOS)
                # Only the token that ends the whole answer belongs to it.
                return kept + (taken if group.finish is not None and not node.depth else []), True
            kept += taken
            verdict = group.feed(node, token)
            if verdict is Verdict.RETRACT:
                group.end(node, Cause.EOS)
                request.status = RequestStatus.FINISHED_STOPPED
                return kept[: len(kept) - len(taken)], True
            if stopped:
                stop = request.stop_reason if isinstance(request.stop_reason, int) else None
                capped = request.status == RequestStatus.FINISHED_LENGTH_CAPPED
                group.end(node, Cause.LENGTH if capped else Cause.STOP_TOKEN, stop)
                return kept, True
            if verdict is Verdict.END:
                group.end(node, Cause.VERDICT)
                final = group.finish is not None and group.finish.reason == "length"
                request.status = (
                    RequestStatus.FINISHED_LENGTH_CAPPED
                    if final
                    else RequestStatus.FINISHED_STOPPED
                )
                return kept, True
        return kept, False

    def _is_eos(self, branch: Branch, token: int) -> bool:
        """Whether a branch ended by an end-of-sequence token.

        vLLM keeps one such token apart and puts the others of the model's generation configuration
        among the client's stop tokens. In a path they all end the path, not the answer.
        """
        params = branch.request.sampling_params
        assert params is not None
        return branch.request.status == RequestStatus.FINISHED_STOPPED and (
            token == params.eos_token_id
            or (branch.node.depth > 0 and not params.ignore_eos and token in self._eos_tokens)
        )

    def _free_request(
        self, request: Request, delay_free_blocks: bool = False
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        branch = self._families.branch(request.request_id)
        if branch is None:
            return super()._free_request(request, delay_free_blocks)
        own = self._own_blocks(branch)
        self._keep_blocks(branch, own)
        result = super()._free_request(request, delay_free_blocks)
        self._ledger.forget(own)
        if branch.family.group.branched and self.finished_req_ids_dict is not None:
            # The front end would take the root for finished, or look for a branch it does not know.
            self.finished_req_ids_dict[request.client_index].discard(request.request_id)
        return result

    def _keep_blocks(self, branch: Branch, own: list[Any]) -> None:
        """Hold a finished node's blocks, if somebody may attend to them and they are all there."""
        family, node = branch.family, branch.node
        complete = branch.request.status in _COMPLETE and node.state is State.DONE
        final = family.ended or family.group.finish is not None or node.retired
        if final or not complete or not family.group.branched:
            return
        needed = family.group.blocks_of(node)
        prefix = sum(map(family.group.blocks_of, node.prefix)) * self.block_size
        # A path that is cut may be waiting, or be computing tokens again that it lost.
        computed = branch.request.num_computed_tokens - prefix
        kept = len(own) >= needed and computed >= len(node.tokens)
        if kept:
            self._ledger.hold(node, own[:needed])
        family.group.sealed(node, kept=kept)

    # -- outputs -------------------------------------------------------------------------------

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if not self._families:
            return outputs
        touched = self._collect(outputs)
        for family in touched:
            try:
                released = self._advance(family) if family.error is None else []
            except Exception as error:
                self._fault(family, error)
                released = []
            if family.error is not None and not family.ended:
                released.append(self._fail(family))
            if released:
                client = family.root.client_index
                outputs.setdefault(client, EngineCoreOutputs()).outputs.extend(released)
        self._observer.stepped()
        return outputs

    def _collect(self, outputs: dict[int, EngineCoreOutputs]) -> list[GroupState]:
        """Take branches' outputs out of the step's outputs, into the groups that own them."""
        touched: dict[GroupState, None] = {}
        for engine_outputs in outputs.values():
            others: list[EngineCoreOutput] = []
            for output in engine_outputs.outputs:
                branch = self._families.branch(output.request_id)
                if branch is None:
                    others.append(output)
                    continue
                touched[branch.family] = None
                if output.new_token_ids:
                    client_output.hold_back(branch.node, output, branch.family.group.branched)
                elif output.prefill_stats is not None and branch.request is branch.family.root:
                    branch.family.first_output = output
                if output.finished:
                    self._families.detach(branch)
            engine_outputs.outputs[:] = others
        touched.update((family, None) for family in self._families if family.error is not None)
        return list(touched)

    def _advance(self, family: GroupState) -> list[EngineCoreOutput]:
        """Start what can start, drop what nobody will see, and return what the client may see."""
        group = family.group
        group.settle()
        for node in group.take_dropped():
            if (request := family.requests.get(node)) is not None:
                self._drop_request(request)
        for node in group.take_cut():
            self._cut(family, node)
        if not family.parked and family.num_changes_seen != group.num_changes:
            for node in group.take_retired():
                if node.sealed:
                    self._ledger.release(node)
                    group.sealed(node, kept=False)
            self._submit_ready(family)
            self._observer.changed(family)
        released: list[EngineCoreOutput] = []
        summary = live = None
        # The front end looks for stop strings: any output may turn out to be the last one.
        may_end = bool(family.root.sampling_params and family.root.sampling_params.stop)
        for emission in group.release():
            final = emission.finish is not None
            if summary is None and (group.branched or final or may_end):
                summary, live = group.summary().as_dict(), group.live_view()
            if not group.branched and emission.payload is not None:
                output = emission.payload
                if final or may_end:
                    client_output.attach(output, CONFIG_KEY, summary)
            else:
                show = group.branched or final or may_end
                output = client_output.to_output(
                    family.root, emission, summary if show else None, self._vocab_size
                )
                if emission.payload is None and group.trunk.outbox:
                    self._move_prefill_stats(group, output)
            # A path that was held back is released by the thousand tokens.
            if not (released and client_output.merge(released[-1], output)):
                released.append(output)
        if released and family.first_output is not None:
            client_output.introduce(released[0], family.first_output)
            family.first_output = None
        if live is not None and released and not group.finished:
            client_output.attach(released[-1], LIVE_KEY, live)
        if group.finished:
            self._end(family)
        return released

    def _cut(self, family: GroupState, node: Node) -> None:
        """Stop a path with what it has."""
        request = family.requests.get(node)
        family.group.end(node, Cause.CUT)
        if request is not None:
            self._drop_request(request, RequestStatus.FINISHED_STOPPED)

    @staticmethod
    def _move_prefill_stats(group: Group, opening: EngineCoreOutput) -> None:
        """Put what vLLM reports once, with a request's first output, on the opening in front."""
        if group.trunk.outbox:
            first = group.trunk.outbox[0].payload
            opening.prefill_stats, first.prefill_stats = first.prefill_stats, None
            opening.events, first.events = first.events, None

    def _submit_ready(self, family: GroupState) -> None:
        group = family.group
        family.num_changes_seen = group.num_changes
        for node in group.ready():
            parked = family.requests.get(node) if node.parked else None
            if parked is not None:
                self.kv_holding_waiting.add_request(parked)
            else:
                self._num_requests_made += 1
                request = branch_request(
                    family.root,
                    node,
                    f"{family.root.request_id}#{node.address}-{self._num_requests_made}",
                    group.padded_prefix(node),
                    group.temperature(node),
                )
                self._families.attach(family, node, request)
                super().add_request(request)
            group.started(node)

    # -- ends ----------------------------------------------------------------------------------

    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> list[Request]:
        if not self._families:
            return super().finish_requests(request_ids, finished_status)
        if request_ids is None:
            ids = {*self.requests, *(f.root.request_id for f in self._families)}
        else:
            ids = {request_ids} if isinstance(request_ids, str) else set(request_ids)
        roots: dict[str, GroupState] = {}
        for request_id in ids:
            branch = self._families.branch(request_id)
            family = self._families.family(request_id) or (branch.family if branch else None)
            if family is not None:
                roots[family.root.request_id] = family
        finished = super().finish_requests(
            [i for i in ids if i not in roots and self._families.branch(i) is None], finished_status
        )
        for family in roots.values():
            family.root.status = finished_status if family.group.branched else family.root.status
            self._end(family, finished_status, outcome="aborted")
            finished.append(family.root)
        return finished

    def _end(
        self,
        family: GroupState,
        status: RequestStatus = RequestStatus.FINISHED_ABORTED,
        outcome: str | None = None,
    ) -> None:
        """End whatever still runs for a request and give all its blocks back."""
        family.ended = True
        family.parked = False
        for request in list(family.requests.values()):
            self._drop_request(request, status)
        for node in family.group.nodes:
            if node.sealed:
                self._ledger.release(node)
                node.sealed = False
        self._families.remove(family)
        if (told := end_of(family)) is not None:
            self._ended_teams.append(told)
        if family.stash:
            family.stash.clear()
            self._swaps.append(KVSwap(family.root.request_id, (), out=False))
        if family.group.branched and self.finished_req_ids_dict is not None:
            self.finished_req_ids_dict[family.root.client_index].add(family.root.request_id)
        own = "branched" if family.group.has_paths else "unbranched"
        self._observer.ended(family, outcome or own)

    def _fail(self, family: GroupState) -> EngineCoreOutput:
        summary = family.group.summary().as_dict() if family.group.branched else None
        self._end(family, outcome="failed")
        return client_output.failed(family.root, family.error or "internal error", summary)

    def _drop_request(
        self, request: Request, status: RequestStatus = RequestStatus.FINISHED_ABORTED
    ) -> None:
        """End one vLLM request whose output nobody waits for."""
        super().finish_requests(request.request_id, status)
        branch = self._families.branch(request.request_id)
        if branch is not None:
            branch.node.computing = False
            self._families.detach(branch)

    def _keep_branches_out_of_prefix_cache(self) -> None:
        """Hash only what plain causal attention would compute too: the client's own request.

        What a branch's block holds depends on masks and positions, not on token ids alone.
        """

        def of_plain_requests(cache_blocks: Callable[..., None]) -> Callable[..., None]:
            def cache_plain_blocks(request: Request, *args: Any, **kwargs: Any) -> None:
                branch = self._families.branch(request.request_id)
                if branch is None or request is branch.family.root:
                    cache_blocks(request, *args, **kwargs)

            return cache_plain_blocks

        CACHE_BLOCKS.apply(self.kv_cache_manager.coordinator, of_plain_requests)


class GroupScheduler(GroupSchedulerMixin, Scheduler):
    """vLLM's scheduler with sequence groups."""


class AsyncGroupScheduler(GroupSchedulerMixin, AsyncScheduler):
    """vLLM's asynchronous scheduler with sequence groups."""
