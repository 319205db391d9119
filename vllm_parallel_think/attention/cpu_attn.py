"""vLLM's CPU attention, with holes masked for rows that belong to a group."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata, MultipleOf
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from attention_kernels import Rotary, SegmentPlan, segmented_attention

from ..validation import refuse_attention
from . import step_state
from .hogwild_rows import HogwildRows
from .row_plan import plan_rows
from .thought_embeddings import with_thoughts


@dataclass
class GroupCPUMetadata(CPUAttentionMetadata):
    """vLLM's metadata, with a plan for the rows whose block table has holes.

    Attributes:
        plan: The rows that our kernel computes.
        hogwild: The rows of workers that see each other, computed by it as well.
        is_whole: Whether these are all rows of the batch: the stock kernel is not called at all.

    """

    plan: SegmentPlan | None = None
    hogwild: HogwildRows | None = None
    is_whole: bool = False


class GroupCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    """Plans a step once for all layers."""

    isa: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.isa == "amx":
            # AMX packs keys in tiles that only its own kernel can read.
            self.isa = "vec"
            self._set_isa_to_layers(self.layer_names)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CPUAttentionMetadata:
        header_tensors = step_state.current()
        if header_tensors is None or not header_tensors.has_branches:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        plan, hogwild, seq_lens = plan_rows(common_attn_metadata, header_tensors)
        planned = 0 if plan is None or plan.row_mask is None else int(plan.row_mask.sum())
        num_hogwild = 0 if hogwild is None else len(hogwild.rows)
        if not planned + num_hogwild:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        # The stock kernel computes all rows; those of the plan cost it next to nothing this way.
        metadata = super().build(
            common_prefix_len, replace(common_attn_metadata, seq_lens=seq_lens), fast_build
        )
        values = {
            name: getattr(metadata, name) for name in CPUAttentionMetadata.__dataclass_fields__
        }
        return GroupCPUMetadata(
            **values,
            plan=plan if planned else None,
            hogwild=hogwild,
            is_whole=planned + num_hogwild == common_attn_metadata.num_reqs,
        )


class GroupCPUImpl(CPUAttentionBackendImpl):
    """Stock attention, then the rows of the plan."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_attention(self)

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        key, value = with_thoughts(layer, key, value)
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not getattr(attn_metadata, "is_whole", False):
            super().forward(
                layer,
                query,
                key,
                value,
                kv_cache,
                attn_metadata,
                output,
                output_scale,
                output_block_scale,
            )
        if isinstance(attn_metadata, GroupCPUMetadata):
            if attn_metadata.plan is not None:
                self._attend(query, kv_cache, attn_metadata, attn_metadata.plan, output)
            if (hogwild := attn_metadata.hogwild) is not None:
                self._attend(query, kv_cache, attn_metadata, hogwild.plan, output, hogwild.rotary)
        return output

    def _attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: GroupCPUMetadata,
        plan: SegmentPlan,
        output: torch.Tensor,
        rotary: Rotary | None = None,
    ) -> None:
        num_tokens = metadata.num_actual_tokens
        keys, values = logical_cache(kv_cache, self.head_size)
        segmented_attention(
            query[:num_tokens],
            keys,
            values,
            plan,
            scale=self.scale,
            rotary=rotary,
            out=output.view(-1, self.num_heads, self.head_size)[:num_tokens],
            provider="cpu",
            return_lse=False,
        )


class GroupCPUBackend(CPUAttentionBackend):
    """Registered in place of ``CPU_ATTN``."""

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return GroupCPUImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return GroupCPUMetadataBuilder


def logical_cache(kv_cache: torch.Tensor, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values as [num_blocks, block_size, Hkv, D] views of vLLM's CPU cache.

    Args:
        kv_cache: [num_blocks, Hkv, block_size, 2 * D]. For every block and head it holds the keys
            transposed, [D, block_size], then the values, [block_size, D].
        head_size: D.

    """
    num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
    per_block, per_head = kv_cache.stride(0), kv_cache.stride(1)
    shape = (num_blocks, block_size, num_kv_heads, head_size)
    start = kv_cache.storage_offset()
    keys = kv_cache.as_strided(shape, (per_block, 1, per_head, block_size), start)
    values = kv_cache.as_strided(
        shape, (per_block, head_size, per_head, 1), start + block_size * head_size
    )
    return keys, values
