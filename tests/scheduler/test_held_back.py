"""Outputs of a path that is not on turn wait as one, not by the thousand."""

from __future__ import annotations

import time

from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput, FinishReason

from vllm_parallel_think.core.branch_graph import Kind, Lane, Node
from vllm_parallel_think.scheduler import client_output


def path() -> Node:
    lane = Lane(depth=1, room=1, forks_left=0)
    return Node(0, Kind.PATH, lane, (), 0, [], 0, 0, 0, None, None)


def output(*tokens: int, **fields: object) -> EngineCoreOutput:
    return EngineCoreOutput("r#0", list(tokens), **fields)  # type: ignore[arg-type]


def test_tokens_of_many_steps_are_one_output_in_order():
    node = path()
    first = output(1, events=[EngineCoreEvent(EngineCoreEventType.SCHEDULED, 0.0)])
    client_output.hold_back(node, first, branched=True)
    for token in range(2, 1000):
        client_output.hold_back(node, output(token, token), branched=True)
    assert [chunk.num_tokens for chunk in node.outbox] == [1, 2 * 998]
    tokens = [token for chunk in node.outbox for token in chunk.payload.new_token_ids]
    assert tokens == [1] + [token for token in range(2, 1000) for _ in range(2)]


def test_log_probabilities_and_the_client_s_own_request_stay_step_by_step():
    node = path()
    for token in range(3):
        probabilities = client_output.forced_logprobs((token,))
        client_output.hold_back(node, output(token, new_logprobs=probabilities), branched=True)
    assert len(node.outbox) == 3
    plain = path()
    for token in range(3):
        client_output.hold_back(plain, output(token), branched=False)
    assert len(plain.outbox) == 3


def test_an_output_that_ends_a_branch_joins_the_others():
    node = path()
    client_output.hold_back(node, output(1), branched=True)
    client_output.hold_back(node, output(2, finish_reason=FinishReason.STOP), branched=True)
    (chunk,) = node.outbox
    assert (chunk.num_tokens, chunk.payload.new_token_ids) == (2, [1, 2])


def test_time_of_a_step_does_not_grow_with_what_waits():
    def seconds(num_steps: int) -> float:
        node = path()
        start = time.process_time()
        for token in range(num_steps):
            client_output.hold_back(node, output(token), branched=True)
        return time.process_time() - start

    quarter = min(seconds(60_000) for _ in range(2))
    assert seconds(240_000) < 4 * 2.5 * quarter
