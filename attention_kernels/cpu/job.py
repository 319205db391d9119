"""The record of a job, and what the compiled code reads from it: tasks, tokens, what they see.

The rows of a task are its members. A task with several members is a span that they share: its
entries are equal in all of them and visible to all their tokens, so it is read through the first
member's. Addresses and strides are in bytes.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np
from numba import njit, types

from attention_kernels.cpu import vectors as vec
from attention_kernels.cpu.vectors import F16, F32

# Those that change from call to call come first.
CALL_POINTERS = "query key value out lse next_task next_worker arrived partials workspace"
_POINTERS = (
    "blocks first count bound query_start query_len "
    "shift_index cos sin visible_index visible_offset visible_limit tasks members row_partials"
)
_SIZES = (
    "kind num_tasks num_kv_heads group head_dim padded_dim padded_block step_entries "
    "num_entries query_token query_head out_token out_head "
    "key_block key_slot key_head key_dim value_block value_slot value_head value_dim "
    "key_direct value_direct key_bytes value_bytes block_size "
    "shift_width rotary_half neox visible_width partial_bytes partial_stats worker_bytes "
    "tokens_at query_at turned_at scores_at acc_at stats_at key_at value_at columns_at pieces_at"
)
JOB = np.dtype(
    [(name, np.int64) for name in f"{CALL_POINTERS} {_POINTERS} {_SIZES}".split()]
    + [("scale", np.float32)],
    align=True,
)
# Columns of the task table. SPAN is a span's number in its row, -1 for a task that is all of it.
FIRST_MEMBER, NUM_MEMBERS, TOKEN, STOP_TOKEN, ENTRY, STOP_ENTRY, SPAN = range(7)
TASK_COLUMNS = 7

compiled = njit(error_model="numpy")
"""Not cached themselves: the code of `kernel.run`, which is, contains them."""


@compiled
def load(kind, address):
    if kind == F32:
        return vec.get_f32(address)
    if kind == F16:
        return vec.get_f16(address)
    return vec.float_of(types.uint32(vec.get_u16(address)) << types.uint32(16))


@compiled
def store(kind, address, value):
    """Stores with rounding to nearest even."""
    if kind == F32:
        vec.set_f32(address, value)
    elif kind == F16:
        vec.set_f16(address, value)
    elif value != value:
        vec.set_u16(address, types.uint16(0x7FC0))
    else:
        bits = types.uint64(vec.bits_of(value))
        vec.set_u16(address, types.uint16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16))


@compiled
def int_at(address):
    return types.int64(vec.get_i32(address))


@compiled
def task_value(job, number, column):
    return int_at(job.tasks + (number * TASK_COLUMNS + column) * 4)


@compiled
def some_rows(left):
    """Rows of the next tile when `left` are left: few tiles, none of them thin."""
    if left >= 9 or left == 6:
        return 6
    if left == 5:
        return 3
    return min(left, 4)


@compiled
def some_columns(left):
    return 4 if left >= 4 else 2 if left >= 2 else 1


@compiled
def num_tiles(lines):
    number = 0
    while lines > 0:
        lines -= some_rows(lines)
        number += 1
    return number


@compiled
def list_tokens(job, work, task):
    """Writes the (row, token of the row) of each of a task's tokens; returns their number."""
    number = 0
    begin, stop = task_value(job, task, TOKEN), task_value(job, task, STOP_TOKEN)
    member = job.members + task_value(job, task, FIRST_MEMBER) * 4
    for _ in range(task_value(job, task, NUM_MEMBERS)):
        row = int_at(member)
        for token in range(begin, min(stop, int_at(job.query_len + row * 4))):
            vec.set_i64(work + job.tokens_at + number * 16, row)
            vec.set_i64(work + job.tokens_at + number * 16 + 8, token)
            number += 1
        member += 4
    return number


@compiled
def row_of(job, work, token):
    return vec.get_i64(work + job.tokens_at + token * 16)


@compiled
def token_of(job, work, token):
    return vec.get_i64(work + job.tokens_at + token * 16 + 8)


@compiled
def place_of(job, work, token):
    """Where in `query` a token of the task is."""
    row = row_of(job, work, token)
    return int_at(job.query_start + row * 4) + token_of(job, work, token)


@compiled
def num_visible(job, row, entry, token):
    """How many of the entry's valid slots the row's token sees; they are its first ones."""
    at = (row * job.num_entries + entry) * 4
    seen = min(int_at(job.count + at), token - int_at(job.bound + at) + 1)
    if job.visible_index:
        limit = (int_at(job.visible_index + at) * job.visible_width + token) * 4
        seen = min(seen, int_at(job.visible_limit + limit) - int_at(job.visible_offset + at))
    return max(types.int64(0), seen)


@compiled
def most_visible(job, work, row, entry, num_tokens):
    """The most that a token of the task sees of an entry of `row`, its first member."""
    if not job.visible_index:
        return num_visible(job, row, entry, token_of(job, work, num_tokens - 1))
    most = types.int64(0)
    for t in range(num_tokens):
        most = max(most, num_visible(job, row, entry, token_of(job, work, t)))
    return most


@compiled
def keys_at(job, row, kv_head, entry):
    block = int_at(job.blocks + (row * job.num_entries + entry) * 4)
    return job.key + block * job.key_block + kv_head * job.key_head


@compiled
def values_at(job, row, kv_head, entry):
    block = int_at(job.blocks + (row * job.num_entries + entry) * 4)
    return job.value + block * job.value_block + kv_head * job.value_head
