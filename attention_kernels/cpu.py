"""CPU provider: cuts the batch into tasks and runs the compiled kernel on torch's threads.

A row whose query tokens fit one tile is cut along its keys into spans of fixed length, so its
result depends neither on the number of threads nor on the other rows of the batch.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from attention_kernels import cpu_kernel as kernel
from attention_kernels.base import Problem
from attention_kernels.cpu_threads import num_workers, run_on_workers
from attention_kernels.plan import Int32Array, SegmentPlan

KINDS = {torch.float32: kernel.F32, torch.bfloat16: kernel.BF16, torch.float16: kernel.F16}
TILE_ROWS = 32  # query tokens times heads per KV head
SPAN_KEYS = 512
STEP_KEYS = 128
ALIGNMENT = 64

# Fields of the kernel's JOB record: addresses, sizes and strides in bytes, scale.
JobValues = dict[str, Any]

_local = threading.local()


@dataclass(frozen=True, eq=False)
class Tasks:
    """One line per task, see the columns in cpu_kernel."""

    table: Int32Array
    num_partials: int
    num_groups: int


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
    query = problem.query if problem.query.stride(2) == 1 else problem.query.contiguous()
    out = problem.out if problem.out.stride(2) == 1 else problem.out.contiguous()
    group = query.shape[1] // problem.key_cache.shape[2]
    tile_tokens = max(1, TILE_ROWS // group)
    plan = problem.plan
    tasks = plan.memo(("cpu", tile_tokens), lambda: _cut(plan, tile_tokens))
    _run(problem, query, out, tasks, tile_tokens, group)
    if out is not problem.out:
        problem.out.copy_(out)


def _cut(plan: SegmentPlan, tile_tokens: int) -> Tasks:
    query_len, num_entries = plan.query_len.numpy(), plan.num_entries.numpy()
    live = query_len > 0
    if plan.row_mask is not None:
        live = live & plan.row_mask.numpy()
    span = max(1, SPAN_KEYS // plan.block_size)
    tiles = -(-query_len // tile_tokens)
    spans = np.where(tiles == 1, np.maximum(-(-num_entries // span), 1), 1)
    per_row = np.where(live, tiles * spans, 0)
    row = np.repeat(np.arange(len(per_row)), per_row)
    number = np.arange(len(row)) - np.repeat(np.cumsum(per_row) - per_row, per_row)
    split = spans[row] > 1
    token = np.where(split, 0, number * tile_tokens)
    entry = np.where(split, number * span, 0)
    partial = np.cumsum(split, dtype=np.int32) - split
    table = np.empty((len(row), kernel.TASK_COLUMNS), dtype=np.int32)
    table[:, kernel.ROW] = row
    table[:, kernel.TOKEN] = token
    table[:, kernel.STOP_TOKEN] = np.minimum(token + tile_tokens, query_len[row])
    table[:, kernel.ENTRY] = entry
    table[:, kernel.STOP_ENTRY] = np.where(
        split, np.minimum(entry + span, num_entries[row]), num_entries[row]
    )
    table[:, kernel.PARTIAL] = partial
    table[:, kernel.FIRST_PARTIAL] = partial - number
    table[:, kernel.NUM_PARTIALS] = spans[row]
    table[:, kernel.GROUP] = row
    return Tasks(table, int(split.sum()), len(per_row))


def _align(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _scratch(size: int) -> int:
    """Aligned address of at least `size` bytes that belong to the calling thread until it asks
    again."""
    buffer = getattr(_local, "buffer", None)
    if buffer is None or buffer.numel() < size + ALIGNMENT:
        buffer = _local.buffer = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
    return _align(int(buffer.data_ptr()))


def _run(
    problem: Problem,
    query: torch.Tensor,
    out: torch.Tensor,
    tasks: Tasks,
    tile_tokens: int,
    group: int,
) -> None:
    plan, size = problem.plan, query.element_size()
    num_kv_heads, head_dim = problem.key_cache.shape[2:]
    job: Any = np.zeros(1, dtype=kernel.JOB)
    values: JobValues = {
        "kind": KINDS[query.dtype],
        "scale": problem.scale,
        "num_tasks": len(tasks.table),
        "num_kv_heads": num_kv_heads,
        "group": group,
        "head_dim": head_dim,
        "tile_tokens": tile_tokens,
        "query": query.data_ptr(),
        "query_token": query.stride(0) * size,
        "query_head": query.stride(1) * size,
        "out": out.data_ptr(),
        "out_token": out.stride(0) * size,
        "out_head": out.stride(1) * size,
        "lse": problem.lse.data_ptr(),
        "tasks": tasks.table.ctypes.data,
    }
    values |= _plan_values(plan)
    values |= _cache_values(problem)
    workers = num_workers() if len(tasks.table) * num_kv_heads > 1 else 1
    sizes = _sizes(plan.block_size, head_dim, tile_tokens * group)
    partials_at = workers * sizes["worker_bytes"]
    arrived_at = partials_at + tasks.num_partials * num_kv_heads * sizes["partial_bytes"]
    counters = np.zeros(tasks.num_groups * num_kv_heads + 2, dtype=np.int64)
    scratch = _scratch(arrived_at)
    values |= sizes
    values |= {
        "workspace": scratch,
        "partials": scratch + partials_at,
        "next_task": counters.ctypes.data,
        "next_worker": counters.ctypes.data + 8,
        "arrived": counters.ctypes.data + 16,
    }
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
    for name, value in values.items():
        job[name] = value
    run_on_workers(kernel.run.address, job.ctypes.data, workers)


def _plan_values(plan: SegmentPlan) -> JobValues:
    values: JobValues = {
        "blocks": plan.blocks.data_ptr(),
        "first": plan.first.data_ptr(),
        "count": plan.count.data_ptr(),
        "bound": plan.bound.data_ptr(),
        "query_start": plan.query_start.data_ptr(),
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
    """Strides in bytes, and whether the vector code can read the caches in place."""
    key, value = problem.key_cache, problem.value_cache
    size, block_size = key.element_size(), key.shape[1]
    values: JobValues = {
        "key": key.data_ptr(),
        "value": value.data_ptr(),
        "key_direct": int(key.stride(1) == 1 and block_size % kernel.LANES == 0),
        "value_direct": int(value.stride(3) == 1 and value.shape[3] % kernel.LANES == 0),
    }
    for name, axis in (("block", 0), ("slot", 1), ("head", 2), ("dim", 3)):
        values["key_" + name] = key.stride(axis) * size
        values["value_" + name] = value.stride(axis) * size
    return values


def _sizes(block_size: int, head_dim: int, tile_rows: int) -> JobValues:
    """Lengths in fp32 elements padded for the vector code, and a worker's memory map in bytes."""
    padded_dim = -(-head_dim // kernel.LANES) * kernel.LANES
    padded_block = -(-block_size // kernel.LANES) * kernel.LANES
    step_entries = max(1, STEP_KEYS // padded_block)
    partial = _align(tile_rows * (padded_dim + 2) * 4)
    parts = {
        "query_at": tile_rows * padded_dim * 4,
        "turned_at": tile_rows * padded_dim * 4,
        "scores_at": tile_rows * step_entries * padded_block * 4,
        "acc_at": partial,
        "key_at": head_dim * padded_block * 4,
        "value_at": block_size * padded_dim * 4,
    }
    offsets: JobValues = {}
    total = 0
    for name, size in parts.items():
        offsets[name] = total
        total += _align(size)
    return offsets | {
        "padded_dim": padded_dim,
        "padded_block": padded_block,
        "step_entries": step_entries,
        "partial_bytes": partial,
        "worker_bytes": total,
    }
