"""vLLM's CUDA worker with sequence groups."""

from typing import Any, ClassVar

from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.gpu_worker import Worker

from .cudagraph import keep_branches_out_of_full_graphs
from .worker import GroupWorkerMixin

BACKENDS = "vllm_parallel_think.attention.flash_attn"


class GroupCUDAWorker(GroupWorkerMixin, Worker):
    """CUDA worker that serves groups."""

    backends: ClassVar = {
        AttentionBackendEnum.FLASH_ATTN: f"{BACKENDS}.GroupFlashBackend",
    }

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        super().initialize_from_config(kv_cache_config)
        assert self._tables is not None
        keep_branches_out_of_full_graphs(self._runner, self._tables)
