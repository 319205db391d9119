"""vLLM requests for the nodes of a group."""

from __future__ import annotations

import copy
import hashlib

from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from .core.graph import Kind, Node, State
from .core.options import GROUP_KEY, JUDGE_KEYS

GREEDY = 1e-5
"""vLLM samples greedily below this temperature."""


def branch_seed(seed: int, address: str) -> int:
    """Derive a branch's seed: the same for the same place in the tree, another elsewhere."""
    digest = hashlib.blake2b(f"{seed}:{address}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def branch_params(
    root: Request, node: Node, num_visible_before: int, temperature: float | None = None
) -> SamplingParams:
    """Return the client's sampling parameters, as one branch needs them."""
    assert root.sampling_params is not None
    params = copy.copy(root.sampling_params)
    params.n = 1
    extra = params.extra_args or {}
    kept = {key: extra[key] for key in JUDGE_KEYS if key in extra}
    params.extra_args = {**kept, GROUP_KEY: root.request_id}
    params.structured_outputs = None
    params.prompt_logprobs = None
    params.repetition_detection = None
    params.skip_reading_prefix_cache = True
    params.min_tokens = 0
    if node.state is State.DONE or node.kind is Kind.CLOSE:
        params.max_tokens = 1
        params.logprobs = None
        return params
    # One more than the group's own limit, so that the group ends the branch, and one more for the
    # step that computes a tag's K/V.
    params.max_tokens = (node.limit or 0) + 2
    if node.kind is Kind.CONCLUSION and node.depth == 0:
        params.min_tokens = max(0, root.sampling_params.min_tokens - num_visible_before)
    if temperature is not None:
        params.temperature = temperature
        if temperature < GREEDY:  # as vLLM does when a request comes in
            params.top_p, params.top_k, params.min_p = 1.0, 0, 0.0
    if params.seed is not None:
        params.seed = branch_seed(params.seed, node.address)
    return params


def branch_request(
    root: Request,
    node: Node,
    request_id: str,
    prefix: list[int],
    num_visible_before: int,
    temperature: float | None = None,
) -> Request:
    """Return a request that computes a node behind its padded prefix.

    Args:
        root: The client's request.
        node: A new node, or a finished one whose K/V was lost.
        request_id: A fresh id.
        prefix: Token ids of the prefix, padded to whole blocks.
        num_visible_before: Visible tokens in front of the node.
        temperature: Replaces the client's sampling temperature.

    """
    return Request(
        request_id=request_id,
        prompt_token_ids=[*prefix, *node.tokens],
        sampling_params=branch_params(root, node, num_visible_before, temperature),
        pooling_params=None,
        client_index=root.client_index,
        arrival_time=root.arrival_time,
        lora_request=root.lora_request,
        cache_salt=root.cache_salt,
        priority=root.priority,
        trace_headers=root.trace_headers,
        block_hasher=None,
    )
