"""vLLM's CUDA worker with sequence groups."""

from typing import ClassVar

from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.gpu_worker import Worker

from .worker import GroupWorkerMixin


class GroupCUDAWorker(GroupWorkerMixin, Worker):
    """CUDA worker that serves groups."""

    backends: ClassVar = {
        AttentionBackendEnum.FLASH_ATTN: "vllm_parallel_think.attention.cuda.GroupFlashBackend"
    }
