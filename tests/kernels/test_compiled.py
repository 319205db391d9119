"""The Triton kernels compiled for GPUs that are not there, down to machine code.

What they ask of a multiprocessor is known then: too much shared memory is a kernel that cannot
start, registers that spill and loads that wait for one another are a slow one.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attention_kernels import Row, SegmentPlan
from attention_kernels.provider import KVScales, Problem, Rotation
from attention_kernels.triton import rows, shared_spans
from attention_kernels.triton.tile import MIN_EDGE, tile_edge
from tests.support.segment_cases import Memory, make_rotary

pytestmark = pytest.mark.skipif(
    "nvidia" not in triton.backends.backends, reason="this Triton cannot compile for NVIDIA's GPUs"
)
# Per block, compute capabilities 8.6 and 8.9: CUDA C++ Programming Guide, technical specifications.
SHARED_BYTES = 99 << 10
TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv", torch.int32: "*i32", torch.uint8: "*u8",
}  # fmt: skip
LONG_STRIDES = ("key_block", "value_block")  # of caches beyond 2 ** 31 elements
OPTIONS = ("num_stages", "num_warps")


@dataclass(frozen=True)
class Usage:
    """What one thread and one program take."""

    name: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    async_bytes: frozenset[int]  # widths of the copies into shared memory


Usages = Callable[[Problem, int], list[Usage]]


def siblings(
    *, dtype: torch.dtype, dim: int, group: int, block_size: int, query_len: int = 1,
    width: int = 8, **prefix: Any,
) -> Problem:  # fmt: skip
    """Rows over one prefix, laid out as vLLM's GPU cache is: keys and values of a slot together."""
    memory = Memory(600 * 16 // block_size, block_size)
    shared = replace(memory.segment(4096), **prefix)
    rows = [Row(query_len, (shared, memory.segment(200))) for _ in range(width)]
    shape = (*memory.written.shape, 2, 2 * dim)
    keys, values = torch.zeros(shape, dtype=dtype).chunk(2, dim=-1)
    query = torch.zeros(width * query_len, 2 * group, dim, dtype=dtype)
    # As in the plugin, whose plans compute some rows of a batch.
    mask = torch.ones(width, dtype=torch.bool)
    rotation, plan = None, replace(SegmentPlan.build(rows, block_size), row_mask=mask)
    if plan.shifts is not None:
        rotary = make_rotary(dim)
        rotation = Rotation(rotary, *rotary.tables(plan.shifts.values))
    lse = torch.zeros(query.shape[:2])
    return Problem(query, keys, values, plan, dim**-0.5, rotation, query.clone(), lse)


class Recorder:
    """Takes a kernel's place and keeps the arguments of its launches."""

    def __init__(self, kernel: Any, launches: list[tuple[Any, dict[str, Any]]]) -> None:
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **constants: Any) -> None:
            named = dict(zip(self._kernel.arg_names, args, strict=False))
            self._launches.append((self._kernel, named | constants))

        return launch


@pytest.fixture
def usages(monkeypatch: pytest.MonkeyPatch) -> Usages:
    """Compiles what a call with a problem launches."""
    launches: list[tuple[Any, dict[str, Any]]] = []
    for module, name in (
        (shared_spans, "_span_kernel"), (shared_spans, "_merge_kernel"), (rows, "_kernel"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, Recorder(getattr(module, name), launches))

    def compiled(problem: Problem, capability: int) -> list[Usage]:
        launches.clear()
        rows.attend(problem)
        return [usage(kernel, arguments, capability) for kernel, arguments in launches]

    return compiled


def usage(kernel: Any, arguments: dict[str, Any], capability: int) -> Usage:
    """Compiles for these arguments, specialised as Triton does: ones, and multiples of 16."""
    options = {name: arguments.pop(name) for name in OPTIONS if name in arguments}
    names, signature, constants, aligned = kernel.arg_names, {}, {}, {}
    for place, (name, param) in enumerate(zip(names, kernel.params, strict=True)):
        value = arguments.pop(name)
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
        elif param.is_constexpr or (value == 1 and isinstance(value, int)):
            signature[name], constants[(place,)] = "constexpr", value
            continue
        elif isinstance(value, float):
            signature[name] = "fp32"
            continue
        else:
            signature[name] = "i64" if name in LONG_STRIDES else "i32"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            aligned[(place,)] = [["tt.divisibility", 16]]
    assert not arguments, f"{kernel.__name__} has no {list(arguments)}"
    source, target = ASTSource(kernel, signature, constants, aligned), ("cuda", capability, 32)
    compiled = triton.compile(source, target=GPUTarget(*target), options=options)
    return read_usage(f"{kernel.__name__} {constants}", compiled)


def read_usage(name: str, compiled: Any) -> Usage:
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
    widths = frozenset(int(width, 0) for width in copies)
    return Usage(name, int(found[1]), int(found[2]), compiled.metadata.shared, widths)


def check(found: list[Usage], num_launches: int) -> None:
    assert len(found) == num_launches, found
    for used in found:
        assert used.shared_bytes <= SHARED_BYTES, used
        assert used.spilled_bytes <= 256, used
        if not used.name.startswith("_merge"):
            assert 16 in used.async_bytes, f"keys and values are not fetched ahead: {used}"


@pytest.mark.parametrize("prefix", [{}, {"shift": 5}, {"visible": (4000,)}])
def test_hopper(usages: Usages, prefix: dict[str, Any]) -> None:
    problem = siblings(dtype=torch.bfloat16, dim=128, group=7, block_size=16, **prefix)
    check(usages(problem, 90), num_launches=3)


def test_fp8_cache_on_hopper(usages: Usages) -> None:
    problem = siblings(dtype=torch.bfloat16, dim=128, group=7, block_size=16)
    keys, values = (t.to(torch.float8_e4m3fn) for t in (problem.key_cache, problem.value_cache))
    scales = KVScales(torch.ones(2), torch.ones(2))
    problem = replace(problem, key_cache=keys, value_cache=values, scales=scales)
    check(usages(problem, 90), num_launches=3)


def test_a_row_alone_takes_one_launch_less(usages: Usages) -> None:
    alone = siblings(dtype=torch.bfloat16, dim=128, group=7, block_size=16, width=1)
    check(usages(alone, 90), num_launches=2)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90, 100])
@pytest.mark.parametrize("visible", [False, True])
@pytest.mark.parametrize("shift", [0, 5])
@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_shapes(
    usages: Usages, dtype: torch.dtype, dim: int, block_size: int, shift: int, visible: bool,
    capability: int,
) -> None:  # fmt: skip
    seen = tuple(range(4000, 4020)) if visible else None
    problem = siblings(
        dtype=dtype, dim=dim, group=7, block_size=block_size, query_len=20, shift=shift,
        visible=seen,
    )  # fmt: skip
    # Two tokens of seven heads fill a narrow tile: a wider one is for more rows.
    check(usages(problem, capability), num_launches=4 if tile_edge(problem) > MIN_EDGE else 3)
