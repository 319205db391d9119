"""vLLM's model runner, V1 or V2: asked once, and all that is different between them.

Both do the same work under other names. The rest of this package talks to a :class:`ModelRunner`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

from ..attention.hogwild_rows import RowIds
from ..compat import patches
from . import penalties
from .penalties import Written


class ModelRunner(ABC):
    """What a worker asks of its model runner.

    Attributes:
        stock: vLLM's own object.

    """

    def __init__(self, stock: Any) -> None:
        self.stock = stock

    @property
    @abstractmethod
    def proposer(self) -> Any:
        """What proposes draft tokens, or ``None``."""

    @property
    @abstractmethod
    def verification(self) -> ModuleType:
        """The judge's module for this runner's rejection sampler."""

    @abstractmethod
    def row_ids(self) -> RowIds:
        """Return how to read which request is in which row; it is known on the host."""

    @abstractmethod
    def count_written(self, written: Written) -> None:
        """Let the sampler count what was written before its requests.

        Args:
            written: Looked up at every step; the caller keeps it up to date.

        """

    @property
    def draft_model(self) -> torch.nn.Module | None:
        """The model that proposes draft tokens, if a model does.

        Its keys lie in the same blocks as the target's, so its positions come from the slots as
        well: with vLLM's own it would guess at another place of the text than the target writes at.
        """
        model = getattr(self.proposer, "model", None)
        return model if isinstance(model, torch.nn.Module) else None

    @property
    def graph_managers(self) -> list[CudagraphDispatcher | CudaGraphManager]:
        """The objects that choose a CUDA graph, for the model and for its draft model."""
        owners = [owner for owner in (self.stock, self.proposer) if owner is not None]
        held = {id(value): value for owner in owners for value in vars(owner).values()}
        kinds = CudagraphDispatcher | CudaGraphManager
        return [value for value in held.values() if isinstance(value, kinds)]

    @property
    def _sampler(self) -> Any:
        """The sampler; only the last stage of a pipeline has one."""
        return getattr(self.stock, "sampler", None)

    @property
    def rejection_sampler(self) -> Any:
        """What verifies draft tokens, or ``None``."""
        return getattr(self.stock, "rejection_sampler", None)


class ModelRunnerV1(ModelRunner):
    """``vllm.v1.worker.gpu_model_runner``: a persistent batch whose rows are moved together."""

    @property
    def proposer(self) -> Any:
        return getattr(self.stock, "drafter", None)

    @property
    def verification(self) -> ModuleType:
        from ..judge import rejection_sampler_v1

        return rejection_sampler_v1

    def row_ids(self) -> RowIds:
        def by_batch(_metadata: CommonAttentionMetadata) -> Sequence[str]:
            ids: Sequence[str] = self.stock.input_batch.req_ids
            return ids

        return by_batch

    def count_written(self, written: Written) -> None:
        if self._sampler is not None:
            patches.PENALTIES_V1.apply(self._sampler, penalties.prepending(self.stock, written))
        if self._sampler is not None and self.rejection_sampler is not None:
            patches.DRAFT_PENALTIES_V1.apply(
                self.rejection_sampler, penalties.prepending_to_drafts(self.stock, written)
            )


class ModelRunnerV2(ModelRunner):
    """``vllm.v1.worker.gpu.model_runner``: requests keep a place in states on the device."""

    @property
    def proposer(self) -> Any:
        return getattr(self.stock, "speculator", None)

    @property
    def verification(self) -> ModuleType:
        from ..judge import rejection_sampler_v2

        return rejection_sampler_v2

    def row_ids(self) -> RowIds:
        def by_state(metadata: CommonAttentionMetadata) -> Sequence[str]:
            assert metadata.req_idx is not None
            names = self.stock.req_states.index_to_req_id
            return [names[index] for index in metadata.req_idx.tolist()]

        return by_state

    def count_written(self, written: Written) -> None:
        if self._sampler is not None:
            state = self._sampler.penalties_state
            make = penalties.counting(state, self.stock.req_states, written)
            patches.PENALTIES_V2.apply(state, make)


def model_runner(stock: Any) -> ModelRunner:
    """Return the face of one of vLLM's model runners."""
    return ModelRunnerV2(stock) if hasattr(stock, "req_states") else ModelRunnerV1(stock)
