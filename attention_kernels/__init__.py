"""Segmented paged attention: rows of a batch attend to ordered runs of KV blocks.

Independent of any serving engine. Providers: ``torch`` (reference), ``cpu`` (Numba), ``triton``,
and optionally ``xformers`` (a second opinion).
"""

from attention_kernels.api import segmented_attention
from attention_kernels.packed_rows import PackedRow, pack_rows
from attention_kernels.plan import Row, Segment, SegmentPlan
from attention_kernels.prefix_sharing import rows_that_share
from attention_kernels.rotary import Rotary

__all__ = [
    "PackedRow",
    "Rotary",
    "Row",
    "Segment",
    "SegmentPlan",
    "pack_rows",
    "rows_that_share",
    "segmented_attention",
]
