"""Groups in vLLM's workers: block headers in, RoPE positions by physical slot."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

import torch
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.worker_base import WorkerBase

from ..attention import step_state
from ..attention.block_headers import BlockHeaderTensors
from ..attention.hogwild_rows import HogwildState
from ..attention.model_rotary import common_rotary
from ..attention.thought_embeddings import ThoughtEmbeddings, load, shape_of
from ..compat import patches
from ..judge import install
from ..judge.acceptance_metrics import JudgeCounter
from ..judge.verifier import Verifier
from ..scheduler_output import GroupSchedulerOutput
from ..settings import Settings
from ..validation import workers_refusal
from .kv_swap import HostCopies
from .model_runner import ModelRunner, model_runner

_BACKEND_PATCHES = {
    AttentionBackendEnum.CPU_ATTN: patches.CPU_BACKEND,
    AttentionBackendEnum.FLASH_ATTN: patches.FLASH_BACKEND,
}


class GroupWorkerMixin(WorkerBase):
    """Adds block headers to a vLLM worker."""

    backends: ClassVar[dict[AttentionBackendEnum, str]] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tables: BlockHeaderTensors | None = None
        step_state.enter(None)  # another engine of this process may have been at work
        self._copies: HostCopies | None = None
        self._natural_positions: torch.Tensor | None = None
        self._written: dict[str, list[int]] = {}
        self._verifier: Verifier | None = None
        self._judge_counter: JudgeCounter | None = None
        for backend, path in self.backends.items():
            _BACKEND_PATCHES[backend].override_backend(backend, path)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        for model in (self.get_model(), self._runner.draft_model):
            if model is not None:
                refuse_hookless(model)
                model.register_forward_pre_hook(self._set_positions, with_kwargs=True)
                model.register_forward_hook(self._restore_positions, with_kwargs=True)
        if self.vllm_config.speculative_config is not None:
            settings = Settings.from_config(self.vllm_config)
            self._verifier = install.verifier(
                self._runner.verification, self._runner.stock, self.device, settings
            )
            self._judge_counter = self._count_judged(self._verifier)
            install.proposer(self._runner.proposer, self._runner.stock)
        self._runner.count_written(self._written)

    @cached_property
    def _runner(self) -> ModelRunner:
        return model_runner(self.model_runner)

    def _count_judged(self, verifier: Verifier | None) -> JudgeCounter | None:
        """Export what is accepted; of a tensor-parallel group, whose counts agree, one does."""
        parallel = self.vllm_config.parallel_config
        if verifier is None or self.rank % parallel.tensor_parallel_size:
            return None
        return JudgeCounter(lambda: verifier.counts, str(parallel.data_parallel_index))

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        self._tables = BlockHeaderTensors(
            kv_cache_config.num_blocks, self.cache_config.block_size, self.device
        )
        step_state.enter(self._tables)
        self._tables.thoughts = self._load_thoughts()
        self._tables.hogwild = self._make_teams()
        super().initialize_from_config(kv_cache_config)
        self._refuse_foreign_attention(kv_cache_config)
        self._copies = HostCopies(self.model_runner.kv_caches, kv_cache_config.num_blocks)

    def _make_teams(self) -> HogwildState | None:
        """Return where groups of workers are kept, if this server can run any.

        Raises:
            NotImplementedError: The configuration says how the model rotates, its layers do not.

        """
        if workers_refusal(self.vllm_config) is not None:
            return None
        rotary = common_rotary(self.get_model())
        if rotary is None:
            raise NotImplementedError(
                f"parallel_think cannot see how {type(self.get_model()).__name__} rotates queries; "
                "remove parallel_think from --additional-config to serve it without branches"
            )
        return HogwildState(self.cache_config.block_size, rotary, self._runner.row_ids())

    def _load_thoughts(self) -> ThoughtEmbeddings | None:
        """Load this worker's share of the thought embeddings, if the server has any."""
        file = Settings.from_config(self.vllm_config).options.thought_embeddings
        if file is None:
            return None
        parallel = self.vllm_config.parallel_config
        shape = shape_of(self.vllm_config)
        rank = self.rank % parallel.tensor_parallel_size
        return load(file, self.get_model(), shape, rank, parallel.tensor_parallel_size)

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        block_tables = self._tables
        if block_tables is not None:
            step_state.enter(block_tables)
            ours = isinstance(scheduler_output, GroupSchedulerOutput)
            if ours:
                if scheduler_output.swaps and self._copies is not None:
                    self._copies.apply(scheduler_output.swaps)
                if scheduler_output.headers is not None:
                    block_tables.apply(scheduler_output.headers)
                self._written |= scheduler_output.written
            if block_tables.hogwild is not None:
                updates = scheduler_output.teams if ours else ()
                block_tables.hogwild.apply(scheduler_output, updates)
            block_tables.has_holes = ours and scheduler_output.has_branches
        if self._written:
            for req_id in scheduler_output.finished_req_ids:
                self._written.pop(req_id, None)
        if self._verifier is not None:
            self._verifier.requests.update(scheduler_output)
        if self._judge_counter is not None:
            self._judge_counter.stepped(idle=scheduler_output.total_num_scheduled_tokens == 0)
        return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        step_state.enter(self._tables)  # drafts are made here
        if self._verifier is None:
            return super().sample_tokens(grammar_output)
        with self._verifier.shown(self._runner.verification.hidden_states(self._runner.stock)):
            return super().sample_tokens(grammar_output)

    def execute_dummy_batch(self) -> None:
        # No scheduler output comes with it, so the last step's flag would stand.
        if self._tables is not None:
            step_state.enter(self._tables)
            self._tables.begin_dummy()
        super().execute_dummy_batch()

    def _refuse_foreign_attention(self, kv_cache_config: Any) -> None:
        """Refuse layers that would attend to holes because another backend was picked for them.

        Raises:
            NotImplementedError: Names the backend.

        """
        if len(kv_cache_config.kv_cache_groups) > 1:
            raise NotImplementedError(
                "parallel_think cannot serve a model with several groups of KV blocks; remove "
                "parallel_think from --additional-config to serve it without branches"
            )
        ours = tuple(backend.get_class() for backend in self.backends)
        for groups in self.model_runner.attn_groups:
            for group in groups:
                if not issubclass(group.backend, ours):
                    raise NotImplementedError(
                        f"parallel_think cannot serve the attention of {group.layer_names[0]} "
                        f"({group.backend.get_name()}); remove parallel_think from "
                        "--additional-config to serve it without branches"
                    )

    def _set_positions(
        self, _model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Move the positions of branches' tokens in the runner's own buffer, outside any graph."""
        block_tables = self._tables
        if block_tables is None or not block_tables.has_holes:
            return
        metadata = get_forward_context().attn_metadata
        if not isinstance(metadata, dict) or not metadata:
            return
        positions = _positions(args, kwargs)
        self._natural_positions = positions.clone()
        block_tables.move_positions(positions, next(iter(metadata.values())).slot_mapping)

    def _restore_positions(
        self, _model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any
    ) -> None:
        """Put vLLM's positions back: Model Runner V2's sampler counts ``min_tokens`` by them."""
        if self._natural_positions is not None:
            _positions(args, kwargs).copy_(self._natural_positions)
            self._natural_positions = None
        if self._tables is not None and self._tables.thoughts is not None:
            self._tables.thoughts.end_step()


def _positions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    positions: torch.Tensor = kwargs["positions"] if "positions" in kwargs else args[1]
    return positions


def refuse_hookless(model: torch.nn.Module) -> None:
    """Refuse a model whose class vLLM compiles as a whole, because then no forward hook runs.

    Raises:
        NotImplementedError: Names the model's class.

    """
    if type(model).__call__ is not torch.nn.Module.__call__:
        raise NotImplementedError(
            f"parallel_think cannot set the positions of {type(model).__name__}, which vLLM calls "
            "around PyTorch's hooks; remove parallel_think from --additional-config to serve it "
            "without branches"
        )
