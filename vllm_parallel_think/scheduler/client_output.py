"""Engine outputs of branches, as outputs of the request that the client sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput, FinishReason
from vllm.v1.outputs import LogprobsLists
from vllm.v1.request import Request

from ..core.branch_graph import Node
from ..core.config.request_options import LIVE_KEY
from ..core.config.server_options import CONFIG_KEY
from ..core.interface import Chunk, Emission, Finish
from .group_table import GroupState

_REASONS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}


def forced_logprobs(
    tokens: tuple[int, ...], num_logprobs: int = 0, named: Sequence[int] | None = None
) -> LogprobsLists:
    """Return log-probabilities of forced tokens, as many a token as of sampled ones.

    A forced token is certain: its log-probability is 0, and that of every other token is minus
    infinity, as vLLM reports a token beside which all others are masked away. Which others fill
    the list says nothing then: they are those that the client named, or the lowest ids.

    Args:
        tokens: Forced tokens.
        num_logprobs: Entries that the client asked for, beside the token's own.
        named: Ids whose log-probabilities it asked for instead of the most likely ones.

    """
    own = np.asarray(tokens, dtype=np.int32)[:, None]
    if named is not None:
        beside = np.tile(np.asarray(named, dtype=np.int32), (len(tokens), 1))
    else:
        others = np.arange(max(num_logprobs - 1, 0), dtype=np.int32)[None]
        beside = np.concatenate((own, others + (others >= own)), axis=1)[:, :num_logprobs]
    ids = np.concatenate((own, beside), axis=1)
    logprobs = np.where(ids == own, 0.0, -np.inf).astype(np.float32)
    return LogprobsLists(ids, logprobs, np.ones(len(tokens), dtype=np.int32))


def to_output(
    root: Request,
    emission: Emission,
    summary: dict[str, Any] | None,
    vocab_size: int,
) -> EngineCoreOutput:
    """Turn what a group releases into an output under the client's request id."""
    if emission.payload is None:
        output = EngineCoreOutput(
            root.request_id, list(emission.forced), trace_headers=root.trace_headers
        )
        params = root.sampling_params
        assert params is not None
        if emission.forced and (num_logprobs := params.num_logprobs) is not None:
            if num_logprobs == -1:
                num_logprobs = vocab_size
            output.new_logprobs = forced_logprobs(
                emission.forced, num_logprobs, params.logprob_token_ids
            )
    else:
        output = _readdressed(root, emission)
    if summary is not None:
        attach(output, CONFIG_KEY, summary)
    if emission.finish is not None:
        _finish(output, emission.finish)
    return output


def attach(output: EngineCoreOutput, key: str, value: Any) -> None:
    """Add a field that reaches the client beside the tokens."""
    output.kv_transfer_params = {**(output.kv_transfer_params or {}), key: value}


def introduce(output: EngineCoreOutput, first: EngineCoreOutput) -> None:
    """Put what vLLM reports once, with a request's first output, on the first one that goes out."""
    output.prefill_stats = first.prefill_stats
    output.events = [*(first.events or []), *(output.events or [])] or None


def merge(last: EngineCoreOutput, output: EngineCoreOutput) -> bool:
    """Add an output's tokens to the one before it, if nothing but tokens would be lost."""
    parts = (last, output)
    if (
        not output.new_token_ids
        or last.finished
        or any(p.new_logprobs is not None or p.events is not None for p in parts)
    ):
        return False
    if any(p.prefill_stats is not None or p.num_nans_in_logits for p in parts):
        return False
    # Every list of tokens here was made for its output: a sum would copy all of them again.
    last.new_token_ids.extend(output.new_token_ids)
    last.finish_reason, last.stop_reason = output.finish_reason, output.stop_reason
    last.kv_transfer_params = output.kv_transfer_params or last.kv_transfer_params
    return True


