"""Which rows of a batch are computed by our kernel."""

from __future__ import annotations

from dataclasses import replace

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from attention_kernels import SegmentPlan, rows_that_share

from .block_headers import BlockHeaderTensors
from .hogwild_rows import HogwildRows

SHARED_KEYS = 1024
"""Keys that rows without holes must share to be taken from the stock kernel.

Time of vLLM's CPU kernel over ours for 2, 4, 8 rows that share so many keys: 256: 0.59, 0.80, 0.95;
512: 0.85, 1.01, 1.11; 1024: 1.15, 1.18, 1.30 (SmolLM2's heads, one core, `tests.bench.attention`),
and a plan takes about a millisecond a step. Not measured on a GPU.
"""


def plan_rows(
    metadata: CommonAttentionMetadata, header_tensors: BlockHeaderTensors
) -> tuple[SegmentPlan | None, HogwildRows | None, torch.Tensor]:
    """Plan the rows that vLLM's kernel does not compute; nothing waits for the device.

    Args:
        metadata: vLLM's, of the whole batch.
        header_tensors: Fill and position of all blocks, and the groups of workers.

    Returns:
        The plan of rows with holes and of those that begin alike (none where the batch has no
        branch with a prefix), the workers' rows, and [R] int32 sequence lengths for the stock
        kernel: rows of the plans are cut to their query, as their result is computed again.

    """
    seq_lens = metadata.seq_lens.clone()
    hogwild = header_tensors.hogwild.rows(metadata) if header_tensors.hogwild is not None else None
    plan = _plan_holes(metadata, header_tensors) if header_tensors.has_holes else None
    starts = metadata.query_start_loc[: metadata.num_reqs + 1]
    query_lens = (starts[1:] - starts[:-1]).to(seq_lens.dtype)
    if hogwild is not None:
        rows = torch.tensor(hogwild.rows).to(seq_lens.device, non_blocking=True)
        seq_lens[rows] = query_lens[rows]
        if plan is not None and plan.row_mask is not None:
            plan = replace(plan, row_mask=plan.row_mask.index_fill(0, rows, False))
    if plan is not None:
        assert plan.row_mask is not None
        own = seq_lens[: metadata.num_reqs]
        own.copy_(torch.where(plan.row_mask, query_lens, own))
    return plan, hogwild, seq_lens


def _plan_holes(
    metadata: CommonAttentionMetadata, header_tensors: BlockHeaderTensors
) -> SegmentPlan:
    """Plan the rows that have holes, and those that begin like other rows.

    A hole is a partly filled block before a row's own last one. Tensor operations only. Rows
    of the plan whose block tables begin alike read those blocks together, where that pays.
    """
    num_reqs = metadata.num_reqs
    block_size = header_tensors.block_size
    # A block table is as wide as the longest context that vLLM allows.
    num_columns = -(-metadata.max_seq_len // block_size)
    table = metadata.block_table_tensor[:num_reqs, :num_columns]
    seq_lens = metadata.seq_lens[:num_reqs]
    begin = torch.arange(table.shape[1], device=table.device, dtype=torch.int32) * block_size
    # A row's own last block is being filled: only whole blocks before it can hold a hole.
    inside = (begin + block_size)[None, :] <= seq_lens[:, None]
    blocks = torch.where(inside, table, 0).long()
    holes = (inside & (header_tensors.fill[blocks] < block_size)).any(dim=1)
    plan = SegmentPlan.from_block_table(
        table,
        seq_lens,
        metadata.query_start_loc[: num_reqs + 1],
        header_tensors.fill,
        block_size=block_size,
        max_query_len=metadata.max_query_len,
    )
    return replace(plan, row_mask=holes | rows_that_share(plan, keys=SHARED_KEYS))
