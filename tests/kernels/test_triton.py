"""Without a GPU, the Triton kernels run in the interpreter, which a process of its own turns on.

They are also compiled for a GPU that is not there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attention_kernels import triton_kernel, triton_spans


@pytest.mark.timeout(600)
@pytest.mark.skipif(torch.cuda.is_available(), reason="test_attention.py runs it on the GPU")
def test_triton_in_its_interpreter() -> None:
    here = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
        + ["test_attention.py", "test_sharing.py"],
        cwd=here,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(here.parents[1])},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed[1]) > 80 and "skipped" not in result.stdout, result.stdout[-500:]


CONSTANTS = {
    "NUM_KV_HEADS": 4, "GROUP": 7, "HEAD_DIM": 128, "DIM": 128, "BLOCK_SIZE": 16, "SLOTS": 16,
    "ENTRIES": 4, "BLOCK_M": 64, "BLOCK_Q": 9, "LINES": 7, "HALF": 64, "NEOX": True,
    "AT_ONCE": triton_spans.MERGED_AT_ONCE, "HAS_MASK": True, "HAS_SHIFT": False,
    "HAS_VISIBLE": False, "WIDEN": False, "HAS_SCALE": False,
}  # fmt: skip
SHIFTED = {"HAS_SHIFT": True, "ENTRIES": 1, "HAS_VISIBLE": True}
POINTERS = {
    "*bf16": "query key value out",
    "*fp32": "sums tops totals lse cos sin key_scale value_scale",
    "*u8": "row_mask",
    "*i32": "place_row place_tile num_entries_of query_start query_len blocks first count bound "
    "shift_index visible_index visible_offset visible_limit",
}


@pytest.mark.skipif("nvidia" not in triton.backends.backends, reason="Triton without NVIDIA")
@pytest.mark.parametrize(
    ("kernel", "change"),
    [
        (triton_spans._span_kernel, {"BLOCK_M": 16}),
        (triton_spans._span_kernel, {}),
        (triton_spans._merge_kernel, {}),
        (triton_kernel._kernel, SHIFTED),
        (triton_spans._span_kernel, {"HAS_SCALE": True}),
        (triton_spans._span_kernel, SHIFTED),
    ],
)
def test_kernels_compile_for_hopper(kernel: Any, change: dict[str, object]) -> None:
    """Down to machine code of compute capability 9.0, which needs no GPU."""
    names = kernel.arg_names
    constants = {name: value for name, value in (CONSTANTS | change).items() if name in names}
    types = {name: kind for kind, line in POINTERS.items() for name in line.split()}
    if change.get("HAS_SCALE"):
        types |= {"key": "*fp8e4nv", "value": "*fp8e4nv"}
    types |= {"scale_log2": "fp32", "key_block": "i64", "value_block": "i64"}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    places = {(names.index(name),): value for name, value in constants.items()}
    compiled = triton.compile(
        ASTSource(kernel, signature, places), target=GPUTarget("cuda", 90, 32)
    )
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= 227 << 10, "more shared memory than a block may have"
