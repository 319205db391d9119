"""Groups in vLLM's workers: block headers in, RoPE positions by physical slot."""

from __future__ import annotations

from typing import Any

import torch
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.worker_base import WorkerBase

from . import tables
from .messages import GroupSchedulerOutput
from .tables import BlockTables


class GroupWorkerMixin(WorkerBase):
    """Adds block headers to a vLLM worker."""

    backends: dict[AttentionBackendEnum, str] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tables: BlockTables | None = None
        for backend, path in self.backends.items():
            register_backend(backend, path)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        self.get_model().register_forward_pre_hook(self._set_positions, with_kwargs=True)

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        self._tables = BlockTables(
            kv_cache_config.num_blocks, self.cache_config.block_size, self.device
        )
        tables.publish(self.vllm_config.instance_id, self._tables)
        super().initialize_from_config(kv_cache_config)

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        block_tables = self._tables
        if block_tables is not None:
            ours = isinstance(scheduler_output, GroupSchedulerOutput)
            if ours and scheduler_output.headers is not None:
                block_tables.apply(scheduler_output.headers)
            block_tables.has_branches = ours and scheduler_output.has_branches
        return super().execute_model(scheduler_output)

    def _set_positions(
        self, _model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Move the positions of branches' tokens in the runner's own buffer, outside any graph."""
        block_tables = self._tables
        if block_tables is None or not block_tables.has_branches:
            return
        metadata = get_forward_context().attn_metadata
        if not isinstance(metadata, dict) or not metadata:
            return
        positions = kwargs["positions"] if "positions" in kwargs else args[1]
        block_tables.move_positions(positions, next(iter(metadata.values())).slot_mapping)
