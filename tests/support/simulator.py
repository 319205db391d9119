"""vLLM's real scheduler, ours on top, and a worker whose attention is a hash.

The worker keeps a paged KV cache in which every slot holds a fingerprint of (token, RoPE position,
the fingerprints of all slots it sees): what a layer of a transformer keeps, at a millionth of the
price. A branch that sees one slot too many, misses one, reads a block that was handed to somebody
else, or sits at a wrong position gets another fingerprint, and with it another text.
"""

from __future__ import annotations

import hashlib
import pickle
import random
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from tests.support.hogwild_cases import ENDS
from tests.support.tiny import EOS, IdGrammar
from vllm_parallel_think.core.branch_graph import State
from vllm_parallel_think.core.hogwild.cache_layout import CacheLayout, Run
from vllm_parallel_think.plugin import register
from vllm_parallel_think.scheduler.scheduler import AsyncGroupScheduler, GroupScheduler
from vllm_parallel_think.scheduler_output import (
    NATURAL,
    GroupSchedulerOutput,
    HogwildUpdate,
    KVSwap,
)

TOKENS = range(40, 100)
"""What a text consists of beside tags."""

NO_DRAFT = -1
"""Fills a draft's place; never what is sampled."""


def fingerprint(token: int, position: int, seen: list[bytes]) -> bytes:
    """Stand in for the K/V of a token that sees others, in order."""
    digest = hashlib.blake2b(f"{token}@{position}".encode(), digest_size=8)
    for other in seen:
        digest.update(other)
    return digest.digest()


def sample(state: bytes, grammar: IdGrammar, may_end: bool = True) -> int:
    """Stand in for greedy sampling: a tag now and then, else a word."""
    rng = random.Random(state)
    draw = rng.random()
    if draw < 0.06:
        return rng.choice(grammar.triggers)
    if draw < 0.16:
        return rng.choice(grammar.ends)
    if draw < 0.175 and may_end:
        return EOS
    if grammar.join_end and draw < 0.25:
        return rng.choice(grammar.join_end)
    return rng.choice(TOKENS)


def write(state: bytes) -> int:
    """Stand in for greedy sampling by a worker: the end of a step now and then, else a word."""
    rng = random.Random(state)
    draw = rng.random()
    if draw < 0.15:
        return rng.choice(ENDS)
    return EOS if draw < 0.16 else rng.choice(TOKENS)


def hash_graph(grammar: IdGrammar) -> type:
    """Return a graph class for the oracle that computes the same fingerprints, without blocks."""

    class HashGraph:
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.states: list[bytes] = []

        def add(self, token: int, position: int, context: list[int]) -> int:
            self.tokens.append(token)
            self.states.append(fingerprint(token, position, [self.states[i] for i in context]))
            return len(self.tokens) - 1

        def truncate(self, size: int) -> None:
            del self.tokens[size:], self.states[size:]

        def next_token(self, context: list[int], _penalty: Any, may_end: bool = True) -> int:
            return sample(self.states[context[-1]], grammar, may_end)

    return HashGraph


@dataclass
class _Row:
    tokens: list[int]
    blocks: list[int]
    num_computed: int
    num_least: int
    """Tokens in front of the first one that may be the end of the text."""
    drafts: list[int] = field(default_factory=list)


