"""K/V of groups that gave way, on the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..scheduler_output import KVSwap


class HostCopies:
    """Copies blocks to the host and back, in the order of the device's own work.

    A copy lives until it is taken back or given up, so that there is no more of them than groups
    that wait for room, each no larger than the pool.
    """

    def __init__(self, caches: Sequence[torch.Tensor], num_blocks: int) -> None:
        self._caches = list(caches)
        for cache in self._caches:
            if cache.shape[0] != num_blocks:
                raise NotImplementedError(
                    f"parallel_think cannot copy blocks of a KV cache of shape {tuple(cache.shape)}"
                )
        self._copies: dict[str, list[torch.Tensor]] = {}

    def apply(self, swaps: Sequence[KVSwap]) -> None:
        """Do what the scheduler asked for, before a step writes into any block."""
        for swap in swaps:
            if swap.out:
                self._copies[swap.team] = [self._copy(cache, swap.blocks) for cache in self._caches]
                continue
            copies = self._copies.pop(swap.team, None)
            if copies is not None and swap.blocks:
                for cache, copy in zip(self._caches, copies, strict=True):
                    index = torch.tensor(swap.blocks, device=cache.device)
                    cache.index_copy_(0, index, copy.to(cache.device, non_blocking=True))

    @property
    def teams(self) -> frozenset[str]:
        """Return whose K/V is on the host."""
        return frozenset(self._copies)

    @staticmethod
    def _copy(cache: torch.Tensor, blocks: Sequence[int]) -> torch.Tensor:
        chosen = cache.index_select(0, torch.tensor(blocks, device=cache.device))
        if not cache.is_cuda:
            return chosen
        host = torch.empty(chosen.shape, dtype=chosen.dtype, pin_memory=True)
        return host.copy_(chosen, non_blocking=True)
