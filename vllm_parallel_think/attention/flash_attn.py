"""vLLM's FlashAttention, with holes masked for rows that belong to a group."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import KVCacheSpec, is_quantized_kv_cache

from attention_kernels import Rotary, SegmentPlan, segmented_attention

from ..validation import refuse_attention, refuse_layers
from . import step_state
from .hogwild_rows import HogwildRows
from .row_plan import plan_rows
from .thought_embeddings import with_thoughts

PROVIDER = "triton"


@dataclass
class GroupFlashMetadata(FlashAttentionMetadata):
    """vLLM's metadata, with plans for the rows that our kernel computes.

    Attributes:
        plan: The rows whose block table has holes, and those that begin alike.
        hogwild: The rows of workers that see each other.

    """

    plan: SegmentPlan | None = None
    hogwild: HogwildRows | None = None


_STOCK_FIELDS = tuple(field.name for field in fields(FlashAttentionMetadata))


class GroupFlashMetadataBuilder(FlashAttentionMetadataBuilder):
    """Plans a step once for all layers."""

    # A plan holds the block ids it was made from: a copy with another block table would not fit it.
    supports_update_block_table = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._refuse_unsupported()

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
    ) -> AttentionCGSupport:
        """Support what the stock backend does: branches never meet a full graph (worker/cudagraph).

        Except where ranks must agree on a graph, whatever the branches of one of them.
        """
        if vllm_config.parallel_config.data_parallel_size > 1:
            return AttentionCGSupport.NEVER
        return super().get_cudagraph_support(vllm_config, kv_cache_spec)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> FlashAttentionMetadata:
        # A flag left over from the last step must not put a plan into the graph.
        return super().build(common_prefix_len=0, common_attn_metadata=common_attn_metadata)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> FlashAttentionMetadata:
        header_tensors = step_state.current()
        if header_tensors is None or not header_tensors.has_branches:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        plan, hogwild, seq_lens = plan_rows(common_attn_metadata, header_tensors)
        # The stock kernel computes all rows, and FlashAttention 3 schedules them ahead by these
        # same lengths; rows of the plan cost it next to nothing this way. `max_seq_len` stays a
        # bound.
        stock = super().build(
            common_prefix_len, replace(common_attn_metadata, seq_lens=seq_lens), fast_build
        )
        return GroupFlashMetadata(
            **{name: getattr(stock, name) for name in _STOCK_FIELDS}, plan=plan, hogwild=hogwild
        )

    def _refuse_unsupported(self) -> None:
        """Refuse what the rows of a plan could not reproduce.

        Raises:
            NotImplementedError: Names the setting or the feature of the model.

        """
        model = self.model_config
        reasons = {
            "decode context parallelism": self.dcp_world_size > 1,
            # Headers are kept by vLLM's blocks, block tables name the kernel's.
            f"attention in kernel blocks of {self.block_size} tokens inside KV blocks of "
            f"{self.cache_config.block_size}": self.block_size != self.cache_config.block_size,
            "a model with bidirectional attention inside a prompt": model.is_mm_prefix_lm,
            "a model with reference sliding-window attention": model.rswa_window is not None,
        }
        refuse_layers(reasons)


class GroupFlashImpl(FlashAttentionImpl):
    """Stock attention, then the rows of the plan."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_attention(self)
        refuse_layers({f"{self.attn_type} attention": self.attn_type != AttentionType.DECODER})

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
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: FlashAttentionMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        result = super().forward(
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
        if isinstance(attn_metadata, GroupFlashMetadata):
            num_tokens = attn_metadata.num_actual_tokens
            rows = (query[:num_tokens], kv_cache, output[:num_tokens])
            if attn_metadata.plan is not None:
                self._attend_segments(layer, *rows, attn_metadata.plan)
            if (hogwild := attn_metadata.hogwild) is not None:
                self._attend_segments(layer, *rows, hogwild.plan, hogwild.rotary)
        return result

    def _attend_segments(
        self,
        layer: Any,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        output: torch.Tensor,
        plan: SegmentPlan,
        rotary: Rotary | None = None,
    ) -> None:
        key_scale = value_scale = None
        if is_quantized_kv_cache(self.kv_cache_dtype):
            # A view of the same bytes; the layer may have scaled the query down to fp8 as well.
            kv_cache = kv_cache.view(current_platform.fp8_dtype())
            if query.dtype != output.dtype:
                query = (query.float() * layer._q_scale).to(output.dtype)
            key_scale, value_scale = layer._k_scale, layer._v_scale
        keys, values = logical_cache(kv_cache, self.head_size)
        segmented_attention(
            query,
            keys,
            values,
            plan,
            scale=self.scale,
            rotary=rotary,
            key_scale=key_scale,
            value_scale=value_scale,
            out=output,
            provider=PROVIDER,
            return_lse=False,
        )


class GroupFlashBackend(FlashAttentionBackend):
    """Registered in place of ``FLASH_ATTN``."""

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        return GroupFlashImpl

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        return GroupFlashMetadataBuilder


def logical_cache(kv_cache: torch.Tensor, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values as [num_blocks, block_size, Hkv, D] views of vLLM's CUDA cache.

    Args:
        kv_cache: [num_blocks, Hkv, block_size, 2 * D], keys before values. The layout in memory,
            NHD or HND, is in its strides.
        head_size: D.

    """
    keys, values = kv_cache.transpose(1, 2).split(head_size, dim=-1)
    return keys, values
