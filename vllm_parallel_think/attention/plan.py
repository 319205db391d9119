"""Which rows of a batch are computed by our kernel."""

from __future__ import annotations

from dataclasses import replace

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from attention_kernels import SegmentPlan, rows_that_share

from ..tables import BlockTables
from ..teams import TeamRows

SHARED_KEYS = 1024
"""Keys that rows without holes must share to be taken from the stock kernel.

Time of vLLM's CPU kernel over ours for 2, 4, 8 rows that share so many keys: 256: 0.59, 0.80, 0.95;
512: 0.85, 1.01, 1.11; 1024: 1.15, 1.18, 1.30 (SmolLM2's heads, one core, `tests.bench.attention`),
and a plan takes about a millisecond a step. Not measured on a GPU.
"""


def plan_rows(
    metadata: CommonAttentionMetadata, headers: BlockTables
) -> tuple[SegmentPlan, torch.Tensor]:
    """Plan the rows that have holes, and those that begin like other rows.

    A hole is a partly filled block in front of a row's own last one. Tensor operations only:
    nothing waits for the device. Rows of the plan whose block tables begin alike read those blocks
    together, where that pays.

    Args:
        metadata: vLLM's, of the whole batch.
        headers: Fill and position of all blocks.

    Returns:
        The plan, and [R] int32 sequence lengths for the stock kernel: rows of the plan are cut to
        their query, as their result is computed again.

    """
    num_reqs = metadata.num_reqs
    block_size = headers.block_size
    # A block table is as wide as the longest context that vLLM allows.
    num_columns = -(-metadata.max_seq_len // block_size)
    table = metadata.block_table_tensor[:num_reqs, :num_columns]
    seq_lens = metadata.seq_lens[:num_reqs]
    starts = metadata.query_start_loc[: num_reqs + 1]
    begin = torch.arange(table.shape[1], device=table.device, dtype=torch.int32) * block_size
    # A row's own last block is being filled: only whole blocks in front of it can hold a hole.
    inside = (begin + block_size)[None, :] <= seq_lens[:, None]
    blocks = torch.where(inside, table, 0).long()
    holes = (inside & (headers.fill[blocks] < block_size)).any(dim=1)
    plan = SegmentPlan.from_block_table(
        table,
        seq_lens,
        starts,
        headers.fill,
        block_size=block_size,
        max_query_len=metadata.max_query_len,
    )
    planned = holes | rows_that_share(plan, keys=SHARED_KEYS)
    plan = replace(plan, row_mask=planned)
    query_lens = (starts[1:] - starts[:-1]).to(seq_lens.dtype)
    cut = metadata.seq_lens.clone()
    cut[:num_reqs] = torch.where(planned, query_lens, seq_lens)
    return plan, cut


def leave_to_teams(
    plan: SegmentPlan, seq_lens: torch.Tensor, team: TeamRows
) -> tuple[SegmentPlan, torch.Tensor]:
    """Leave workers' rows, which have a plan of their own, to that; nothing waits for the device.

    Returns:
        The plan without them, and the lengths for the stock kernel with theirs cut to their query.

    """
    rows = torch.tensor(team.rows).to(seq_lens.device, non_blocking=True)
    assert plan.row_mask is not None
    seq_lens[rows] = plan.query_len[rows].to(seq_lens.dtype)
    mask = plan.row_mask.clone()
    mask[rows] = False
    return replace(plan, row_mask=mask), seq_lens
