"""Which rows of a batch need their holes masked."""

from __future__ import annotations

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from attention_kernels import SegmentPlan

from ..tables import BlockTables


def rows_with_holes(
    metadata: CommonAttentionMetadata, headers: BlockTables
) -> tuple[SegmentPlan, torch.Tensor]:
    """Plan the rows whose block table has a partly filled block in front of their own last one.

    Tensor operations only: nothing waits for the device.

    Returns:
        The plan, and [R] int32 sequence lengths for the stock kernel: rows of the plan are cut to
        their query, as their result is computed again.

    """
    num_reqs = metadata.num_reqs
    block_size = headers.block_size
    table = metadata.block_table_tensor[:num_reqs]
    seq_lens = metadata.seq_lens[:num_reqs]
    starts = metadata.query_start_loc[: num_reqs + 1]
    begin = torch.arange(table.shape[1], device=table.device, dtype=torch.int32) * block_size
    # A row's own last block is being filled: only whole blocks in front of it can hold a hole.
    inside = (begin + block_size)[None, :] <= seq_lens[:, None]
    blocks = torch.where(inside, table, 0).long()
    holes = (inside & (headers.fill[blocks] < block_size)).any(dim=1)
    plan = SegmentPlan.from_block_table(
        table, seq_lens, starts, headers.fill, block_size=block_size, row_mask=holes
    )
    query_lens = (starts[1:] - starts[:-1]).to(seq_lens.dtype)
    cut = metadata.seq_lens.clone()
    cut[:num_reqs] = torch.where(holes, query_lens, seq_lens)
    return plan, cut
