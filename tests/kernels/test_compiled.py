"""The Triton kernels compiled for GPUs that are not there, down to machine code.

What they ask of a multiprocessor is known then: too much shared memory is a kernel that cannot
start, registers that spill and loads that wait for one another are a slow one.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from segment_cases import Case, Memory, make_rotary
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attention_kernels import Row, SegmentPlan, triton_kernel, triton_spans
from attention_kernels.base import KVScales, Problem, Rotation

pytestmark = pytest.mark.skipif(
    "nvidia" not in triton.backends.backends, reason="this Triton cannot compile for NVIDIA's GPUs"
)
# Per block, compute capabilities 8.6 and 8.9: CUDA C++ Programming Guide, technical specifications.
SHARED_BYTES = 99 << 10
TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv", torch.int32: "i32",
}  # fmt: skip
FLOATS = "sums tops totals lse cos sin key_scale value_scale"
INTS = (
    "place_row place_tile num_entries_of query_start query_len blocks first count bound "
    "shift_index visible_index visible_offset visible_limit"
)
UNIT_STRIDES = ("query_dim", "key_dim", "value_dim", "out_dim")
LONG_STRIDES = ("key_block", "value_block")  # of caches beyond 2 ** 31 elements
STRIDE = re.compile("(query|key|value|out)_(token|block|slot|head)")


@dataclass(frozen=True)
class Usage:
    """What one thread and one program take."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    async_bytes: frozenset[int]  # widths of the copies into shared memory


def siblings(
    *, dtype: torch.dtype, dim: int, group: int, block_size: int, query_len: int = 1,
    shift: int = 0, width: int = 8,
) -> Problem:  # fmt: skip
    """Rows over one prefix, laid out as vLLM's GPU cache is: keys and values of a slot together."""
    memory = Memory(600 * 16 // block_size, block_size)
    prefix = replace(memory.segment(4096), shift=shift)
    rows = [Row(query_len, (prefix, memory.segment(200))) for _ in range(width)]
    shape = (*memory.written.shape, 2, 2 * dim)
    keys, values = torch.zeros(shape, dtype=dtype).chunk(2, dim=-1)
    query = torch.zeros(width * query_len, 2 * group, dim, dtype=dtype)
    case = Case(query, keys, values, tuple(rows))
    rotation, plan = None, SegmentPlan.build(rows, block_size)
    if plan.shifts is not None:
        rotary = make_rotary(dim)
        rotation = Rotation(rotary, *rotary.tables(plan.shifts.values))
    lse = torch.zeros(query.shape[:2])
    return Problem(query, keys, values, plan, case.scale, rotation, query.clone(), lse)


def usage(
    kernel: Any, problem: Problem, constants: dict[str, Any], options: dict[str, int],
    capability: int,
) -> Usage:  # fmt: skip
    """Compiles as a call with this problem's tensors would, whose pointers and strides align."""
    names = kernel.arg_names
    constants = constants | dict.fromkeys(UNIT_STRIDES, 1) | {"HAS_MASK": True}
    constants = {name: value for name, value in constants.items() if name in names}
    pointers = {"query": problem.query, "out": problem.out, "key": problem.key_cache}
    kinds = {name: "*" + TYPES[tensor.dtype] for name, tensor in pointers.items()}
    kinds |= {"value": kinds["key"], "row_mask": "*u8", "scale_log2": "fp32"}
    kinds |= dict.fromkeys(FLOATS.split(), "*fp32") | dict.fromkeys(INTS.split(), "*i32")
    kinds |= dict.fromkeys(LONG_STRIDES, "i64")
    signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name].startswith("*") or (STRIDE.fullmatch(name) and name not in constants)
    }
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, places, aligned)
    return read_usage(
        triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    )


def read_usage(compiled: Any) -> Usage:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found, report
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global .*?, (0x[0-9a-f]+|\d+)",
                        compiled.asm["ptx"])  # fmt: skip
    return Usage(
        int(found[1]), int(found[2]), compiled.metadata.shared, frozenset(int(b, 0) for b in copies)
    )


def usages(problem: Problem, capability: int) -> dict[str, Usage]:
    """Of the launches that a call with this problem makes."""
    constants, found = triton_kernel._constants(problem, widen=False), {}
    cut = triton_spans.choose(problem)
    assert cut is not None
    for _, _, lines, (num_stages, num_warps) in triton_spans.widths(problem.plan, cut):
        found[f"span of {lines} lines"] = usage(
            triton_spans._span_kernel, problem,
            constants | {"BLOCK_M": lines, "LINES": cut.lines},
            {"num_stages": num_stages, "num_warps": num_warps}, capability,
        )  # fmt: skip
    merged = {"LINES": cut.lines, "AT_ONCE": triton_spans.MERGED_AT_ONCE}
    found["merge"] = usage(triton_spans._merge_kernel, problem, constants | merged, {}, capability)
    lines = triton_kernel.num_lines(problem, constants)
    tile = {"BLOCK_M": lines, "BLOCK_Q": lines // constants["GROUP"]}
    tile |= {"BLOCK_SIZE": problem.plan.block_size}
    found[f"long, {lines} lines"] = usage(
        triton_kernel._kernel, problem, constants | tile, {}, capability
    )
    return found


def check(found: dict[str, Usage]) -> None:
    for name, used in found.items():
        assert used.shared_bytes <= SHARED_BYTES, (name, used)
        assert used.spilled_bytes <= 256, (name, used)
        if name != "merge":
            assert 16 in used.async_bytes, f"{name}: keys and values are not fetched ahead"


@pytest.mark.parametrize("shift", [0, 5])
def test_hopper(shift: int) -> None:
    problem = siblings(dtype=torch.bfloat16, dim=128, group=7, block_size=16, shift=shift)
    check(usages(problem, 90))


def test_fp8_cache_on_hopper() -> None:
    problem = siblings(dtype=torch.bfloat16, dim=128, group=7, block_size=16)
    cache, one = problem.key_cache.to(torch.float8_e4m3fn), torch.ones(1)
    check(usages(replace(problem, key_cache=cache, scales=KVScales(one, one)), 90))


def test_one_launch_where_nothing_can_be_shared() -> None:
    alone = siblings(dtype=torch.bfloat16, dim=128, group=7, block_size=16, width=1)
    cut = triton_spans.choose(alone)
    assert cut is not None and [w[:3] for w in triton_spans.widths(alone.plan, cut)] == [(1, 2, 16)]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90, 100])
@pytest.mark.parametrize("shift", [0, 5])
@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_shapes(
    dtype: torch.dtype, dim: int, block_size: int, shift: int, capability: int
) -> None:
    problem = siblings(
        dtype=dtype, dim=dim, group=7, block_size=block_size, shift=shift, query_len=20
    )
    check(usages(problem, capability))
