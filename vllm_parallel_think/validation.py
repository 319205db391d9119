"""What a server with branches cannot be started with: one place for every such refusal."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from vllm.config import VllmConfig
from vllm.platforms import CpuArchEnum, current_platform
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from .core.config.server_options import FLAG, ServerOptions
from .core.errors import OptionError

FP8_DTYPES = ("fp8", "fp8_e4m3")
"""Quantized KV caches, with a scale a layer, that FlashAttention and our kernel read."""

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
"""Kinds of rotary positions whose frequencies are the same for every length of a text."""

WAY_OUT = f"or remove parallel_think from {FLAG.split()[0]}"
WITHOUT_BRANCHES = "; remove parallel_think from --additional-config to serve it without branches"


def first_of(reasons: Mapping[str, bool]) -> str | None:
    """Return the first reason that holds."""
    return next((reason for reason, holds in reasons.items() if holds), None)


def refuse(
    reasons: Mapping[str, bool],
    way_out: str,
    *,
    what: str = "parallel_think cannot serve ",
    error: type[Exception] = OptionError,
) -> None:
    """Refuse the first reason that holds.

    Args:
        reasons: What cannot be served, and whether it is there.
        way_out: What to do about it; ends the message.
        what: What cannot be done; begins the message.
        error: What to raise: :class:`OptionError` for what the operator set,
            ``NotImplementedError`` for what only the loaded model shows.

    """
    reason = first_of(reasons)
    if reason is not None:
        raise error(f"{what}{reason}{way_out}")


def refuse_unsupported(config: VllmConfig, options: ServerOptions) -> None:
    """Refuse what a group cannot be served with.

    Raises:
        OptionError: Names the flag or the feature of the model, and the way out.

    """
    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    reasons = {
        "a pooling model": model.runner_type != "generate",
        "an MLA model": model.use_mla,
        "an encoder-decoder model": model.is_encoder_decoder,
        "a hybrid or Mamba model": model.is_hybrid or model.is_attention_free,
        "a model with sliding-window or chunked attention": bool(model.get_sliding_window())
        or model.attention_chunk_size is not None,
        "a model with M-RoPE positions": model.uses_mrope,
        "a diffusion model": model.is_diffusion,
        "--kv-transfer-config": config.kv_transfer_config is not None,
        "--ec-transfer-config": config.ec_transfer_config is not None,
        "thought_embeddings with --speculative-config": (
            options.thought_embeddings is not None and config.speculative_config is not None
        ),
        "--decode-context-parallel-size above 1": parallel.decode_context_parallel_size > 1,
        "--prefill-context-parallel-size above 1": parallel.prefill_context_parallel_size > 1,
        "--enable-dbo": parallel.enable_dbo,
        "--no-enable-prefix-caching (a fork starts from cached blocks)": (
            not cache.enable_prefix_caching
        ),
        "--skip-tokenizer-init": model.skip_tokenizer_init,
        "--return-sampling-mask": model.return_sampling_mask,
        "--enable-return-routed-experts": config.aux_output_config.enable_return_routed_experts,
        "VLLM_USE_RUST_FRONTEND=1": os.environ.get("VLLM_USE_RUST_FRONTEND") == "1",
        # A reused layer's tokens are a selection of the batch, the plan is for all of it.
        "--kv-sharing-fast-prefill": cache.kv_sharing_fast_prefill,
        # Such a graph replays the whole model, without the hook that sets positions.
        "VLLM_USE_BREAKABLE_CUDAGRAPH=1 (set it to 0)": os.environ.get(
            "VLLM_USE_BREAKABLE_CUDAGRAPH"
        )
        == "1",
        f"--kv-cache-dtype {cache.cache_dtype}": (
            is_quantized_kv_cache(cache.cache_dtype) and cache.cache_dtype not in FP8_DTYPES
        ),
    }
    if current_platform.is_cpu():
        reasons["--kv-cache-dtype on a CPU"] = cache.cache_dtype != "auto"
        reasons["a CPU that is not x86-64"] = (
            current_platform.get_cpu_architecture() != CpuArchEnum.X86
        )
    refuse(reasons, f": drop it, {WAY_OUT}")


def workers_refusal(config: VllmConfig) -> str | None:
    """Return why a server cannot run profiles with workers that see each other, if it cannot."""
    parallel = config.parallel_config
    return first_of(
        {
            "workers would see each other's unverified drafts: drop --speculative-config": (
                config.speculative_config is not None
            ),
            "workers see each other's newest tokens: start the server with "
            "--no-async-scheduling": bool(config.scheduler_config.async_scheduling),
            "workers' rows must run in one forward: drop --pipeline-parallel-size": (
                parallel.pipeline_parallel_size > 1
            ),
            "workers read each other's keys through rotated queries, which this model's positions "
            "do not allow": not _rotates_alike(config.model_config.hf_text_config),
        }
    )


def _rotates_alike(config: Any) -> bool:
    """Whether all layers of a model rotate queries and keys by the same, fixed frequencies."""
    rope = getattr(config, "rope_parameters", None)
    return isinstance(rope, dict) and rope.get("rope_type") in ROPE_TYPES


def refuse_speculation(config: VllmConfig, where: str) -> None:
    """Refuse a server whose drafts no rule of ours can verify.

    Args:
        config: vLLM's.
        where: The key that sets the rule.

    Raises:
        OptionError: Names the setting, and the way out.

    """
    spec = config.speculative_config
    if spec is None:
        raise OptionError(f"{where} verifies draft tokens: add --speculative-config, or drop it")
    reasons = {
        # A point mass is an 'or' only where every position is tested by itself.
        f"rejection_sample_method {spec.rejection_sample_method!r} (use 'standard')": (
            spec.rejection_sample_method != "standard"
        ),
        "enable_adaptive_verification": spec.enable_adaptive_verification,
        # Its filler, repeats of the last token, looks like drafts.
        "vLLM's n-gram proposer on Model Runner V2 (set VLLM_USE_V2_MODEL_RUNNER=0)": (
            spec.method in ("ngram", "ngram_gpu") and config.use_v2_model_runner
        ),
        "--watermark-config": getattr(config, "watermark_config", None) is not None,
    }
    refuse(reasons, ": drop one of them", what=f"{where} cannot be combined with ")


def refuse_attention(impl: Any) -> None:
    """Refuse layers whose attention the masked rows of a group could not reproduce.

    Args:
        impl: vLLM's implementation of a layer's attention.

    Raises:
        NotImplementedError: Names the feature of the model.

    """
    reasons = {
        "ALiBi": impl.alibi_slopes is not None,
        "logits soft-capping": bool(impl.logits_soft_cap),
        "attention sinks": impl.sinks is not None,
        "a sliding window": impl.sliding_window not in (None, -1, (-1, -1)),
    }
    refuse(
        reasons,
        WITHOUT_BRANCHES,
        what="parallel_think cannot serve a model whose attention uses ",
        error=NotImplementedError,
    )


def refuse_layers(reasons: Mapping[str, bool]) -> None:
    """Refuse what the loaded model's layers show.

    Raises:
        NotImplementedError: Names the first reason that holds.

    """
    refuse(reasons, WITHOUT_BRANCHES, error=NotImplementedError)
