"""The compiled CPU kernel: one task is a few rows' query tokens, one KV head, one span of entries.

Addresses and strides are in bytes. A tile's *lines* are its tokens times the query heads
per KV head, those of a token side by side.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numba import carray, cfunc, from_dtype, types

from attention_kernels.cpu import job as jobs
from attention_kernels.cpu import partials, query
from attention_kernels.cpu import vectors as vec
from attention_kernels.cpu.job import (
    ENTRY,
    FIRST_MEMBER,
    JOB,
    NUM_MEMBERS,
    SPAN,
    STOP_ENTRY,
    compiled,
    int_at,
    keys_at,
    list_tokens,
    load,
    most_visible,
    num_tiles,
    num_visible,
    some_columns,
    some_rows,
    task_value,
    token_of,
    values_at,
)
from attention_kernels.cpu.partials import keep_partials, merge, write_whole
from attention_kernels.cpu.query import load_query, turn_alike, turn_query
from attention_kernels.cpu.vectors import F32, LANES, LINE

CACHE_LINE = 64
# Values that are multiplied with all tiles before the next ones are: a third of a 48 KB cache.
NEAR_BYTES = 16 << 10


@compiled
def _copy_keys(job, source, first, count, target):
    """Slots of one block as fp32 [head_dim, padded_block]."""
    for slot in range(first, first + count):
        for d in range(job.head_dim):
            value = load(job.kind, source + slot * job.key_slot + d * job.key_dim)
            vec.set_f32(target + (d * job.padded_block + slot) * 4, value)


@compiled
def _copy_values(job, source, first, count, target):
    """Slots of one block as fp32 [block_size, padded_dim]."""
    for slot in range(first, first + count):
        for d in range(job.head_dim):
            value = load(job.kind, source + slot * job.value_slot + d * job.value_dim)
            vec.set_f32(target + (slot * job.padded_dim + d) * 4, value)
        for d in range(job.head_dim, job.padded_dim):
            vec.set_f32(target + (slot * job.padded_dim + d) * 4, types.float32(0.0))


@compiled
def _keys_ahead(job, after, begin, length):
    """Asks for bytes begin .. begin + length - 1 of the keys that `after` names, back to back.

    after: (row, kv_head, entry, stop). The keys of one block and head lie side by side.
    """
    row, kv_head, entry, stop = after
    entry += begin // job.key_bytes
    begin %= job.key_bytes
    while length > 0 and entry < stop:
        some = min(length, job.key_bytes - begin)
        vec.prefetch(keys_at(job, row, kv_head, entry) + begin, some)
        length -= some
        begin = types.int64(0)
        entry += 1


@compiled
def _score_entries(job, work, row, kv_head, entry, stop, query, num_tokens, scores, after):
    """Scores of entries entry .. stop - 1 into `scores`, before masking.

    after: (row, kv_head, entry, stop) of what is read next.
    """
    kind, stride, lane_bytes = job.kind, job.key_dim, types.int64(4 if job.kind == F32 else 2)
    if not job.key_direct:
        kind, stride, lane_bytes = types.int64(F32), job.padded_block * 4, types.int64(4)
    table, columns = work + job.columns_at, 0
    for e in range(entry, stop):
        at = (row * job.num_entries + e) * 4
        first, most = int_at(job.first + at), most_visible(job, work, row, e, num_tokens)
        keys = keys_at(job, row, kv_head, e)
        if not job.key_direct:
            copied = work + job.key_at + (e - entry) * job.head_dim * job.padded_block * 4
            _copy_keys(job, keys, first, most, copied)
            keys = copied
        line = scores + (e - entry) * job.padded_block * 4
        for lane in range(first // LANES * LANES, -(-(first + most) // LANES) * LANES, LANES):
            vec.set_i64(table + columns * 16, keys + lane * lane_bytes)
            vec.set_i64(table + columns * 16 + 8, line + lane * 4)
            columns += 1
    lines, column, read = num_tokens * job.group, 0, types.int64(0)
    tiles, line_bytes = num_tiles(lines), job.head_dim * CACHE_LINE
    while column < columns:
        some, m = some_columns(columns - column), 0
        # This group's share of what is read next: a line a step in each of its tiles, or at once.
        share = some * LANES * lane_bytes * job.head_dim if after[2] < after[3] else 0
        if share > tiles * line_bytes:
            _keys_ahead(job, after, read + tiles * line_bytes, share - tiles * line_bytes)
        for number in range(tiles):
            rows, ahead, pace = some_rows(lines - m), query, types.int64(0)
            begin = read + number * line_bytes
            entry = after[2] + begin // max(job.key_bytes, types.int64(1))
            if number * line_bytes < share and entry < after[3]:
                ahead, pace = keys_at(job, after[0], after[1], entry), types.int64(CACHE_LINE)
                ahead += begin % job.key_bytes
            vec.dot(
                kind, rows, some, query, table + column * 16, stride, job.head_dim, m * LINE * 4,
                ahead, pace,
            )  # fmt: skip
            m += rows
        column += some
        read += share


@compiled
def _mask_entry(job, work, row, entry, num_tokens, many, scores):
    """Overwrites with -inf the scores of one entry that a line does not see."""
    at = (row * job.num_entries + entry) * 4
    first, seen = int_at(job.first + at), int_at(job.count + at)
    if many and first == 0 and seen == job.padded_block:
        return
    for t in range(num_tokens):
        if not many:
            seen = num_visible(job, row, entry, token_of(job, work, t))
        if first == 0 and seen == job.padded_block:
            continue
        for m in range(t * job.group, (t + 1) * job.group):
            line = scores + m * LINE * 4
            for lane in range(0, first if seen else job.padded_block):
                vec.set_f32(line + lane * 4, types.float32(-np.inf))
            for lane in range(first + seen, job.padded_block):
                vec.set_f32(line + lane * 4, types.float32(-np.inf))


@compiled
def _softmax_step(job, work, lines, lanes):
    """Online softmax: turns scores into weights and rescales what was summed so far."""
    for m in range(lines):
        line, stats = work + job.scores_at + m * LINE * 4, work + job.stats_at + m * 8
        old, total = vec.get_f32(stats), vec.get_f32(stats + 4)
        top = vec.max_of(line, lanes)
        if not top <= old:
            if old != -np.inf:
                factor, row = vec.exp(old - top), work + job.acc_at + m * job.padded_dim * 4
                vec.scaled_add(row, factor, row, types.float32(0.0), job.padded_dim)
                total *= factor
        else:
            top = old
        # With nothing seen yet every weight is exp(-inf - 0) = 0.
        total += vec.exp_sum(line, lanes, types.float32(0.0) if top == -np.inf else top)
        vec.set_f32(stats, top)
        vec.set_f32(stats + 4, total)


@compiled
def _value_ahead(job, after, number, num_calls, piece):
    """Fills in what is fetched while piece `number` is multiplied: values of `after`'s entry of
    that number, a line of each slot a call; at once what calls are too few for."""
    entry = after[2] + number
    vec.set_i64(piece + 24, vec.get_i64(piece))
    vec.set_i64(piece + 32, types.int64(0))
    if entry < after[3]:
        at, called = values_at(job, after[0], after[1], entry), num_calls * vec.get_i64(piece + 8)
        vec.set_i64(piece + 24, at)
        vec.set_i64(piece + 32, types.int64(CACHE_LINE))
        if called * CACHE_LINE < job.value_bytes:
            vec.prefetch(at + called * CACHE_LINE, job.value_bytes - called * CACHE_LINE)


@compiled
def _add_values(job, work, row, kv_head, entry, stop, num_tokens, after):
    """Adds the values of entries entry .. stop - 1, times the weights in the scores' place."""
    kind, stride, size = job.kind, job.value_slot, types.int64(4 if job.kind == F32 else 2)
    if not job.value_direct:
        kind, stride, size = types.int64(F32), job.padded_dim * 4, types.int64(4)
    table, lines, vectors = work + job.pieces_at, num_tokens * job.group, job.padded_dim // LANES
    num_calls = num_tiles(lines) * (vectors // 4 + vectors % 4 // 2 + vectors % 2)
    num_lines = max(1, job.value_bytes // job.block_size // CACHE_LINE)
    for e in range(entry, stop):
        at = (row * job.num_entries + e) * 4
        first, most = int_at(job.first + at), most_visible(job, work, row, e, num_tokens)
        values = values_at(job, row, kv_head, e)
        if not job.value_direct:
            copied = work + job.value_at + (e - entry) * job.block_size * job.padded_dim * 4
            _copy_values(job, values, first, most, copied)
            values = copied
        piece = table + (e - entry) * 40
        vec.set_i64(piece, values + first * stride)
        vec.set_i64(piece + 8, most)
        vec.set_i64(piece + 16, ((e - entry) * job.padded_block + first) * 4)
        _value_ahead(job, after, e - entry, num_calls, piece)
    at_once = max(1, NEAR_BYTES // (job.block_size * job.padded_dim * size))
    for begin in range(0, stop - entry, at_once):
        pieces = min(at_once, stop - entry - begin)
        _add_pieces(job, work, kind, table + begin * 40, pieces, stride, size, lines, num_lines)


@compiled
def _add_pieces(job, work, kind, table, pieces, stride, size, lines, num_lines):
    """`_add_values` of some pieces, which stay in the first-level cache for all tiles."""
    vectors, d, number = job.padded_dim // LANES, 0, 0
    while d < vectors:
        some, m = some_columns(vectors - d), 0
        while m < lines:
            rows = some_rows(lines - m)
            vec.add(
                kind, rows, some, work + job.scores_at + m * LINE * 4, table, pieces, stride,
                d * LANES * size, work + job.acc_at + (m * job.padded_dim + d * LANES) * 4,
                job.padded_dim * 4, min(number, num_lines - 1),
            )  # fmt: skip
            m += rows
            number += 1
        d += some


@compiled
def _attend_span(job, work, row, kv_head, num_tokens, many, entry, stop, after):
    """Unnormalised sums of a task over entries entry .. stop - 1 of `row`, its first member.

    many: it has further members. after: (row, kv_head, entry, stop) of the worker's next task.
    """
    lines = num_tokens * job.group
    vec.clear(work + job.acc_at, lines * job.padded_dim)
    for m in range(lines):
        vec.set_f32(work + job.stats_at + m * 8, types.float32(-np.inf))
        vec.set_f32(work + job.stats_at + m * 8 + 4, types.float32(0.0))
    load_query(job, work, kv_head, num_tokens)
    query, turned = work + job.query_at, types.int64(-1)
    scores, block_bytes = work + job.scores_at, job.padded_block * 4
    for step in range(entry, stop, job.step_entries):
        end = min(step + job.step_entries, stop)
        ahead = after
        if end < stop:
            ahead = (row, kv_head, end, min(end + job.step_entries, stop))
            if job.key_bytes * job.value_bytes == 0:
                ahead = (row, kv_head, end, end)
        begin = step
        while begin < end:
            last = end
            if job.shift_index:
                last = begin + 1
                while last < end and turn_alike(job, work, begin, last, num_tokens):
                    last += 1
                if turned < 0 or not turn_alike(job, work, turned, begin, num_tokens):
                    query = turn_query(job, work, begin, num_tokens)
                turned = begin
            line = scores + (begin - step) * block_bytes
            _score_entries(job, work, row, kv_head, begin, last, query, num_tokens, line, ahead)
            begin = last
        for e in range(step, end):
            _mask_entry(job, work, row, e, num_tokens, many, scores + (e - step) * block_bytes)
        _softmax_step(job, work, lines, (end - step) * job.padded_block)
        _add_values(job, work, row, kv_head, step, end, num_tokens, ahead)


@compiled
def _start_of(job, index):
    """(row, kv_head, entry, stop) of the first step of task `index`, empty behind the last."""
    none = types.int64(0)
    if index >= job.num_tasks * job.num_kv_heads or job.key_bytes * job.value_bytes == 0:
        return none, none, none, none
    task = index // job.num_kv_heads
    row = int_at(job.members + task_value(job, task, FIRST_MEMBER) * 4)
    entry = task_value(job, task, ENTRY)
    stop = min(task_value(job, task, STOP_ENTRY), entry + job.step_entries)
    return row, index % job.num_kv_heads, entry, stop


@compiled
def _run_task(job, work, index, following):
    kv_head, task = index % job.num_kv_heads, index // job.num_kv_heads
    num_tokens = list_tokens(job, work, task)
    members, num_members = task_value(job, task, FIRST_MEMBER), task_value(job, task, NUM_MEMBERS)
    entry, stop = task_value(job, task, ENTRY), task_value(job, task, STOP_ENTRY)
    row = int_at(job.members + members * 4)
    after = _start_of(job, following)
    _attend_span(job, work, row, kv_head, num_tokens, num_members > 1, entry, stop, after)
    span = task_value(job, task, SPAN)
    if span < 0:
        write_whole(job, work, kv_head, num_tokens)
        return
    keep_partials(job, work, span, kv_head, num_tokens)
    for member in range(members, members + num_members):
        row = int_at(job.members + member * 4)
        num_partials = int_at(job.row_partials + row * 8 + 4)
        arrived = job.arrived + (row * job.num_kv_heads + kv_head) * 8
        if vec.fetch_add(arrived) == num_partials - 1:
            merge(job, work, row, kv_head, num_partials)


SOURCES = tuple(Path(str(module.__file__)) for module in (jobs, query, partials, vec))
"""The other files that the machine code of `run` comes from."""


def sources_key(files: Iterable[Path]) -> int:
    """Return what changes with any of the files; never 0."""
    return zlib.crc32(b"\0".join(path.read_bytes() for path in files)) + 1


def _entry_point(sources: int) -> Any:
    """The compiled `run`. Numba finds a cached function by the time stamp of its file and by the
    values it closes over: `sources` stands for the files that its callees are in."""

    @cfunc(types.void(types.CPointer(from_dtype(JOB))), cache=True, error_model="numpy")
    def run(pointer):
        """Works on a job until its tasks are used up; any number of threads may run this at once.

        A worker takes its next task before it begins one, to fetch ahead what it will read.
        """
        if sources == 0:
            return
        job = carray(pointer, 1)[0]
        work = job.workspace + vec.fetch_add(job.next_worker) * job.worker_bytes
        index = vec.fetch_add(job.next_task)
        while index < job.num_tasks * job.num_kv_heads:
            following = vec.fetch_add(job.next_task)
            _run_task(job, work, index, following)
            index = following

    return run


run = _entry_point(sources_key(SOURCES))
