"""The CUDA backend, as far as no GPU is needed.

vLLM's own forward runs here with its kernel replaced by plain torch, so that views of the cache,
lengths and padding are vLLM's. The second kernel is the reference, and under Triton's interpreter
the real one.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models.ernie45 import Ernie4_5ForCausalLM
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends import flash_attn as stock_flash_attn
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

from attention_kernels import Rotary
from tests.support.repository import ROOT
from vllm_parallel_think import configure
from vllm_parallel_think.attention import flash_attn, step_state
from vllm_parallel_think.attention.block_headers import BlockHeaderTensors
from vllm_parallel_think.attention.hogwild_rows import HogwildState
from vllm_parallel_think.core.errors import OptionError
from vllm_parallel_think.core.hogwild.cache_layout import Run
from vllm_parallel_think.scheduler_output import HogwildUpdate
from vllm_parallel_think.worker.cpu_worker import GroupCPUWorker
from vllm_parallel_think.worker.gpu_worker import GroupCUDAWorker
from vllm_parallel_think.worker.worker import GroupWorkerMixin, refuse_hookless

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="replaces vLLM's kernels")

BLOCK_SIZE, NUM_BLOCKS = 16, 12
NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 4, 2, 32
SCALE = HEAD_SIZE**-0.5
IN_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
PROVIDER = "triton" if IN_INTERPRETER else "torch"


@dataclass(frozen=True)
class RowCase:
    """One request of a batch: its blocks, its length with holes counted, and its new tokens."""

    blocks: tuple[int, ...]
    seq_len: int
    query_len: int


FILL = {4: 5, 6: 1, 9: 3}
ROWS = (
    RowCase((3, 4, 5), 2 * BLOCK_SIZE + 7, 1),  # decodes behind a prefix with a hole
    RowCase((1, 2), 21, 1),  # decodes, plain
    RowCase((3, 4, 6, 7, 8), 3 * BLOCK_SIZE + 20, 9),  # prefills behind two holes
    RowCase((10,), 13, 13),  # prefills, plain
    RowCase((3, 9), BLOCK_SIZE + 3, 1),  # its own last block is partly filled, which is no hole
)
CUT = [1, 21, 9, 13, 19]
NUM_TOKENS = sum(row.query_len for row in ROWS)
NUM_PADDED = NUM_TOKENS + 7


def common_metadata(device: str = "cpu") -> CommonAttentionMetadata:
    starts = torch.tensor([0, *(row.query_len for row in ROWS)]).cumsum(0).to(torch.int32)
    # What lies behind a row's own blocks in a block table is left over from earlier rows.
    table = torch.full((len(ROWS), 6), NUM_BLOCKS - 1, dtype=torch.int32)
    for index, row in enumerate(ROWS):
        table[index, : len(row.blocks)] = torch.tensor(row.blocks)
    seq_lens = torch.tensor([row.seq_len for row in ROWS], dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=seq_lens.to(device),
        num_reqs=len(ROWS),
        num_actual_tokens=NUM_TOKENS,
        max_query_len=max(row.query_len for row in ROWS),
        max_seq_len=max(row.seq_len for row in ROWS),
        block_table_tensor=table.to(device),
        slot_mapping=torch.zeros(NUM_PADDED, dtype=torch.int64, device=device),
    )


def dense_row(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: list[tuple[int, int]]
) -> torch.Tensor:
    """One token's attention [Hq, D] over slots (block, slot), in float64."""
    blocks, slots = torch.tensor(seen).T
    group = NUM_HEADS // NUM_KV_HEADS
    key = keys[blocks, slots].double().repeat_interleave(group, dim=1)
    value = values[blocks, slots].double().repeat_interleave(group, dim=1)
    weights = torch.einsum("hd,nhd->hn", query.double() * SCALE, key).softmax(dim=1)
    return torch.einsum("hn,nhd->hd", weights, value).float()