def hold_back(node: Node, output: EngineCoreOutput, branched: bool) -> None:
    """Keep a branch's output until its turn; what waits already grows, if nothing is lost by it.

    Its turn comes in one step, which must not have thousands of outputs to go through.
    """
    num_tokens = len(output.new_token_ids)
    if branched and node.outbox and merge(node.outbox[-1].payload, output):
        num_tokens += node.outbox[-1].num_tokens
        output = node.outbox.pop().payload
    node.outbox.append(Chunk(num_tokens, output))


def released(state: GroupState, vocab_size: int) -> list[EngineCoreOutput]:
    """Return what a client may see now, after what it has got already."""
    group = state.group
    outputs: list[EngineCoreOutput] = []
    summary = live = None
    # The front end looks for stop strings: any output may turn out to be the last one.
    may_end = bool(state.root.sampling_params and state.root.sampling_params.stop)
    for emission in group.release():
        final = emission.finish is not None
        if summary is None and (group.branched or final or may_end):
            summary, live = group.summary().as_dict(), group.live_view()
        show = summary if group.branched or final or may_end else None
        output = _visible(state, emission, show, vocab_size)
        # A path that was held back is released by the thousand tokens.
        if not (outputs and merge(outputs[-1], output)):
            outputs.append(output)
    if outputs and state.first_output is not None:
        introduce(outputs[0], state.first_output)
        state.first_output = None
    if live is not None and outputs and not group.finished:
        attach(outputs[-1], LIVE_KEY, live)
    return outputs


def _visible(
    state: GroupState, emission: Emission, summary: dict[str, Any] | None, vocab_size: int
) -> EngineCoreOutput:
    """Return one output for the client; before a group forks it is vLLM's own, as it is."""
    group = state.group
    if not group.branched and emission.payload is not None:
        output: EngineCoreOutput = emission.payload
        if summary is not None:
            attach(output, CONFIG_KEY, summary)
        return output
    output = to_output(state.root, emission, summary, vocab_size)
    if emission.payload is None and group.trunk.outbox:
        _move_prefill_stats(group.trunk, output)
    return output


def _move_prefill_stats(trunk: Node, opening: EngineCoreOutput) -> None:
    """Put what vLLM reports once, with a request's first output, on the opening before it."""
    first = trunk.outbox[0].payload
    opening.prefill_stats, first.prefill_stats = first.prefill_stats, None
    opening.events, first.events = first.events, None


def failed(root: Request, message: str, summary: dict[str, Any] | None) -> EngineCoreOutput:
    """Return the last output of a request that could not go on; text sent before stays valid.

    The text travels as the stop reason, the only field that reaches a client with its words.
    """
    params = {CONFIG_KEY: summary} if summary is not None else None
    return EngineCoreOutput(
        root.request_id,
        [],
        finish_reason=FinishReason.ABORT,
        stop_reason=f"parallel_think: {message}",
        kv_transfer_params=params,
        trace_headers=root.trace_headers,
    )


def _readdressed(root: Request, emission: Emission) -> EngineCoreOutput:
    output: EngineCoreOutput = emission.payload
    if output.request_id != root.request_id:
        output.events = _later_events(output.events or []) or None
        output.prefill_stats = None
        output.request_id = root.request_id
    if emission.keep < len(output.new_token_ids):
        output.new_token_ids = output.new_token_ids[: emission.keep]
        if output.new_logprobs is not None:
            output.new_logprobs = output.new_logprobs.slice_request(0, emission.keep)
    output.finish_reason = None
    output.stop_reason = None
    return output


def _later_events(events: list[EngineCoreEvent]) -> list[EngineCoreEvent]:
    """Return a branch's events but for its start: the client's request was queued only once."""
    types = [event.type for event in events]
    if EngineCoreEventType.QUEUED not in types:
        return events
    if EngineCoreEventType.SCHEDULED not in types:
        return []
    return events[types.index(EngineCoreEventType.SCHEDULED) + 1 :]


def _finish(output: EngineCoreOutput, finish: Finish) -> None:
    output.finish_reason = _REASONS[finish.reason]
    output.stop_reason = finish.stop_reason
