"""Full CUDA graphs for batches without branches, piecewise ones for batches with them.

A full graph replays attention as it was captured, without branches, and Model Runner V2 replays it
without calling the model, so that no hook sets positions. Steps that hold branches therefore take
the graphs between the attention layers; all others take what vLLM would take. Both runners, and
their draft models, choose a graph by ``dispatch`` of an object that they hold.
"""

from __future__ import annotations

from typing import Any

from vllm.config import CUDAGraphMode
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

from ..attention.block_headers import BlockHeaderTensors
from ..compat import patches
from ..compat.patching import Make
from .model_runner import ModelRunner


def keep_branches_out_of_full_graphs(runner: ModelRunner, tables: BlockHeaderTensors) -> None:
    """Make a runner that has its graph managers choose by what the current batch holds.

    Raises:
        RuntimeError: The runner has none; its full graphs would attend to holes.

    """
    managers = runner.graph_managers
    if not managers:
        raise RuntimeError(f"{type(runner.stock).__name__} has no CUDA graph manager to steer")
    for manager in managers:
        if isinstance(manager, CudagraphDispatcher):
            patches.GRAPHS_V1.apply(manager, _steered_dispatcher(tables))
        else:
            patches.GRAPHS_V2.apply(manager, _steered_manager(manager, tables))


def _steered_dispatcher(tables: BlockHeaderTensors) -> Make:
    def make(choose: Any) -> Any:
        def dispatch(*args: Any, invalid_modes: Any = None, **kwargs: Any) -> Any:
            if tables.has_branches:
                invalid_modes = {CUDAGraphMode.FULL, *(invalid_modes or ())}
            return choose(*args, invalid_modes=invalid_modes, **kwargs)

        return dispatch

    return make


def _steered_manager(manager: Any, tables: BlockHeaderTensors) -> Make:
    all_graphs = manager._candidates
    piecewise = {
        key: [graph for graph in graphs if graph.cg_mode is not CUDAGraphMode.FULL]
        for key, graphs in all_graphs.items()
    }

    def make(choose: Any) -> Any:
        def dispatch(*args: Any, **kwargs: Any) -> Any:
            manager._candidates = piecewise if tables.has_branches else all_graphs
            return choose(*args, **kwargs)

        return dispatch

    return make
