"""vLLM's CPU worker with sequence groups."""

from typing import ClassVar

from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.cpu_worker import CPUWorker

from .worker import GroupWorkerMixin


class GroupCPUWorker(GroupWorkerMixin, CPUWorker):
    """CPU worker that serves groups."""

    backends: ClassVar = {
        AttentionBackendEnum.CPU_ATTN: "vllm_parallel_think.attention.cpu.GroupCPUBackend"
    }
