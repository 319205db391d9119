"""vLLM requests for the nodes of a group."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from ..core.branch_graph import Kind, Node, State
from ..core.config.request_options import GROUP_KEY, JUDGE_KEYS
from ..core.errors import OptionError

_COMPUTED = {"max_tokens": 1, "min_tokens": 0, "logprobs": None, "logprob_token_ids": None}
"""What replaces the client's parameters where a branch is run for its K/V only."""


def branch_seed(seed: int, address: str) -> int:
    """Derive a branch's seed: the same for the same place in the tree, another elsewhere."""
    digest = hashlib.blake2b(f"{seed}:{address}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def branch_params(root: Request, node: Node, temperature: float | None = None) -> SamplingParams:
    """Return the client's sampling parameters, as one branch needs them.

    The result is as valid as what a client may send: vLLM checks the set again wherever it is
    unpacked, and a worker process that finds it wrong ends.

    Args:
        root: The client's request.
        node: What the branch computes.
        temperature: Replaces the client's sampling temperature.

    Raises:
        OptionError: vLLM does not accept the set; says why.

    """
    assert root.sampling_params is not None
    client = root.sampling_params
    changes = _COMPUTED if _samples_nothing(node) else _sampled(client, node, temperature)
    extra = client.extra_args or {}
    kept = {key: extra[key] for key in JUDGE_KEYS if key in extra}
    try:
        return msgspec.structs.replace(
            client,
            n=1,
            extra_args={**kept, GROUP_KEY: root.request_id},
            structured_outputs=None,
            prompt_logprobs=None,
            prompt_logprob_token_ids=None,
            prompt_logprob_start=None,
            repetition_detection=None,
            trace_decode_token_ids=None,
            routed_experts_prompt_start=0,
            skip_reading_prefix_cache=True,
            **changes,
        )
    except (ValueError, VLLMValidationError) as error:
        raise OptionError(f"a branch cannot be sampled as asked: {error}") from error


def _samples_nothing(node: Node) -> bool:
    """Whether a branch is run for its K/V only."""
    return node.state is State.DONE or node.kind is Kind.CLOSE


def _sampled(client: SamplingParams, node: Node, temperature: float | None) -> dict[str, Any]:
    # One more than the group's own limit, so that the group ends the branch, and one more for the
    # step that computes a tag's K/V.
    most = node.limit if node.most is None else node.most
    max_tokens = (most or 0) + 2
    changes: dict[str, Any] = {"max_tokens": max_tokens}
    # A budget ends an answer even below the client's least length, as max_tokens does.
    changes["min_tokens"] = min(node.least, max_tokens)
    if node.kind is Kind.OUTLINE:
        changes["logprobs"] = None
    if temperature is not None:
        changes["temperature"] = temperature
    if client.seed is not None:
        changes["seed"] = branch_seed(client.seed, node.address)
    return changes


def branch_request(
    root: Request,
    node: Node,
    request_id: str,
    prefix: list[int],
    temperature: float | None = None,
) -> Request:
    """Return a request that computes a node after its padded prefix.

    Args:
        root: The client's request.
        node: A new node, or a finished one whose K/V was lost.
        request_id: A fresh id.
        prefix: Token ids of the prefix, padded to whole blocks.
        temperature: Replaces the client's sampling temperature.

    """
    return Request(
        request_id=request_id,
        prompt_token_ids=[*prefix, *node.tokens],
        sampling_params=branch_params(root, node, temperature),
        pooling_params=None,
        client_index=root.client_index,
        arrival_time=root.arrival_time,
        lora_request=root.lora_request,
        cache_salt=root.cache_salt,
        priority=root.priority,
        trace_headers=root.trace_headers,
        block_hasher=None,
    )
