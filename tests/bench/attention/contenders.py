"""Who is measured. A contender prepares itself for one layer and returns what runs it.

One that cannot run here raises `Missing` with the reason, which is printed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from attention_kernels import SegmentPlan, segmented_attention
from tests.bench.attention.problems import HEADS, Layer

Run = Callable[[], torch.Tensor]
MOST_TOKENS_OF_REFERENCE = 20_000


class Missing(Exception):
    """Why a contender cannot run."""


def ours(provider: str, share: bool) -> Callable[[Layer], Run]:
    def prepare(layer: Layer) -> Run:
        if provider == "xformers":
            _module("xformers.ops.fmha")
        point, out = layer.point, torch.empty_like(layer.query)
        if provider == "torch" and point.width * (point.prefix + point.suffix) > (
            MOST_TOKENS_OF_REFERENCE
        ):
            raise Missing("the reference takes minutes for this many keys")
        keys, values = layer.caches(transposed=layer.query.device.type == "cpu")
        fill = torch.full((len(layer.cache),), point.block_size, dtype=torch.int32)
        plan = SegmentPlan.from_block_table(
            layer.table, layer.seq_lens, layer.starts, fill.to(layer.query.device),
            block_size=point.block_size, max_query_len=1, share=share,
        )  # fmt: skip

        def run() -> torch.Tensor:
            segmented_attention(
                layer.query, keys, values, plan, scale=layer.scale, provider=provider, out=out,
                return_lse=False,
            )  # fmt: skip
            return out

        return run

    return prepare


def tuned(**values: Any) -> Callable[[Layer], Run]:
    """Ours in Triton, launched with other values of its tuning."""

    def prepare(layer: Layer) -> Run:
        triton_spans = _module("attention_kernels.triton.shared_spans")
        tuning, run = triton_spans.Tuning(**values), ours("triton", share=True)(layer)

        def tuned_run() -> torch.Tensor:
            before, triton_spans.tuning = triton_spans.tuning, tuning
            try:
                return run()
            finally:
                triton_spans.tuning = before

        return tuned_run

    return prepare


def vllm_cpu(layer: Layer) -> Run:
    """vLLM's CPU kernel as its backend calls it: each row reads its whole context."""
    ops = _module("vllm._custom_ops")
    backend = _module("vllm.v1.attention.backends.cpu_attn")
    _module("vllm.platforms").current_platform.import_kernels()
    if not hasattr(torch.ops._C, "cpu_attention_with_kv_cache"):
        raise Missing("this build of vLLM has no CPU attention")
    heads, num_kv_heads, head_dim = HEADS[layer.point.model]
    isa = backend._get_attn_isa(layer.query.dtype, layer.point.block_size, head_dim)
    if isa == "amx":
        isa = "vec"  # reads the layout that the other kernels read
    keys, values = layer.cache.view(len(layer.cache), num_kv_heads, -1, head_dim).chunk(2, dim=2)
    out = torch.empty_like(layer.query)
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=layer.point.width, num_heads=heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        seq_lens=layer.seq_lens, dtype=layer.query.dtype, query_start_loc=layer.starts,
        causal=True, sliding_window_size=-1, isa=isa, enable_kv_split=True,
    )  # fmt: skip

    def run() -> torch.Tensor:
        ops.cpu_attention_with_kv_cache(
            query=layer.query, key_cache=keys, value_cache=values, output=out,
            query_start_loc=layer.starts, seq_lens=layer.seq_lens, scale=layer.scale, causal=True,
            alibi_slopes=None, sliding_window=-1, block_table=layer.table, softcap=0,
            scheduler_metadata=metadata, s_aux=None,
        )  # fmt: skip
        return out

    return run


