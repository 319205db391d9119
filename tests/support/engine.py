"""An in-process engine whose scheduler and KV cache a test can look into."""

from __future__ import annotations

import gc
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.triton_utils import dispatcher

from vllm_parallel_think.attention.cpu_attn import logical_cache
from vllm_parallel_think.core.hogwild.group import HogwildGroup
from vllm_parallel_think.plugin import register
from vllm_parallel_think.scheduler.scheduler import GroupHooks


@dataclass
class Snapshot:
    """A finished group's tokens and K/V, node by node in visible order.

    Attributes:
        nodes: All nodes of the group.
        tokens: Own tokens of all nodes up to the first that is not held.
        keys: [layers, tokens, Hkv, D], as they lay in the cache.
        values: [layers, tokens, Hkv, D].

    """

    nodes: list[Any] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)


def _register_kernels_once() -> None:
    """Let an engine start in a process that has loaded Numba, and a second one after it.

    vLLM replaces its Triton kernels on a CPU at every engine start, by a scan over all modules that
    fails on llvmlite's function wrappers. One scan is enough, and it need not see those.
    """
    register_kernels = dispatcher.register_kernels

    def register_once(overrides: Any) -> None:
        if dispatcher._registry:
            return
        hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if "llvmlite" in name}
        try:
            register_kernels(overrides)
        finally:
            sys.modules.update(hidden)

    dispatcher.register_kernels = register_once


class Engine:
    """``LLM`` with the plugin turned on."""

    def __init__(self, model: str, *, options: dict[str, Any] | None = None, **kwargs: Any) -> None:
        register()
        _register_kernels_once()
        defaults: dict[str, Any] = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 2048,
            "max_num_seqs": 32,
            "num_gpu_blocks_override": None,
        }
        additional = {"parallel_think": options} if options is not None else {}
        self.llm = LLM(model, additional_config=additional, **{**defaults, **kwargs})
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler: Any = self.core.scheduler
        self.snapshots: dict[str, Snapshot] = {}
        if isinstance(self.scheduler, GroupHooks):
            self._record_groups()

    def generate(
        self, prompts: Sequence[list[int]], params: SamplingParams | list[SamplingParams]
    ) -> list[Any]:
        """Run prompts given as token ids; return vLLM's request outputs."""
        return self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
        )

    @property
    def kv_caches(self) -> list[torch.Tensor]:
        """vLLM's KV cache, a tensor a layer."""
        return self.worker.model_runner.kv_caches

    @property
    def worker(self) -> Any:
        """vLLM's worker, with the plugin's mixin."""
        return self.core.model_executor.driver_worker.worker

    def assert_all_blocks_free(self) -> None:
        """INV-3: nobody holds anything when nothing runs."""
        pool = self.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        assert self.scheduler.held_blocks.num_held == 0
        assert not self.scheduler.groups

    def preempt_every(self, num_steps: int) -> None:
        """Preempt a running request every so many steps, as vLLM does when blocks run out."""
        scheduler, schedule = self.scheduler, self.scheduler.schedule
        steps = itertools.count(1)

        def preempting(*args: Any, **kwargs: Any) -> Any:
            step = next(steps)
            if step % num_steps == 0 and scheduler.running:
                scheduler.queues.preempt(scheduler.running[step % len(scheduler.running)])
            return schedule(*args, **kwargs)

        scheduler.schedule = preempting

    def snapshot(self, output: Any) -> Snapshot:
        """Return what a finished request held."""
        return next(s for i, s in self.snapshots.items() if i.startswith(f"{output.request_id}-"))

    def close(self) -> None:
        """Shut the engine down."""
        self.core.shutdown()
        del self.llm, self.core, self.scheduler
        gc.collect()
        cleanup_dist_env_and_memory()

    def _record_groups(self) -> None:
        """Copy a group's K/V out of the cache right before its blocks are given back."""
        lifecycle, end = self.scheduler.lifecycle, self.scheduler.lifecycle.end

        def record(state: Any, *args: Any, **kwargs: Any) -> None:
            group = state.group
            # What workers wrote stands in the order of completion, beside what they never finished.
            workers = isinstance(group, HogwildGroup)
            nodes = [group.trunk, *group.history] if workers else list(group.nodes)
            snapshot = Snapshot(nodes)
            for node in nodes:
                if not node.sealed:
                    break
                self._copy(node, snapshot)
            self.snapshots[state.root.request_id] = snapshot
            end(state, *args, **kwargs)

        lifecycle.end = record

    def _copy(self, node: Any, snapshot: Snapshot) -> None:
        block_size = self.scheduler.block_size
        blocks = [b.block_id for b in self.scheduler.held_blocks.blocks(node)]
        slots = [(blocks[i // block_size], i % block_size) for i in range(len(node.tokens))]
        at = torch.tensor(slots).T
        layers = [logical_cache(cache, cache.shape[-1] // 2) for cache in self.kv_caches]
        snapshot.tokens.extend(node.tokens)
        snapshot.keys.append(torch.stack([keys[at[0], at[1]] for keys, _ in layers]))
        snapshot.values.append(torch.stack([values[at[0], at[1]] for _, values in layers]))


class Preempter:
    """Preempts a running request every few steps, as vLLM does when blocks run out."""

    def __init__(self, scheduler: Any, every: int) -> None:
        self.num_branches = 0
        self._scheduler, self._every, self._step = scheduler, every, 0
        self._schedule = scheduler.schedule
        scheduler.schedule = self.schedule

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        self._step += 1
        running = self._scheduler.running
        if running and self._step % self._every == 0:
            request = running[self._step % len(running)]
            self.num_branches += self._scheduler.groups.is_member(request)
            self._scheduler.queues.preempt(request)
        return self._schedule(*args, **kwargs)
