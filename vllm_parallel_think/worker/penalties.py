"""Presence and frequency penalties over the whole answer so far, in both model runners.

A branch's request has everything in front of it as its prompt, which these two penalties leave out.
What the answer already says is counted here: the adapters add it where a runner counts a request's
own output. Repetition penalties look at prompts anyway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.utils.torch_utils import async_tensor_h2d

Written = Mapping[str, Sequence[int]]
"""Token ids of the answer in front of a branch, by the branch's request id."""


def count_written(runner: Any, written: Written) -> None:
    """Let a model runner's sampler count what was written in front of its requests.

    Args:
        runner: vLLM's model runner, V1 or V2.
        written: Looked up at every step; the caller keeps it up to date.

    """
    sampler = getattr(runner, "sampler", None)
    if sampler is None:  # only the last stage of a pipeline samples
        return
    state = getattr(sampler, "penalties_state", None)
    if state is not None:
        state.apply_staged_writes = _counting(state, runner.req_states, written)
        return
    sampler.apply_penalties = _prepending(sampler.apply_penalties, runner, written)
    verifier = getattr(runner, "rejection_sampler", None)
    if verifier is not None:
        verifier.apply_penalties = _prepending_to_drafts(verifier.apply_penalties, runner, written)


def _prepending(stock: Any, runner: Any, written: Written) -> Any:
    """Model Runner V1 counts lists of output tokens, row by row."""

    def apply_penalties(logits: torch.Tensor, metadata: Any, outputs: list[list[int]]) -> Any:
        if written and not metadata.no_penalties:
            rows = zip(runner.input_batch.req_ids, outputs, strict=False)
            outputs = [[*written.get(req_id, ()), *own] for req_id, own in rows]
        return stock(logits, metadata, outputs)

    return apply_penalties


def _prepending_to_drafts(stock: Any, runner: Any, written: Written) -> Any:
    """The same where drafts are verified, with a row for each draft token."""

    def apply_penalties(
        logits: torch.Tensor, metadata: Any, drafts: Any, repeat: Any, outputs: list[list[int]]
    ) -> Any:
        if written and not metadata.no_penalties:
            pairs = zip(runner.input_batch.req_ids, drafts.num_draft_tokens, strict=False)
            rows = [req_id for req_id, num_drafts in pairs for _ in range(num_drafts)]
            outputs = [
                [*written.get(req_id, ()), *own] for req_id, own in zip(rows, outputs, strict=False)
            ]
        return stock(logits, metadata, drafts, repeat, outputs)

    return apply_penalties


def _counting(state: Any, requests: Any, written: Written) -> Any:
    """Model Runner V2 keeps counts on the device, made when a request enters the batch."""
    stock = state.apply_staged_writes

    def apply_staged_writes() -> None:
        entering = list(state._new_penalties_reqs) if written else ()
        stock()
        for index in entering:
            tokens = written.get(requests.index_to_req_id[index])
            if tokens:
                ids = async_tensor_h2d(list(tokens), dtype=torch.int64, device=state.device)
                ones = torch.ones_like(ids, dtype=state.output_bin_counts.dtype)
                state.output_bin_counts[index].index_add_(0, ids, ones)

    return apply_staged_writes
