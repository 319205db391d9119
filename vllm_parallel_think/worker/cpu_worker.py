"""vLLM's CPU worker with sequence groups."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from ..compat import patches
from .worker import GroupWorkerMixin


class GroupCPUWorker(GroupWorkerMixin, CPUWorker):
    """CPU worker that serves groups.

    The attention kernel is compiled (or loaded from Numba's cache) before the first request, and
    not when this module is imported: vLLM's CPU platform scans all modules for Triton kernels while
    it sets a worker up, and stumbles over Numba's.
    """

    backends: ClassVar = {
        AttentionBackendEnum.CPU_ATTN: "vllm_parallel_think.attention.cpu_attn.GroupCPUBackend"
    }

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        super().initialize_from_config(kv_cache_config)
        from attention_kernels.cpu.launch import warm_up

        warm_up()

    def sample_tokens(self, grammar_output: Any) -> Any:
        runner = self.model_runner
        if not rewinds_generators(type(runner)) or not runner.input_batch.generators:
            return super().sample_tokens(grammar_output)
        with unfinished_prompts_without_seed(runner):
            return super().sample_tokens(grammar_output)


def rewinds_generators(runner_class: type) -> bool:
    """Return whether a model runner winds generators back, which PyTorch cannot do on a CPU."""
    bookkeeping = getattr(runner_class, "_bookkeeping_sync", None)
    code = getattr(bookkeeping, "__code__", None)
    return issubclass(runner_class, CPUModelRunner) and "get_offset" in getattr(
        code, "co_names", ()
    )


@contextmanager
def unfinished_prompts_without_seed(runner: Any) -> Iterator[None]:
    """Keep the generators of prompts that are not computed to their end out of a step.

    vLLM samples for every row, drops what it sampled for a prompt's earlier parts, and winds that
    row's generator back. A row without its generator draws from the common one, and its own stays
    where it is, so the answer does not depend on how the prompt was cut.
    """
    batch = runner.input_batch
    unfinished = np.nonzero(runner.discard_request_mask.np[: batch.num_reqs])[0].tolist()
    # The step's sampling metadata holds the same dictionary.
    with patches.GENERATORS.withheld(batch.generators, unfinished):
        yield
