"""vLLM's CPU worker with sequence groups."""

from typing import Any, ClassVar

from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.cpu_worker import CPUWorker

from .worker import GroupWorkerMixin


class GroupCPUWorker(GroupWorkerMixin, CPUWorker):
    """CPU worker that serves groups.

    The attention kernel is compiled (or loaded from Numba's cache) before the first request, and
    not when this module is imported: vLLM's CPU platform scans all modules for Triton kernels while
    it sets a worker up, and stumbles over Numba's.
    """

    backends: ClassVar = {
        AttentionBackendEnum.CPU_ATTN: "vllm_parallel_think.attention.cpu.GroupCPUBackend"
    }

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        super().initialize_from_config(kv_cache_config)
        from attention_kernels.cpu import warm_up

        warm_up()
