"""A correct ``expand_batch_to_tokens`` for CPUs, where vLLM's leaves its output unwritten.

vLLM issue #55005: the CPU kernel writes into an int64 temporary, so that temperature, top-k and
top-p of sampled draft rows are whatever the memory held.
"""

from __future__ import annotations

import torch
from vllm.v1.sample import rejection_sampler

from .logger import init_logger
from .patches import EXPAND_BATCH

logger = init_logger(__name__)


def expand_batch_to_tokens(
    x: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    num_tokens: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> torch.Tensor:
    """Return [num_tokens]: each request's value once for each of its tokens.

    Args:
        x: [B], one value a request.
        cu_num_tokens: [B] int, running totals of tokens.
        num_tokens: The last total.
        replace_from: A value to be replaced.
        replace_to: What to put in its place.

    """
    counts = torch.diff(cu_num_tokens.long(), prepend=cu_num_tokens.new_zeros(1).long())
    values = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return torch.repeat_interleave(values, counts, output_size=num_tokens)


def is_broken() -> bool:
    """Return whether this vLLM expands floats wrongly on a CPU."""
    x = torch.tensor([0.25, 0.75])
    expanded = rejection_sampler.expand_batch_to_tokens(x, torch.tensor([1, 3]), 3)
    return expanded.tolist() != [0.25, 0.75, 0.75]


def replace_if_broken() -> None:
    """Replace vLLM's function if it is broken; safe to call again."""
    if is_broken():
        logger.info("expand_batch_to_tokens is replaced (vLLM issue #55005)")
        EXPAND_BATCH.apply(rejection_sampler, lambda _stock: expand_batch_to_tokens)
