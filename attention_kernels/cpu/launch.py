"""CPU provider: runs the compiled kernel over a batch's tasks, on torch's threads."""

from __future__ import annotations

import struct
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from attention_kernels.cpu import kernel
from attention_kernels.cpu import vectors as vec
from attention_kernels.cpu.job import CALL_POINTERS, JOB
from attention_kernels.cpu.tasks import Tasks, cut, span_entries
from attention_kernels.cpu.threads import num_workers, run_on_workers
from attention_kernels.plan import SegmentPlan
from attention_kernels.provider import Problem

KINDS = {torch.float32: vec.F32, torch.bfloat16: vec.BF16, torch.float16: vec.F16}
MAX_LINE = 512  # head dim, or slots of a block
ALIGNMENT = 64
# The addresses with which a JOB record begins.
_CALL_POINTERS = struct.Struct(f"{len(CALL_POINTERS.split())}q")

# Fields of the kernel's JOB record: addresses, sizes and strides in bytes, scale.
JobValues = dict[str, Any]


class _Memory(threading.local):
    """What the calling thread's next call may overwrite, and where: numpy is slow to say that."""

    def __init__(self) -> None:
        self.job = np.zeros(JOB.itemsize // 8, dtype=np.int64)
        self.job_address = self.job.ctypes.data
        self.job_bytes = self.job.data
        self.counters = np.zeros(0, dtype=np.int64)
        self.counters_address = 0
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def zeros(self, size: int) -> int:
        """Address of `size` int64 zeros."""
        if len(self.counters) < size:
            self.counters = np.zeros(2 * size, dtype=np.int64)
            self.counters_address = self.counters.ctypes.data
        self.counters[:size] = 0
        return self.counters_address

    def scratch(self, size: int) -> int:
        """Aligned address of at least `size` bytes."""
        if self.buffer.numel() < size + ALIGNMENT:
            self.buffer = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
        return _align(self.buffer.data_ptr())


_memory = _Memory()


def warm_up() -> None:
    """Loads the kernel, compiling it unless an earlier process left it in Numba's cache.

    Importing this module does it already; the call also runs one tiny problem.
    """
    plan = SegmentPlan.from_block_table(
        torch.zeros(1, 1, dtype=torch.int32),
        torch.ones(1, dtype=torch.int32),
        torch.tensor([0, 1], dtype=torch.int32),
        torch.full((1,), 16, dtype=torch.int32),
        block_size=16,
    )
    cache, query = torch.zeros(1, 16, 1, 16), torch.zeros(1, 1, 16)
    attend(Problem(query, cache, cache, plan, 1.0, None, query.clone(), torch.zeros(1, 1)))


def attend(problem: Problem) -> None:
    """Provider entry point."""
    if max(problem.query.shape[2], problem.plan.block_size) > MAX_LINE:
        raise ValueError(
            f"the cpu provider takes head dims and block sizes up to {MAX_LINE}, got "
            f"{problem.query.shape[2]} and {problem.plan.block_size}"
        )
    if problem.scales is not None or problem.key_cache.dtype != problem.query.dtype:
        raise ValueError(
            "the cpu provider takes caches of the query's type without scales, got "
            f"{problem.key_cache.dtype} and a query of {problem.query.dtype}"
        )
    query = problem.query if problem.query.stride(2) == 1 else problem.query.contiguous()
    out = problem.out if problem.out.stride(2) == 1 else problem.out.contiguous()
    group = query.shape[1] // problem.key_cache.shape[2]
    plan = problem.plan
    tasks = plan.memo(("cpu", group), lambda: cut(plan, group))
    _run(problem, query, out, tasks, group)
    if out is not problem.out:
        problem.out.copy_(out)


def _align(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _run(
    problem: Problem, query: torch.Tensor, out: torch.Tensor, tasks: Tasks, group: int
) -> None:
    """Fills in the addresses that change from layer to layer, and lets all threads work."""
    plan, num_kv_heads = problem.plan, problem.key_cache.shape[2]
    keys, values = problem.key_cache, problem.value_cache
    layout = (query.dtype, query.stride(), out.stride(), keys.stride(), values.stride())
    key = ("cpu job", layout, keys.shape[2:], problem.scale, problem.rotation)
    template, sizes = plan.memo(key, lambda: _template(problem, query, out, tasks, group))
    workers = num_workers() if len(tasks.table) * num_kv_heads > 1 else 1
    partials_at = workers * sizes["worker_bytes"]
    total = partials_at + tasks.num_partials * num_kv_heads * sizes["partial_bytes"]
    scratch, counters = _memory.scratch(total), _memory.zeros(plan.num_rows * num_kv_heads + 2)
    _memory.job[:] = template
    _CALL_POINTERS.pack_into(
        _memory.job_bytes, 0,
        query.data_ptr(), keys.data_ptr(), values.data_ptr(), out.data_ptr(),
        problem.lse.data_ptr(), counters, counters + 8, counters + 16,
        scratch + partials_at, scratch,
    )  # fmt: skip
    run_on_workers(kernel.run.address, _memory.job_address, workers)


def _template(
    problem: Problem, query: torch.Tensor, out: torch.Tensor, tasks: Tasks, group: int
) -> tuple[npt.NDArray[np.int64], JobValues]:
    """The JOB record of all layers with these shapes and strides, and what `_sizes` returns.

    The record comes as its int64 words, which are copied faster.
    """
    plan, size = problem.plan, query.element_size()
    num_kv_heads, head_dim = problem.key_cache.shape[2:]
    sizes = _sizes(plan.block_size, head_dim, tasks, group)
    values: JobValues = {
        "kind": KINDS[query.dtype],
        "scale": problem.scale,
        "num_tasks": len(tasks.table),
        "num_kv_heads": num_kv_heads,
        "group": group,
        "head_dim": head_dim,
        "query_token": query.stride(0) * size,
        "query_head": query.stride(1) * size,
        "out_token": out.stride(0) * size,
        "out_head": out.stride(1) * size,
        "tasks": tasks.table.ctypes.data,
        "members": tasks.members.ctypes.data,
        "row_partials": tasks.row_partials.ctypes.data,
    }
    values |= _plan_values(plan) | _cache_values(problem) | sizes
    rotation = problem.rotation
    if plan.shifts is not None and rotation is not None:
        values |= {
            "shift_index": plan.shifts.index.data_ptr(),
            "shift_width": plan.shifts.values.shape[1],
            "cos": rotation.cos.data_ptr(),
            "sin": rotation.sin.data_ptr(),
            "rotary_half": rotation.rotary.rotary_dim // 2,
            "neox": int(rotation.rotary.is_neox_style),
        }
    template: npt.NDArray[Any] = np.zeros(1, dtype=JOB)
    for name, value in values.items():
        template[name] = value
    return template.view(np.int64), sizes


def _plan_values(plan: SegmentPlan) -> JobValues:
    values: JobValues = {
        "blocks": plan.blocks.data_ptr(),
        "first": plan.first.data_ptr(),
        "count": plan.count.data_ptr(),
        "bound": plan.bound.data_ptr(),
        "query_start": plan.query_start.data_ptr(),
        "query_len": plan.query_len.data_ptr(),
        "num_entries": plan.blocks.shape[1],
    }
    if plan.visible is not None:
        values |= {
            "visible_index": plan.visible.index.data_ptr(),
            "visible_offset": plan.visible.offset.data_ptr(),
            "visible_limit": plan.visible.values.data_ptr(),
            "visible_width": plan.visible.values.shape[1],
        }
    return values


def _cache_values(problem: Problem) -> JobValues:
    """Strides in bytes, and whether the vector code can read the caches in place.

    key_bytes and value_bytes: how much of a block and head lies in one piece, 0 if it does not.
    """
    key, value = problem.key_cache, problem.value_cache
    size, (_, block_size, _, head_dim) = key.element_size(), key.shape
    values: JobValues = {
        "block_size": block_size,
        "key_direct": int(key.stride(1) == 1 and block_size % vec.LANES == 0),
        "value_direct": int(value.stride(3) == 1 and head_dim % vec.LANES == 0),
    }
    whole = block_size * head_dim * size
    key_whole = values["key_direct"] and key.stride(3) == block_size
    value_whole = values["value_direct"] and value.stride(1) == head_dim
    values |= {"key_bytes": key_whole * whole, "value_bytes": value_whole * whole}
    for name, axis in (("block", 0), ("slot", 1), ("head", 2), ("dim", 3)):
        values["key_" + name] = key.stride(axis) * size
        values["value_" + name] = value.stride(axis) * size
    return values


def _sizes(block_size: int, head_dim: int, tasks: Tasks, group: int) -> JobValues:
    """Lengths in fp32 elements padded for the vector code, and a worker's memory map in bytes."""
    padded_dim = -(-head_dim // vec.LANES) * vec.LANES
    padded_block = -(-block_size // vec.LANES) * vec.LANES
    step_entries = span_entries(padded_block)
    lines, columns = tasks.task_tokens * group, step_entries * padded_block // vec.LANES
    parts = {
        "tokens_at": tasks.task_tokens * 16,
        "query_at": lines * vec.LINE * 4,
        "turned_at": lines * vec.LINE * 4,
        "scores_at": lines * vec.LINE * 4,
        "acc_at": lines * padded_dim * 4,
        "stats_at": lines * 8,
        "columns_at": columns * 16,
        "pieces_at": step_entries * 40,
        "key_at": step_entries * head_dim * padded_block * 4,
        "value_at": step_entries * block_size * padded_dim * 4,
    }
    offsets: JobValues = {}
    total = 0
    for name, size in parts.items():
        offsets[name] = total
        total += _align(size)
    partial_stats = tasks.partial_tokens * group * padded_dim * 4
    return offsets | {
        "padded_dim": padded_dim,
        "padded_block": padded_block,
        "step_entries": step_entries,
        "partial_stats": partial_stats,
        "partial_bytes": _align(partial_stats + tasks.partial_tokens * group * 8),
        "worker_bytes": total,
    }
