"""Full CUDA graphs for batches without branches, piecewise ones for batches with them.

A full graph replays attention as it was captured, without branches, and Model Runner V2 replays it
without calling the model, so that no hook sets positions. Steps that hold branches therefore take
the graphs between the attention layers; all others take what vLLM would take. The seam is
``dispatch`` of the objects with which both runners, and their draft models, choose a graph: neither
asks the attention backend about a step. It can go when one does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm.config import CUDAGraphMode
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

from ..attention.block_headers import BlockHeaderTensors


def keep_branches_out_of_full_graphs(runner: Any, tables: BlockHeaderTensors) -> None:
    """Make a runner that has its graph managers choose by what the current batch holds.

    Raises:
        RuntimeError: The runner has none; its full graphs would attend to holes.

    """
    managers = list(_managers(runner))
    if not managers:
        raise RuntimeError(f"{type(runner).__name__} has no CUDA graph manager to steer")
    for manager in managers:
        if isinstance(manager, CudagraphDispatcher):
            _steer_dispatcher(manager, tables)
        else:
            _steer_manager(manager, tables)


def _managers(runner: Any) -> Iterator[CudagraphDispatcher | CudaGraphManager]:
    owners = [runner, getattr(runner, "drafter", None), getattr(runner, "speculator", None)]
    found = {id(v): v for owner in owners if owner is not None for v in vars(owner).values()}
    for value in found.values():
        if isinstance(value, CudagraphDispatcher | CudaGraphManager):
            yield value


def _steer_dispatcher(dispatcher: Any, tables: BlockHeaderTensors) -> None:
    """Model Runner V1."""
    choose = dispatcher.dispatch

    def dispatch(*args: Any, invalid_modes: Any = None, **kwargs: Any) -> Any:
        if tables.has_branches:
            invalid_modes = {CUDAGraphMode.FULL, *(invalid_modes or ())}
        return choose(*args, invalid_modes=invalid_modes, **kwargs)

    dispatcher.dispatch = dispatch


def _steer_manager(manager: Any, tables: BlockHeaderTensors) -> None:
    """Model Runner V2."""
    choose, all_graphs = manager.dispatch, manager._candidates
    piecewise = {
        key: [graph for graph in graphs if graph.cg_mode is not CUDAGraphMode.FULL]
        for key, graphs in all_graphs.items()
    }

    def dispatch(*args: Any, **kwargs: Any) -> Any:
        manager._candidates = piecewise if tables.has_branches else all_graphs
        return choose(*args, **kwargs)

    manager.dispatch = dispatch