class HashWorker:
    """Executes scheduler outputs the way Model Runner V1 does, over fingerprints.

    With speculation its drafts are what it would write anyway, spoilt now and then; K/V of rejected
    drafts stays where it was written, as in a real cache.
    """

    def __init__(
        self, num_blocks: int, block_size: int, grammar: IdGrammar, num_drafts: int = 0
    ) -> None:
        self.block_size, self.grammar, self.num_drafts = block_size, grammar, num_drafts
        self.num_kept = 0
        self.fill = [block_size] * num_blocks
        self.position = [NATURAL] * num_blocks
        self.cache: dict[tuple[int, int], bytes] = {}
        self.rows: dict[str, _Row] = {}
        self.teams = HashTeams(self)

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """Run one step."""
        self._apply_headers(output)
        self._update_rows(output)
        self.teams.apply(output)
        ids = list(output.num_scheduled_tokens)
        sampled = {i: self._run(i, output) for i in ids if i not in self.teams.member}
        sampled |= self.teams.run([i for i in ids if i in self.teams.member], output)
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={req_id: i for i, req_id in enumerate(ids)},
            sampled_token_ids=[sampled[req_id] for req_id in ids],
        )

    def _apply_headers(self, output: SchedulerOutput) -> None:
        headers = output.headers if isinstance(output, GroupSchedulerOutput) else None
        if headers is None:
            return
        rows = zip(headers.blocks, headers.fill, headers.position, strict=True)
        for block, fill, position in rows:
            self.fill[block], self.position[block] = fill, position

    def _update_rows(self, output: SchedulerOutput) -> None:
        for req_id in output.finished_req_ids:
            self.rows.pop(req_id, None)
        for new in output.scheduled_new_reqs:
            self.rows[new.req_id] = _Row(
                list(new.prompt_token_ids),
                list(new.block_ids[0]),
                new.num_computed_tokens,
                len(new.prompt_token_ids) + new.sampling_params.min_tokens,
            )
        cached = output.scheduled_cached_reqs
        for i, req_id in enumerate(cached.req_ids):
            row = self.rows[req_id]
            new_blocks = cached.new_block_ids[i]
            if req_id in cached.resumed_req_ids:
                row.blocks = list(new_blocks[0])
                row.tokens = list(cached.all_token_ids[req_id])
            elif new_blocks is not None:
                row.blocks += new_blocks[0]
            row.num_computed = cached.num_computed_tokens[i]
            if self.num_drafts and req_id not in cached.resumed_req_ids:
                # The scheduler may count on drafts that have been rejected meanwhile.
                row.num_computed = min(row.num_computed, len(row.tokens) - 1)

    def _run(self, req_id: str, output: SchedulerOutput) -> list[int]:
        row = self.rows[req_id]
        start = row.num_computed
        num = output.num_scheduled_tokens[req_id]
        num_drafts = len(output.scheduled_spec_decode_tokens.get(req_id, ()))
        drafts, row.drafts = row.drafts[:num_drafts], []
        drafts += [NO_DRAFT] * (num_drafts - len(drafts))
        text = row.tokens[: start + num - num_drafts] + drafts
        states = [self._write(row, index, text[index]) for index in range(start, start + num)]
        if start + num - num_drafts < len(row.tokens):
            return []
        written = start + num - num_drafts
        sampled = [sample(states[-num_drafts - 1], self.grammar, written >= row.num_least)]
        for draft, state in zip(drafts, states[num - num_drafts :], strict=True):
            if draft != sampled[-1]:
                break
            written += 1
            sampled.append(sample(state, self.grammar, written >= row.num_least))
        self.num_kept += len(sampled) - 1
        row.tokens += sampled
        self._propose(row)
        return sampled

    def _propose(self, row: _Row) -> None:
        """Guess the next tokens from the cache, without writing into it."""
        written: dict[tuple[int, int], bytes] = {}
        text = list(row.tokens)
        for _ in range(self.num_drafts):
            if (len(text) - 1) // self.block_size >= len(row.blocks):
                return
            state = self._write(row, len(text) - 1, text[-1], written)
            spoilt = random.Random(state + b"draft").random() < 0.2
            text.append(TOKENS[0] if spoilt else sample(state, self.grammar))
            row.drafts.append(text[-1])

    def _write(
        self, row: _Row, index: int, token: int, into: dict[tuple[int, int], bytes] | None = None
    ) -> bytes:
        into = self.cache if into is None else into
        block, slot = self._at(row, index)
        base = self.position[block]
        position = index if base == NATURAL else base + slot
        seen = []
        for other in range(index):
            at = self._at(row, other)
            if at[1] < self.fill[at[0]]:
                seen.append(into[at] if at in into else self.cache[at])
        state = fingerprint(token, position, seen)
        into[(block, slot)] = state
        self.teams.lower[(block, slot)] = fingerprint(token, position, [])
        return state

    def _at(self, row: _Row, index: int) -> tuple[int, int]:
        return row.blocks[index // self.block_size], index % self.block_size


class HashTeams:
    """Rows of workers, which see each other's tokens of the same step.

    So they take two layers: the lower one knows a token and its place in its own run; the upper
    one, which the cache keeps, all lower ones that the row sees and how far its query turns.
    """

    def __init__(self, worker: HashWorker) -> None:
        self._worker = worker
        self._teams: dict[str, CacheLayout] = {}
        self._copies: dict[str, list[dict[tuple[int, int], bytes]]] = {}
        self.write = write
        self.lower: dict[tuple[int, int], bytes] = {}
        self.member: dict[str, tuple[CacheLayout, int]] = {}

    def apply(self, output: SchedulerOutput) -> None:
        """Take note of what the scheduler says of groups of workers."""
        if isinstance(output, GroupSchedulerOutput):
            for swap in output.swaps:
                self._swap(swap)
            for update in output.teams:
                self._update(update)

    def run(self, ids: list[str], output: SchedulerOutput) -> dict[str, list[int]]:
        """Compute the workers' rows of a step, layer by layer."""
        rows, new = self._worker.rows, {}
        for req_id in ids:
            row, num = rows[req_id], output.num_scheduled_tokens[req_id]
            new[req_id] = range(row.num_computed, row.num_computed + num)
            for index in new[req_id]:
                at = self._worker._at(row, index)
                self.lower[at] = fingerprint(row.tokens[index], index, [])
            row.num_computed += num
        for req_id in ids:
            for index in new[req_id]:
                at = self._worker._at(rows[req_id], index)
                self._worker.cache[at] = self._see(req_id, index, self.lower)
        sampled: dict[str, list[int]] = {}
        for req_id in ids:
            row = rows[req_id]
            sampled[req_id] = []
            if row.num_computed >= len(row.tokens):
                state = self._see(req_id, row.num_computed - 1, self._worker.cache)
                sampled[req_id] = [self.write(state)]
        for req_id, tokens in sampled.items():
            rows[req_id].tokens += tokens
        return sampled

    def _see(self, req_id: str, index: int, states: dict[tuple[int, int], bytes]) -> bytes:
        team, role = self.member[req_id]

        def live(other: int) -> Run:
            row = self._worker.rows.get(team.live[other])
            return (
                Run(row.blocks, row.num_computed, other) if row is not None else Run((), 0, other)
            )

        seen: list[bytes] = []
        *front, own = team.view(role, live)
        for part in front:
            seen.append(str(part.shift).encode())
            seen += [states[self._slot(part.run, i)] for i in range(part.run.length)]
        seen += [states[self._slot(own.run, i)] for i in range(index + 1)]
        return fingerprint(role, index, seen)

    def _slot(self, run: Run, index: int) -> tuple[int, int]:
        size = self._worker.block_size
        return run.blocks[index // size], index % size

    def _update(self, update: HogwildUpdate) -> None:
        team = self._teams.pop(update.team, None) or CacheLayout(update.layout)
        for req_id in dict(team.live).values():
            self.member.pop(req_id, None)
        if update.ended:
            return
        team.prompt, team.live = update.prompt, dict(update.live)
        team.history = (*team.history[: update.first], *update.history)
        team.headers = dict(update.headers)
        self._teams[update.team] = team
        self.member.update((req_id, (team, role)) for role, req_id in update.live)

    def _swap(self, swap: KVSwap) -> None:
        places = [(b, slot) for b in swap.blocks for slot in range(self._worker.block_size)]
        layers = (self.lower, self._worker.cache)
        if swap.out:
            self._copies[swap.team] = [
                {i: layer[at] for i, at in enumerate(places) if at in layer} for layer in layers
            ]
            return
        copies = self._copies.pop(swap.team, None)
        if copies is not None and swap.blocks:
            for layer, copy in zip(layers, copies, strict=True):
                layer.update((places[i], state) for i, state in copy.items())


@dataclass
class Client:
    """What one client asked for and has got so far."""

    request_id: str
    prompt: list[int]
    parallel: bool
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    summary: dict[str, Any] | None = None
    aborted: bool = False


class Simulation:
    """A scheduler, a hash worker, and the clients between them."""

    def __init__(
        self,
        model: Path,
        profile: str,
        grammar: IdGrammar,
        *,
        asynchronous: bool,
        num_blocks: int = 64,
        block_size: int = 16,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 64,
        max_model_len: int = 2048,
        policy: str = "fcfs",
        num_drafts: int = 0,
        options: dict[str, Any] | None = None,
    ) -> None:
        register()
        ngram = {"method": "ngram", "num_speculative_tokens": num_drafts, "prompt_lookup_max": 2}
        config = EngineArgs(
            str(model),
            dtype="float32",
            enforce_eager=True,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            block_size=block_size,
            scheduling_policy=policy,
            additional_config={"parallel_think": {"profile": profile, **(options or {})}},
            speculative_config=ngram if num_drafts else None,
        ).create_engine_config()
        config.cache_config.num_gpu_blocks = num_blocks
        config.scheduler_config.async_scheduling = asynchronous
        spec = FullAttentionSpec(
            block_size=block_size, num_kv_heads=1, head_size=1, dtype=torch.float32
        )
        scheduler_cls = AsyncGroupScheduler if asynchronous else GroupScheduler
        self.scheduler = scheduler_cls(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(
                num_blocks=num_blocks,
                kv_cache_tensors=[],
                kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
            ),
            structured_output_manager=StructuredOutputManager(config),
            block_size=block_size,
            log_stats=True,
        )
        # As with a draft model, which writes K/V of its own ahead.
        self.scheduler.num_lookahead_tokens = num_drafts
        self.worker = HashWorker(num_blocks, block_size, grammar, num_drafts)
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(block_size, sha256)
        self.pending: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self.depth = 2 if asynchronous else 1
        self.clients: dict[str, Client] = {}

    def add(
        self,
        prompt: list[int],
        *,
        parallel: bool = True,
        max_tokens: int = 80,
        priority: int = 0,
        sampling: dict[str, Any] | None = None,
        **extra: Any,
    ) -> Client:
        """Send a request, with further sampling parameters."""
        request_id = f"r{len(self.clients)}"
        args = dict(extra) if parallel else {"parallel_think": "off"}
        asked = {"max_tokens": max_tokens, "temperature": 0, **(sampling or {})}
        params = SamplingParams(extra_args=args, **asked)
        params.update_from_generation_config({}, EOS)
        client = Client(request_id, prompt, parallel)
        self.clients[request_id] = client
        self.scheduler.add_request(
            Request(
                request_id=request_id,
                prompt_token_ids=list(prompt),
                sampling_params=params,
                pooling_params=None,
                arrival_time=float(len(self.clients)),
                priority=priority,
                block_hasher=self.hasher,
            )
        )
        return client

    def step(self) -> bool:
        """Run one engine step; return whether anything is left to do."""
        if self.scheduler.has_requests():
            # As it reaches a worker process; sampling parameters are checked on the way.
            output = pickle.loads(pickle.dumps(self.scheduler.schedule()))
            self.pending.append((output, self.worker.execute(output)))
        if self.pending and (
            len(self.pending) >= self.depth or not self.scheduler.has_unfinished_requests()
        ):
            self._deliver(*self.pending.popleft())
        self.check()
        return bool(self.pending) or self.scheduler.has_requests()

    def run(self, limit: int = 3000) -> None:
        """Run until every client has its answer."""
        for _ in range(limit):
            if not self.step():
                break
        else:
            raise AssertionError("the engine did not come to an end")
        pool = self.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        assert not self.scheduler.groups
        assert not self.scheduler.requests

    def abort(self, client: Client) -> None:
        """Disconnect a client."""
        client.aborted = True
        self.scheduler.finish_requests(client.request_id, RequestStatus.FINISHED_ABORTED)

    def preempt(self, index: int) -> None:
        """Preempt a running request, as vLLM does when blocks run out."""
        running = self.scheduler.running
        if running:
            self.scheduler.queues.preempt(running[index % len(running)])

    def reset(self) -> None:
        """Drop all K/V, as vLLM does when weights are updated."""
        self.scheduler.reset_prefix_cache(reset_running_requests=True)

    def check(self) -> None:
        """INV-3 and INV-4: every reference on a block has an owner, and limits hold."""
        self.scheduler.check_integrity()
        most_paths = self.scheduler.settings.options.max_paths
        for state in self.scheduler.groups:
            live = [n for n in state.group.nodes if n.state in (State.LIVE, State.CLOSING)]
            assert len(live) <= most_paths**2
            assert all(node.depth <= 2 for node in live)

    def _deliver(self, output: SchedulerOutput, result: ModelRunnerOutput) -> None:
        delivered = self.scheduler.update_from_output(output, result)
        if self.worker.num_drafts and self.depth == 1:
            rows = {req_id: row for req_id, row in self.worker.rows.items() if row.drafts}
            drafts = DraftTokenIds(list(rows), [list(row.drafts) for row in rows.values()])
            self.scheduler.update_draft_token_ids(drafts)
        for engine_outputs in delivered.values():
            for out in engine_outputs.outputs:
                client = self.clients[out.request_id]
                assert client.finish is None, "output behind the last one"
                if client.aborted:
                    continue
                assert out.new_token_ids or out.finished
                client.tokens += out.new_token_ids
                client.finish = str(out.finish_reason) if out.finished else None
                params = out.kv_transfer_params or {}
                client.summary = params.get("parallel_think", client.summary)
                if out.finished and isinstance(out.stop_reason, str):
                    client.finish = out.stop_reason
