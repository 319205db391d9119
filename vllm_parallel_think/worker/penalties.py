"""Presence and frequency penalties over the whole answer so far, in both model runners.

A branch's request has everything before it as its prompt, which these two penalties leave out. What
the answer already says is added here, where a runner counts a request's own output. Repetition
penalties look at prompts anyway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.utils.torch_utils import async_tensor_h2d

from ..compat.patching import Make

Written = Mapping[str, Sequence[int]]
"""Token ids of the answer before a branch, by the branch's request id."""


def prepending(runner: Any, written: Written) -> Make:
    """Model Runner V1 counts lists of output tokens, row by row."""

    def make(stock: Any) -> Any:
        def apply_penalties(
            logits: torch.Tensor, metadata: Any, outputs: list[list[int]]
        ) -> torch.Tensor:
            if written and not metadata.no_penalties:
                rows = zip(runner.input_batch.req_ids, outputs, strict=False)
                outputs = [[*written.get(req_id, ()), *own] for req_id, own in rows]
            result: torch.Tensor = stock(logits, metadata, outputs)
            return result

        return apply_penalties

    return make


def prepending_to_drafts(runner: Any, written: Written) -> Make:
    """The same where drafts are verified, with a row for each draft token."""

    def make(stock: Any) -> Any:
        def apply_penalties(
            logits: torch.Tensor, metadata: Any, drafts: Any, repeat: Any, outputs: list[list[int]]
        ) -> torch.Tensor:
            if written and not metadata.no_penalties:
                pairs = zip(runner.input_batch.req_ids, drafts.num_draft_tokens, strict=False)
                rows = [req_id for req_id, num_drafts in pairs for _ in range(num_drafts)]
                own_rows = zip(rows, outputs, strict=False)
                outputs = [[*written.get(req_id, ()), *own] for req_id, own in own_rows]
            result: torch.Tensor = stock(logits, metadata, drafts, repeat, outputs)
            return result

        return apply_penalties

    return make


def counting(state: Any, requests: Any, written: Written) -> Make:
    """Model Runner V2 keeps counts on the device, made when a request enters the batch."""

    def make(stock: Any) -> Any:
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

    return make
