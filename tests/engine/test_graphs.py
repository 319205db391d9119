"""Which CUDA graph a step takes: vLLM's own choice without branches, never a full one with them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
from vllm.v1.worker.gpu import cudagraph_utils

from vllm_parallel_think.attention.block_headers import BlockHeaderTensors
from vllm_parallel_think.worker.cudagraph import keep_branches_out_of_full_graphs
from vllm_parallel_think.worker.model_runner import model_runner

SIZES = [1, 2, 4, 8]
FULL, PIECEWISE, NONE = CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE, CUDAGraphMode.NONE
MODES = {
    CUDAGraphMode.FULL_AND_PIECEWISE: PIECEWISE,
    CUDAGraphMode.PIECEWISE: PIECEWISE,
    CUDAGraphMode.FULL_DECODE_ONLY: NONE,
    CUDAGraphMode.FULL: NONE,
}
"""What a step with branches takes under each of vLLM's settings."""


@pytest.fixture
def config(tiny_model: Path) -> Any:
    args = EngineArgs(str(tiny_model), dtype="float32", max_num_seqs=8, max_model_len=256)
    made = args.create_engine_config()
    made.compilation_config = CompilationConfig(
        mode=CompilationMode.VLLM_COMPILE, cudagraph_capture_sizes=SIZES
    )
    made.compilation_config.max_cudagraph_capture_size = SIZES[-1]
    made.compilation_config.post_init_cudagraph_sizes()
    made.compilation_config.set_splitting_ops_for_v1(all2all_backend="allgather_reducescatter")
    return made


@pytest.fixture
def tables() -> BlockHeaderTensors:
    return BlockHeaderTensors(4, 16, torch.device("cpu"))


@pytest.mark.parametrize("mode", MODES)
def test_model_runner_v1(config: Any, tables: BlockHeaderTensors, mode: CUDAGraphMode) -> None:
    config.compilation_config.cudagraph_mode = mode
    stock, ours = CudagraphDispatcher(config), CudagraphDispatcher(config)
    for dispatcher in (stock, ours):
        dispatcher.initialize_cudagraph_keys(mode)
    runner = model_runner(SimpleNamespace(cudagraph_dispatcher=ours))
    for _ in range(2):  # a worker may set its cache up again
        keep_branches_out_of_full_graphs(runner, tables)
    for uniform in (True, False):
        for num_tokens in (1, 3, 8, 9):
            asked = {"num_tokens": num_tokens, "uniform_decode": uniform}
            assert ours.dispatch(**asked) == stock.dispatch(**asked)
            tables.has_holes = True
            chosen, batch = ours.dispatch(**asked)
            tables.has_holes = False
            assert chosen is (MODES[mode] if num_tokens <= SIZES[-1] else NONE)
            assert batch.num_tokens >= num_tokens
    assert (stock.dispatch(3, uniform_decode=True)[0] is FULL) == mode.has_full_cudagraphs()


@pytest.mark.parametrize("mode", MODES)
def test_model_runner_v2(
    config: Any, tables: BlockHeaderTensors, mode: CUDAGraphMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: rank)
    pool = SimpleNamespace(get_global_graph_pool=lambda: None)
    monkeypatch.setattr(cudagraph_utils, "current_platform", pool)

    def make() -> Any:
        manager = cudagraph_utils.CudaGraphManager(config, torch.device("cpu"), mode, 1)
        manager._graphs_captured = True  # nothing is replayed here
        return manager

    stock, ours, drafts = make(), make(), make()
    speculator = SimpleNamespace(decode_cudagraph_manager=drafts)
    runner = SimpleNamespace(req_states=None, cudagraph_manager=ours, speculator=speculator)
    keep_branches_out_of_full_graphs(model_runner(runner), tables)
    for uniform in (1, None):
        for num_tokens in (1, 3, 8, 9):
            asked = (num_tokens, num_tokens, uniform, 0)
            for manager in (ours, drafts):
                assert manager.dispatch(*asked) == stock.dispatch(*asked)
                tables.has_holes = True
                chosen = manager.dispatch(*asked)
                tables.has_holes = False
                assert chosen.cg_mode is (MODES[mode] if num_tokens <= SIZES[-1] else NONE)
                assert chosen.num_tokens >= num_tokens
    assert (stock.dispatch(3, 3, 1, 0).cg_mode is FULL) == mode.has_full_cudagraphs()


def test_a_runner_without_managers_is_refused(tables: BlockHeaderTensors) -> None:
    with pytest.raises(RuntimeError, match="no CUDA graph manager"):
        keep_branches_out_of_full_graphs(model_runner(SimpleNamespace()), tables)