def vllm_triton(layer: Layer) -> Run:
    """vLLM's Triton kernel, with the split along the keys that its backend chooses for decode."""
    kernel = _module("vllm.v1.attention.ops.triton_unified_attention").unified_attention
    heads, num_kv_heads, head_dim = HEADS[layer.point.model]
    keys, values = layer.caches(transposed=False)
    # TritonAttentionMetadataBuilder: 16 segments while the grid has fewer than 128 programs.
    threshold, segments = max(1, 128 // num_kv_heads), 16
    options: dict[str, Any] = {"dtype": torch.float32, "device": layer.query.device}
    sums = torch.empty(threshold, heads, segments, head_dim, **options)
    tops, totals = (torch.empty(threshold, heads, segments, **options) for _ in range(2))
    out = torch.empty_like(layer.query)
    longest = int(layer.seq_lens.max())

    def run() -> torch.Tensor:
        kernel(
            q=layer.query, k=keys, v=values, out=out, cu_seqlens_q=layer.starts, max_seqlen_q=1,
            seqused_k=layer.seq_lens, max_seqlen_k=longest, softmax_scale=layer.scale, causal=True,
            window_size=(-1, -1), block_table=layer.table, softcap=0, q_descale=None,
            k_descale=None, v_descale=None, seq_threshold_3D=threshold,
            num_par_softmax_segments=segments, softmax_segm_output=sums, softmax_segm_max=tops,
            softmax_segm_expsum=totals,
        )  # fmt: skip
        return out

    return run


def flashinfer_cascade(layer: Layer) -> Run:
    """FlashInfer's two-level cascade: one level for the prefix, one for the rows' own blocks."""
    flashinfer, point = _module("flashinfer"), layer.point
    if not point.shared:
        raise Missing("a cascade needs a shared prefix")
    heads, num_kv_heads, head_dim = HEADS[point.model]
    device, width = layer.query.device, point.width
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=device)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace, "NHD")
    num_shared = -(-point.prefix // point.block_size)
    own = layer.table.shape[1] - num_shared

    def ints(values: Any) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.int32, device=device)

    last = (point.suffix - 1) % point.block_size + 1
    wrapper.plan(
        [ints([0, width]), layer.starts],
        [ints([0, num_shared]), layer.starts * own],
        [layer.table[0, :num_shared].contiguous(), layer.table[:, num_shared:].flatten()],
        [ints([point.block_size]), ints([last] * width)],
        heads, num_kv_heads, head_dim, point.block_size, q_data_type=layer.query.dtype,
    )  # fmt: skip
    keys, values = layer.caches(transposed=False)
    cache = torch.stack([keys, values], dim=1)  # [num_blocks, 2, block_size, Hkv, D]
    return lambda: wrapper.run(layer.query, cache)


def flex_attention(layer: Layer) -> Run:
    """PyTorch's FlexAttention over prefix and suffixes side by side, without a block table."""
    if layer.query.device.type != "cuda":
        raise Missing("measured on a GPU only")
    flex, point = _module("torch.nn.attention.flex_attention"), layer.point
    if not point.shared:
        raise Missing("has no block table: rows that share nothing are not laid out side by side")
    keys, values = layer.caches(transposed=False)
    num_shared = -(-point.prefix // point.block_size)
    order = torch.cat([layer.table[0, :num_shared], layer.table[:, num_shared:].flatten()]).long()
    prefix = num_shared * point.block_size
    own = (layer.table.shape[1] - num_shared) * point.block_size
    key, value = (t[order].flatten(0, 1).transpose(0, 1)[None] for t in (keys, values))

    def sees(_: Any, __: Any, row: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        behind = place - prefix
        return (behind < 0) | ((behind // own == row) & (behind % own < point.suffix))

    mask = flex.create_block_mask(sees, None, None, point.width, key.shape[2], device=key.device)
    attend = torch.compile(flex.flex_attention, dynamic=False)
    query = layer.query.transpose(0, 1)[None]

    def run() -> torch.Tensor:
        out = attend(query, key, value, block_mask=mask, scale=layer.scale, enable_gqa=True)
        return out[0].transpose(0, 1)

    return run


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Missing(f"{name} cannot be imported: {error}") from error


# The first one is what the others are compared with.
CONTENDERS: dict[str, dict[str, Callable[[Layer], Run]]] = {
    "cpu": {
        "vllm": vllm_cpu,
        "cpu": ours("cpu", share=True),
        "cpu apart": ours("cpu", share=False),
        "torch": ours("torch", share=True),
    },
    "cuda": {
        "vllm": vllm_triton,
        "triton": ours("triton", share=True),
        "triton apart": ours("triton", share=False),
        "torch": ours("torch", share=True),
        "xformers": ours("xformers", share=True),
        "flashinfer": flashinfer_cascade,
        "flex": flex_attention,
    },
}

# A row over one of these is over `triton`, its tuning as it is.
TUNINGS: dict[str, Callable[[Layer], Run]] = {
    "triton": ours("triton", share=True),
    "5 stages": tuned(narrow=(5, 4), wide=(5, 4)),
    "5 stages narrow": tuned(narrow=(5, 4)),
    "8 warps wide": tuned(wide=(3, 8)),
    "5 stages, 8 warps wide": tuned(wide=(5, 8)),
    "2 warps narrow": tuned(narrow=(3, 2)),
    "32 lines": tuned(shared_lines=32),
    "132 programs": tuned(num_programs=132),
    "528 programs": tuned(num_programs=528),
}