def oracle(query: torch.Tensor, cache: torch.Tensor, fill: dict[int, int]) -> torch.Tensor:
    """Attention of every token of the batch, slot by slot; holes are left out."""
    keys = cache[..., :HEAD_SIZE].transpose(1, 2)
    values = cache[..., HEAD_SIZE:].transpose(1, 2)
    expected = []
    for row in ROWS:
        for token in range(row.query_len):
            index = row.seq_len - row.query_len + token
            places = [(row.blocks[j // BLOCK_SIZE], j % BLOCK_SIZE) for j in range(index + 1)]
            own = row.blocks[-1]
            seen = [(b, s) for b, s in places if b == own or s < fill.get(b, BLOCK_SIZE)]
            expected.append(dense_row(query[len(expected)], keys, values, seen))
    return torch.stack(expected)


class FakeFlashAttention:
    """vLLM's kernel in plain torch, over the arguments vLLM's forward passes."""

    def __init__(self) -> None:
        self.seqused_k: list[int] = []

    def __call__(
        self,
        *,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        seqused_k: torch.Tensor,
        block_table: torch.Tensor,
        max_seqlen_k: int,
        softmax_scale: float,
        causal: bool,
        q_descale: torch.Tensor | None = None,
        k_descale: torch.Tensor | None = None,
        v_descale: torch.Tensor | None = None,
        **_: Any,
    ) -> None:
        if k.dtype == torch.float8_e4m3fn:
            assert q_descale is not None and k_descale is not None and v_descale is not None
            q = q.float() * q_descale[0, 0]
            k, v = k.float() * k_descale[0, 0], v.float() * v_descale[0, 0]
        assert causal and softmax_scale == SCALE
        self.seqused_k = seqused_k.tolist()
        assert max(self.seqused_k) <= max_seqlen_k
        starts = cu_seqlens_q.tolist()
        for row, length in enumerate(self.seqused_k):
            for token in range(starts[row], starts[row + 1]):
                visible = length - (starts[row + 1] - 1 - token)
                blocks = block_table[row].tolist()
                seen = [(blocks[j // BLOCK_SIZE], j % BLOCK_SIZE) for j in range(visible)]
                out[token] = dense_row(q[token], k, v, seen)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeFlashAttention:
    fake = FakeFlashAttention()
    monkeypatch.setattr(stock_flash_attn, "flash_attn_varlen_func", fake, raising=False)
    monkeypatch.setattr(flash_attn, "PROVIDER", PROVIDER)
    return fake


@pytest.fixture(scope="module")
def config(tiny_model: Path) -> Any:
    args = EngineArgs(str(tiny_model), dtype="float32", block_size=BLOCK_SIZE, max_model_len=256)
    return args.create_engine_config()


def make_spec(block_size: int = BLOCK_SIZE) -> FullAttentionSpec:
    return FullAttentionSpec(
        block_size=block_size,
        num_kv_heads=NUM_KV_HEADS,
        head_size=HEAD_SIZE,
        dtype=torch.float32,
    )


def make_builder(config: Any, block_size: int = BLOCK_SIZE) -> flash_attn.GroupFlashMetadataBuilder:
    builder_cls = flash_attn.GroupFlashBackend.get_builder_cls()
    return builder_cls(make_spec(block_size), [], config, torch.device("cpu"))


def make_impl(cls: type = flash_attn.GroupFlashImpl, **kwargs: Any) -> Any:
    arguments: dict[str, Any] = {
        "num_heads": NUM_HEADS,
        "head_size": HEAD_SIZE,
        "scale": SCALE,
        "num_kv_heads": NUM_KV_HEADS,
        "alibi_slopes": None,
        "sliding_window": None,
        "kv_cache_dtype": "auto",
    }
    impl = cls(**{**arguments, **kwargs})
    impl.vllm_flash_attn_version = 2  # as found on a GPU
    return impl


@pytest.fixture
def headers() -> BlockHeaderTensors:
    return publish("cpu")


def publish(device: str) -> BlockHeaderTensors:
    made = BlockHeaderTensors(NUM_BLOCKS, BLOCK_SIZE, torch.device(device))
    if device == "cpu":
        for block, fill in FILL.items():
            made.fill[block] = fill
        # A block that is being filled has no hole yet.
        made.fill[9] = BLOCK_SIZE
    made.has_holes = True
    step_state.enter(made)
    return made


def make_cache(layout: str) -> torch.Tensor:
    """[num_blocks, Hkv, block_size, 2 * D] in a memory layout, NaN where nothing was written."""
    shape = (NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)
    if layout == "NHD":
        shape = (shape[0], shape[2], shape[1], shape[3])
    cache = torch.randn(shape)
    cache = cache.transpose(1, 2) if layout == "NHD" else cache
    for block, fill in FILL.items():
        cache[block, :, fill:] = torch.nan
    cache[NUM_BLOCKS - 1] = torch.nan
    return cache


def forward(impl: Any, metadata: Any, query: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    ones = torch.ones(1)
    layer = SimpleNamespace(_q_scale=ones, _k_scale=ones, _v_scale=ones)
    output = torch.full((NUM_PADDED, NUM_HEADS, HEAD_SIZE), 7.0)
    unused = query[:, :NUM_KV_HEADS]
    result = impl.forward(layer, query, unused, unused, cache, metadata, output)
    assert result is output
    return output


def make_query() -> torch.Tensor:
    query = torch.randn(NUM_PADDED, NUM_HEADS, HEAD_SIZE)
    query[NUM_TOKENS:] = torch.nan
    return query


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_forward_equals_dense_attention(
    layout: str, config: Any, headers: BlockHeaderTensors, kernel: FakeFlashAttention
) -> None:
    torch.manual_seed(0)
    query, cache = make_query(), make_cache(layout)
    metadata = make_builder(config).build(0, common_metadata())
    output = forward(make_impl(), metadata, query, cache)
    torch.testing.assert_close(
        output[:NUM_TOKENS], oracle(query, cache, FILL), rtol=1e-5, atol=1e-5
    )
    assert (output[NUM_TOKENS:] == 7.0).all(), "padding was written"
    assert kernel.seqused_k == CUT


def test_workers_rows_turn_for_what_others_wrote(
    config: Any, headers: BlockHeaderTensors, kernel: FakeFlashAttention
) -> None:
    """Row 1 is a worker: it sees the prompt in block 3, a finished step in block 5, its own."""
    torch.manual_seed(0)
    rotary = Rotary(torch.logspace(0, -3, HEAD_SIZE // 2).double(), HEAD_SIZE, True)
    teams = HogwildState(BLOCK_SIZE, rotary, lambda _: [f"r{i}" for i in range(len(ROWS))])
    row = ROWS[1]
    new = SimpleNamespace(
        req_id="r1", block_ids=(list(row.blocks),), num_computed_tokens=row.seq_len - 1
    )
    cached = SimpleNamespace(
        req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set()
    )
    output: Any = SimpleNamespace(
        scheduled_new_reqs=[new], scheduled_cached_reqs=cached, num_scheduled_tokens={"r1": 1}
    )
    seen = (Run((3,), 16), Run((5,), 7, role=1))
    teams.apply(
        output, [HogwildUpdate("t", "combined", seen[0], history=seen[1:], live=((0, "r1"),))]
    )
    headers.hogwild = teams
    query, cache = make_query(), make_cache("NHD")
    got = forward(make_impl(), make_builder(config).build(0, common_metadata()), query, cache)
    expected = oracle(query, cache, FILL)
    keys = cache[..., :HEAD_SIZE].transpose(1, 2)
    values = cache[..., HEAD_SIZE:].transpose(1, 2)
    scores, found = [], []
    for blocks, length, shift in (((3,), 16, 23), ((5,), 7, 7), (row.blocks, row.seq_len, 0)):
        cos, sin = rotary.tables(torch.tensor(shift))
        turned = rotary.rotate(query[1], cos, sin).double()
        key = torch.cat([keys[b] for b in blocks])[:length].double().repeat_interleave(2, dim=1)
        scores.append(torch.einsum("hd,nhd->hn", turned * SCALE, key))
        found.append(torch.cat([values[b] for b in blocks])[:length].double())
    value = torch.cat(found).repeat_interleave(2, dim=1)
    weights = torch.cat(scores, dim=1).softmax(dim=1)
    expected[1] = torch.einsum("hn,nhd->hd", weights, value).float()
    torch.testing.assert_close(got[:NUM_TOKENS], expected, rtol=1e-5, atol=1e-5)
    assert kernel.seqused_k == [CUT[0], 1, *CUT[2:]]


def test_fp8_caches(
    config: Any,
    headers: BlockHeaderTensors,
    kernel: FakeFlashAttention,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows of the plan are as exact as the stock kernel's: both read the same fp8 numbers."""
    torch.manual_seed(0)
    for name in ("flash_attn_supports_kv_cache_dtype", "flash_attn_supports_quant_query_input"):
        monkeypatch.setattr(stock_flash_attn, name, lambda *_, **__: True)
    scales = {"_q_scale": 0.5, "_k_scale": 1.7, "_v_scale": 0.3}
    stored = make_cache("NHD").to(torch.float8_e4m3fn)
    quantized = make_query().to(torch.float8_e4m3fn)
    layer = SimpleNamespace(**{name: torch.tensor(scale) for name, scale in scales.items()})
    output = torch.full((NUM_PADDED, NUM_HEADS, HEAD_SIZE), 7.0)
    impl = make_impl(kv_cache_dtype="fp8")
    metadata = make_builder(config).build(0, common_metadata())
    none = quantized[:, :NUM_KV_HEADS]
    impl.forward(layer, quantized, none, none, stored.view(torch.uint8), metadata, output)
    exact = stored.float()
    exact[..., :HEAD_SIZE] *= 1.7
    exact[..., HEAD_SIZE:] *= 0.3
    expected = oracle(quantized.float() * 0.5, exact, FILL)
    torch.testing.assert_close(output[:NUM_TOKENS], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.timeout(600)
@pytest.mark.skipif(IN_INTERPRETER, reason="this is the process it starts")
def test_forward_with_the_triton_kernel() -> None:
    """Triton's interpreter has to be turned on before Triton is imported."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        + ["-k", "test_forward_equals or test_fp8"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert re.search(r"3 passed", result.stdout), result.stdout[-500:]


def test_batches_without_branches_are_stock(
    config: Any,
    headers: BlockHeaderTensors,
    kernel: FakeFlashAttention,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """INV-1: the stock metadata, the stock lengths, and not one call of the second kernel."""
    headers.has_holes = False
    common = common_metadata()
    metadata = make_builder(config).build(0, common)
    assert type(metadata) is stock_flash_attn.FlashAttentionMetadata
    assert metadata.seq_lens is common.seq_lens
    monkeypatch.setattr(flash_attn, "segmented_attention", None)
    query, cache = make_query(), make_cache("NHD").nan_to_num()
    ours = forward(make_impl(), metadata, query, cache)
    stock = forward(make_impl(stock_flash_attn.FlashAttentionImpl), metadata, query, cache)
    assert torch.equal(ours, stock)


def test_profiling_runs_have_no_metadata(config: Any, headers: BlockHeaderTensors) -> None:
    output = forward(make_impl(), None, make_query(), make_cache("NHD"))
    assert (output == 0).all()


def test_flash_attention_3_schedules_by_the_cut_lengths(
    config: Any, headers: BlockHeaderTensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A schedule made for other lengths than the kernel gets would read out of bounds."""
    asked: dict[str, Any] = {}

    def get_scheduler_metadata(**kwargs: Any) -> torch.Tensor:
        asked.update(kwargs)
        return torch.zeros(1, dtype=torch.int32)

    name = "get_scheduler_metadata"
    monkeypatch.setattr(stock_flash_attn, name, get_scheduler_metadata, raising=False)
    builder = make_builder(config)
    builder.aot_schedule = True
    metadata = builder.build(0, common_metadata())
    assert asked["cache_seqlens"] is metadata.seq_lens
    assert metadata.seq_lens.tolist() == CUT
    assert metadata.scheduler_metadata is not None


def test_planning_never_waits_for_the_device(config: Any) -> None:
    """Tensors on the `meta` device have no values: reading one raises."""
    made = publish("meta")
    common = common_metadata("meta")
    metadata = make_builder(config).build(0, common)
    assert isinstance(metadata, flash_attn.GroupFlashMetadata) and metadata.plan is not None
    assert metadata.plan.row_mask is not None and metadata.plan.row_mask.is_meta
    made.move_positions(
        torch.empty(NUM_PADDED, dtype=torch.int64, device="meta"), common.slot_mapping
    )
    with pytest.raises((RuntimeError, NotImplementedError)):
        common.seq_lens.max().item()


def test_full_graphs_are_declared_as_the_stock_backend_declares_them(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = stock_flash_attn.FlashAttentionMetadataBuilder
    builder_cls = flash_attn.GroupFlashBackend.get_builder_cls()
    support = builder_cls.get_cudagraph_support(config, make_spec())
    assert support is stock.get_cudagraph_support(config, make_spec())
    assert support.value >= AttentionCGSupport.UNIFORM_BATCH.value
    monkeypatch.setattr(config.parallel_config, "data_parallel_size", 2)
    assert builder_cls.get_cudagraph_support(config, make_spec()) is AttentionCGSupport.NEVER


def test_a_graph_is_captured_without_a_plan(config: Any, headers: BlockHeaderTensors) -> None:
    assert headers.has_branches
    metadata = make_builder(config).build_for_cudagraph_capture(common_metadata())
    assert type(metadata) is stock_flash_attn.FlashAttentionMetadata


def test_wiring() -> None:
    (path,) = GroupCUDAWorker.backends.values()
    backend = resolve_obj_by_qualname(path)
    assert list(GroupCUDAWorker.backends) == [AttentionBackendEnum.FLASH_ATTN]
    assert backend is flash_attn.GroupFlashBackend
    assert backend.get_impl_cls() is flash_attn.GroupFlashImpl
    assert backend.get_builder_cls() is flash_attn.GroupFlashMetadataBuilder
    assert backend.get_name() == "FLASH_ATTN"
    # vLLM finds the class again by this name.
    assert resolve_obj_by_qualname(".".join(backend.full_cls_name())) is backend
    assert issubclass(GroupCUDAWorker, Worker)
    assert not flash_attn.GroupFlashMetadataBuilder.supports_update_block_table


OVERRIDES = [
    (flash_attn.GroupFlashMetadataBuilder, flash_attn.FlashAttentionMetadataBuilder),
    (flash_attn.GroupFlashImpl, flash_attn.FlashAttentionImpl),
    (flash_attn.GroupFlashBackend, flash_attn.FlashAttentionBackend),
    (GroupWorkerMixin, Worker),
    (GroupWorkerMixin, CPUWorker),
]


@pytest.mark.parametrize(("ours", "base"), OVERRIDES)
def test_overrides_take_what_vllm_passes(ours: type, base: type) -> None:
    """A changed signature in vLLM must fail here and not in the middle of a step."""
    names = [name for name, value in vars(ours).items() if is_override(name, value)]
    assert names
    for name in names:
        theirs = list(inspect.signature(getattr(base, name)).parameters.values())
        mine = list(inspect.signature(getattr(ours, name)).parameters.values())
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in mine):
            continue
        assert [(p.name, p.kind, p.default) for p in mine] == [
            (p.name, p.kind, p.default) for p in theirs
        ], name


def is_override(name: str, value: Any) -> bool:
    return not name.startswith("_") and isinstance(
        value,
        Callable | classmethod | staticmethod,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"logits_soft_cap": 30.0}, "soft-capping"),
        ({"sliding_window": 128}, "sliding window"),
        ({"alibi_slopes": [1.0] * NUM_HEADS}, "ALiBi"),
        ({"attn_type": "encoder_only"}, "encoder_only attention"),
    ],
)
def test_layers_that_are_refused(
    kwargs: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        stock_flash_attn, "flash_attn_supports_kv_cache_dtype", lambda *_, **__: True
    )
    with pytest.raises(NotImplementedError, match=reason):
        make_impl(**kwargs)


def test_settings_that_are_refused(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotImplementedError, match=r"kernel blocks of 32 .* KV blocks of 16"):
        make_builder(config, block_size=32)
    with monkeypatch.context() as patch:
        patch.setattr(stock_flash_attn, "get_dcp_world_size_and_rank", lambda *_: (2, 0))
        with pytest.raises(NotImplementedError, match="decode context parallelism"):
            make_builder(config)
    monkeypatch.setattr(config.model_config, "is_mm_prefix_lm", True)
    with pytest.raises(NotImplementedError, match="bidirectional"):
        make_builder(config)


def attention_config(backend: Any = None, **per_kind: Any) -> Any:
    attention = SimpleNamespace(backend=backend, backend_per_kind=per_kind)
    return SimpleNamespace(attention_config=attention)


def test_flash_attention_is_chosen_unless_another_one_is_named() -> None:
    """vLLM prefers FlashInfer on Blackwell, which knows nothing of holes."""
    config = attention_config()
    for _ in range(2):  # vLLM runs its configuration again in the engine
        configure.set_attention_backend(config)
        assert config.attention_config.backend is AttentionBackendEnum.FLASH_ATTN
    for other in (
        attention_config(AttentionBackendEnum.FLASHINFER),
        attention_config(full_attention=AttentionBackendEnum.FLASHINFER),
    ):
        with pytest.raises(OptionError, match="--attention-backend FLASHINFER"):
            configure.set_attention_backend(other)


def test_a_model_without_hooks_is_refused() -> None:
    """vLLM calls a class it compiles as a whole around the hook that sets positions."""
    refuse_hookless(LlamaForCausalLM.__new__(LlamaForCausalLM))
    with pytest.raises(NotImplementedError, match="Ernie4_5ForCausalLM"):
        refuse_hookless(Ernie4_5ForCausalLM.__new__(Ernie4_5ForCausalLM))


def make_worker(cls: type = GroupCPUWorker) -> Any:
    worker = cls.__new__(cls)
    worker._tables = BlockHeaderTensors(1, BLOCK_SIZE, torch.device("cpu"))
    worker._tables.has_holes = True
    return worker


def test_a_dummy_batch_holds_no_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = make_worker()
    seen = []
    monkeypatch.setattr(
        Worker, "execute_dummy_batch", lambda self: seen.append(self._tables.has_branches)
    )
    worker.execute_dummy_batch()
    assert seen == [False]


@pytest.mark.parametrize(
    ("backend", "num_groups", "reason"),
    [
        (flash_attn.FlashAttentionBackend, 1, r"attention of layers\.0 \(FLASH_ATTN\)"),
        (flash_attn.GroupFlashBackend, 2, "several groups"),
        (flash_attn.GroupFlashBackend, 1, None),
    ],
)
def test_layers_with_another_backend_are_refused(
    backend: Any, num_groups: int, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model can pick a backend of its own for a layer, past all settings."""
    worker = make_worker(GroupCUDAWorker)
    monkeypatch.setattr(
        AttentionBackendEnum, "get_class", lambda self: flash_attn.GroupFlashBackend
    )
    group = SimpleNamespace(backend=backend, layer_names=["layers.0"])
    worker.model_runner = SimpleNamespace(attn_groups=[[group]])
    kv_cache_config = SimpleNamespace(kv_cache_groups=[None] * num_groups)
    if reason is None:
        worker._refuse_foreign_attention(kv_cache_config)
        return
    with pytest.raises(NotImplementedError, match=reason):
        worker._refuse_foreign_attention(kv_cache_config)
