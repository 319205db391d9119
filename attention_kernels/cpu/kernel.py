"""The compiled CPU kernel: one task is a few rows' query tokens, one KV head, one span of entries.

The rows of a task are its members. A task with several members is a span that they share: its
entries are equal in all of them and visible to all their tokens, so it is read through the first
member's. Addresses and strides are in bytes. A tile's *lines* are its tokens times the query heads
per KV head, those of a token side by side.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numba import carray, cfunc, from_dtype, njit, types

from attention_kernels.cpu import vectors as vec
from attention_kernels.cpu.vectors import F16, F32, LANES, LINE

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
CACHE_LINE = 64
# Values that are multiplied with all tiles before the next ones are: a third of a 48 KB cache.
NEAR_BYTES = 16 << 10
FIRST_MEMBER, NUM_MEMBERS, TOKEN, STOP_TOKEN, ENTRY, STOP_ENTRY, SPAN = range(7)
TASK_COLUMNS = 7

# Not cached themselves: the code of `run`, which is, contains them.
_compiled = njit(error_model="numpy")


@_compiled
def _get(kind, address):
    if kind == F32:
        return vec.get_f32(address)
    if kind == F16:
        return vec.get_f16(address)
    return vec.float_of(types.uint32(vec.get_u16(address)) << types.uint32(16))


@_compiled
def _set(kind, address, value):
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


@_compiled
def _int(address):
    return types.int64(vec.get_i32(address))


@_compiled
def _task(job, number, column):
    return _int(job.tasks + (number * TASK_COLUMNS + column) * 4)


@_compiled
def _some_rows(left):
    """Rows of the next tile when `left` are left: few tiles, none of them thin."""
    if left >= 9 or left == 6:
        return 6
    if left == 5:
        return 3
    return min(left, 4)


@_compiled
def _some_columns(left):
    return 4 if left >= 4 else 2 if left >= 2 else 1


@_compiled
def _num_tiles(lines):
    number = 0
    while lines > 0:
        lines -= _some_rows(lines)
        number += 1
    return number


@_compiled
def _list_tokens(job, work, task):
    """Writes the (row, token of the row) of each of a task's tokens; returns their number."""
    number = 0
    begin, stop = _task(job, task, TOKEN), _task(job, task, STOP_TOKEN)
    member = job.members + _task(job, task, FIRST_MEMBER) * 4
    for _ in range(_task(job, task, NUM_MEMBERS)):
        row = _int(member)
        for token in range(begin, min(stop, _int(job.query_len + row * 4))):
            vec.set_i64(work + job.tokens_at + number * 16, row)
            vec.set_i64(work + job.tokens_at + number * 16 + 8, token)
            number += 1
        member += 4
    return number


@_compiled
def _row_of(job, work, token):
    return vec.get_i64(work + job.tokens_at + token * 16)


@_compiled
def _token_of(job, work, token):
    return vec.get_i64(work + job.tokens_at + token * 16 + 8)


@_compiled
def _place_of(job, work, token):
    """Where in `query` a token of the task is."""
    row = _row_of(job, work, token)
    return _int(job.query_start + row * 4) + _token_of(job, work, token)


@_compiled
def _load_query(job, work, kv_head, num_tokens):
    """Scaled queries of a task as fp32 lines."""
    size = types.int64(4 if job.kind == F32 else 2)
    for m in range(num_tokens * job.group):
        place, head = _place_of(job, work, m // job.group), kv_head * job.group + m % job.group
        source = job.query + place * job.query_token + head * job.query_head
        target = work + job.query_at + m * LINE * 4
        whole = job.head_dim // LANES * LANES
        vec.widen(job.kind, source, target, job.scale, whole)
        for d in range(whole, job.head_dim):
            vec.set_f32(target + d * 4, _get(job.kind, source + d * size) * job.scale)


@_compiled
def _shift_of(job, row, entry):
    """Number of the shift vector by which a row's queries turn for an entry."""
    return _int(job.shift_index + (row * job.num_entries + entry) * 4)


@_compiled
def _turn_alike(job, work, entry, other, num_tokens):
    """Whether each of the task's tokens turns for `other` as it does for `entry`."""
    for t in range(num_tokens):
        row = _row_of(job, work, t)
        if _shift_of(job, row, entry) != _shift_of(job, row, other):
            return False
    return True


@_compiled
def _turn_query(job, work, entry, num_tokens):
    """The task's queries, each rotated by its row's shift for `entry`; returns their address."""
    turns = False
    for t in range(num_tokens):
        turns |= _shift_of(job, _row_of(job, work, t), entry) != 0
    if not turns:
        return work + job.query_at
    half = job.rotary_half
    for m in range(num_tokens * job.group):
        source = work + job.query_at + m * LINE * 4
        target = work + job.turned_at + m * LINE * 4
        token = m // job.group
        vector = _shift_of(job, _row_of(job, work, token), entry)
        if vector == 0:
            vec.move(source, target, job.padded_dim)
            continue
        table = ((vector * job.shift_width + _token_of(job, work, token)) * half) * 4
        for i in range(half):
            left, right = (i, i + half) if job.neox else (2 * i, 2 * i + 1)
            cos, sin = vec.get_f32(job.cos + table + i * 4), vec.get_f32(job.sin + table + i * 4)
            a, b = vec.get_f32(source + left * 4), vec.get_f32(source + right * 4)
            vec.set_f32(target + left * 4, a * cos - b * sin)
            vec.set_f32(target + right * 4, b * cos + a * sin)
        for d in range(2 * half, job.head_dim):
            vec.set_f32(target + d * 4, vec.get_f32(source + d * 4))
    return work + job.turned_at


@_compiled
def _num_visible(job, row, entry, token):
    """How many of the entry's valid slots the row's token sees; they are its first ones."""
    at = (row * job.num_entries + entry) * 4
    seen = min(_int(job.count + at), token - _int(job.bound + at) + 1)
    if job.visible_index:
        limit = (_int(job.visible_index + at) * job.visible_width + token) * 4
        seen = min(seen, _int(job.visible_limit + limit) - _int(job.visible_offset + at))
    return max(types.int64(0), seen)


@_compiled
def _most_visible(job, work, row, entry, num_tokens):
    """The most that a token of the task sees of an entry of `row`, its first member."""
    if not job.visible_index:
        return _num_visible(job, row, entry, _token_of(job, work, num_tokens - 1))
    most = types.int64(0)
    for t in range(num_tokens):
        most = max(most, _num_visible(job, row, entry, _token_of(job, work, t)))
    return most


@_compiled
def _copy_keys(job, source, first, count, target):
    """Slots of one block as fp32 [head_dim, padded_block]."""
    for slot in range(first, first + count):
        for d in range(job.head_dim):
            value = _get(job.kind, source + slot * job.key_slot + d * job.key_dim)
            vec.set_f32(target + (d * job.padded_block + slot) * 4, value)


@_compiled
def _copy_values(job, source, first, count, target):
    """Slots of one block as fp32 [block_size, padded_dim]."""
    for slot in range(first, first + count):
        for d in range(job.head_dim):
            value = _get(job.kind, source + slot * job.value_slot + d * job.value_dim)
            vec.set_f32(target + (slot * job.padded_dim + d) * 4, value)
        for d in range(job.head_dim, job.padded_dim):
            vec.set_f32(target + (slot * job.padded_dim + d) * 4, types.float32(0.0))


@_compiled
def _keys_ahead(job, after, begin, length):
    """Asks for bytes begin .. begin + length - 1 of the keys that `after` names, back to back.

    after: (row, kv_head, entry, stop). The keys of one block and head lie side by side.
    """
    row, kv_head, entry, stop = after
    entry += begin // job.key_bytes
    begin %= job.key_bytes
    while length > 0 and entry < stop:
        some = min(length, job.key_bytes - begin)
        vec.prefetch(_keys_at(job, row, kv_head, entry) + begin, some)
        length -= some
        begin = types.int64(0)
        entry += 1


@_compiled
def _keys_at(job, row, kv_head, entry):
    block = _int(job.blocks + (row * job.num_entries + entry) * 4)
    return job.key + block * job.key_block + kv_head * job.key_head


@_compiled
def _values_at(job, row, kv_head, entry):
    block = _int(job.blocks + (row * job.num_entries + entry) * 4)
    return job.value + block * job.value_block + kv_head * job.value_head


@_compiled
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
        first, most = _int(job.first + at), _most_visible(job, work, row, e, num_tokens)
        keys = _keys_at(job, row, kv_head, e)
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
    tiles, line_bytes = _num_tiles(lines), job.head_dim * CACHE_LINE
    while column < columns:
        some, m = _some_columns(columns - column), 0
        # This group's share of what is read next: a line a step in each of its tiles, or at once.
        share = some * LANES * lane_bytes * job.head_dim if after[2] < after[3] else 0
        if share > tiles * line_bytes:
            _keys_ahead(job, after, read + tiles * line_bytes, share - tiles * line_bytes)
        for number in range(tiles):
            rows, ahead, pace = _some_rows(lines - m), query, types.int64(0)
            begin = read + number * line_bytes
            entry = after[2] + begin // max(job.key_bytes, types.int64(1))
            if number * line_bytes < share and entry < after[3]:
                ahead, pace = _keys_at(job, after[0], after[1], entry), types.int64(CACHE_LINE)
                ahead += begin % job.key_bytes
            vec.dot(
                kind, rows, some, query, table + column * 16, stride, job.head_dim, m * LINE * 4,
                ahead, pace,
            )  # fmt: skip
            m += rows
        column += some
        read += share


@_compiled
def _mask_entry(job, work, row, entry, num_tokens, many, scores):
    """Overwrites with -inf the scores of one entry that a line does not see."""
    at = (row * job.num_entries + entry) * 4
    first, seen = _int(job.first + at), _int(job.count + at)
    if many and first == 0 and seen == job.padded_block:
        return
    for t in range(num_tokens):
        if not many:
            seen = _num_visible(job, row, entry, _token_of(job, work, t))
        if first == 0 and seen == job.padded_block:
            continue
        for m in range(t * job.group, (t + 1) * job.group):
            line = scores + m * LINE * 4
            for lane in range(0, first if seen else job.padded_block):
                vec.set_f32(line + lane * 4, types.float32(-np.inf))
            for lane in range(first + seen, job.padded_block):
                vec.set_f32(line + lane * 4, types.float32(-np.inf))


@_compiled
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


@_compiled
def _value_ahead(job, after, number, num_calls, piece):
    """Fills in what is fetched while piece `number` is multiplied: values of `after`'s entry of
    that number, a line of each slot a call; at once what calls are too few for."""
    entry = after[2] + number
    vec.set_i64(piece + 24, vec.get_i64(piece))
    vec.set_i64(piece + 32, types.int64(0))
    if entry < after[3]:
        at, called = _values_at(job, after[0], after[1], entry), num_calls * vec.get_i64(piece + 8)
        vec.set_i64(piece + 24, at)
        vec.set_i64(piece + 32, types.int64(CACHE_LINE))
        if called * CACHE_LINE < job.value_bytes:
            vec.prefetch(at + called * CACHE_LINE, job.value_bytes - called * CACHE_LINE)


@_compiled
def _add_values(job, work, row, kv_head, entry, stop, num_tokens, after):
    """Adds the values of entries entry .. stop - 1, times the weights in the scores' place."""
    kind, stride, size = job.kind, job.value_slot, types.int64(4 if job.kind == F32 else 2)
    if not job.value_direct:
        kind, stride, size = types.int64(F32), job.padded_dim * 4, types.int64(4)
    table, lines, vectors = work + job.pieces_at, num_tokens * job.group, job.padded_dim // LANES
    num_calls = _num_tiles(lines) * (vectors // 4 + vectors % 4 // 2 + vectors % 2)
    num_lines = max(1, job.value_bytes // job.block_size // CACHE_LINE)
    for e in range(entry, stop):
        at = (row * job.num_entries + e) * 4
        first, most = _int(job.first + at), _most_visible(job, work, row, e, num_tokens)
        values = _values_at(job, row, kv_head, e)
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


@_compiled
def _add_pieces(job, work, kind, table, pieces, stride, size, lines, num_lines):
    """`_add_values` of some pieces, which stay in the first-level cache for all tiles."""
    vectors, d, number = job.padded_dim // LANES, 0, 0
    while d < vectors:
        some, m = _some_columns(vectors - d), 0
        while m < lines:
            rows = _some_rows(lines - m)
            vec.add(
                kind, rows, some, work + job.scores_at + m * LINE * 4, table, pieces, stride,
                d * LANES * size, work + job.acc_at + (m * job.padded_dim + d * LANES) * 4,
                job.padded_dim * 4, min(number, num_lines - 1),
            )  # fmt: skip
            m += rows
            number += 1
        d += some


@_compiled
def _write_line(job, place, head, source, top, total):
    """Normalises one line into `out` and `lse`."""
    size = types.int64(4 if job.kind == F32 else 2)
    empty = top == -np.inf
    inverse = types.float32(0.0) if empty else types.float32(1.0) / total
    target = job.out + place * job.out_token + head * job.out_head
    for d in range(job.head_dim):
        value = types.float32(0.0) if empty else vec.get_f32(source + d * 4) * inverse
        _set(job.kind, target + d * size, value)
    log_sum = types.float32(-np.inf) if empty else types.float32(top + np.log(total))
    vec.set_f32(job.lse + (place * job.num_kv_heads * job.group + head) * 4, log_sum)


@_compiled
def _write(job, work, kv_head, num_tokens):
    """Normalises a task that is all of its row."""
    for m in range(num_tokens * job.group):
        stats = work + job.stats_at + m * 8
        _write_line(
            job, _place_of(job, work, m // job.group), kv_head * job.group + m % job.group,
            work + job.acc_at + m * job.padded_dim * 4, vec.get_f32(stats),
            vec.get_f32(stats + 4),
        )  # fmt: skip


@_compiled
def _partial(job, row, span, kv_head):
    """Address of a row's sums over one of its spans."""
    number = _int(job.row_partials + row * 8) + span
    return job.partials + (number * job.num_kv_heads + kv_head) * job.partial_bytes


@_compiled
def _keep_partials(job, work, span, kv_head, num_tokens):
    """Copies a task's sums to where each of its rows collects them."""
    for m in range(num_tokens * job.group):
        token = m // job.group
        target = _partial(job, _row_of(job, work, token), span, kv_head)
        line = _token_of(job, work, token) * job.group + m % job.group
        source = work + job.acc_at + m * job.padded_dim * 4
        vec.move(source, target + line * job.padded_dim * 4, job.padded_dim)
        stats = target + job.partial_stats + line * 8
        vec.set_f32(stats, vec.get_f32(work + job.stats_at + m * 8))
        vec.set_f32(stats + 4, vec.get_f32(work + job.stats_at + m * 8 + 4))


@_compiled
def _merge(job, work, row, kv_head, num_partials):
    """Merges the spans of a row by log-sum-exp, in order."""
    step = job.num_kv_heads * job.partial_bytes
    base, acc = _partial(job, row, 0, kv_head), work + job.acc_at
    start = _int(job.query_start + row * 4)
    for m in range(_int(job.query_len + row * 4) * job.group):
        stats, top = base + job.partial_stats + m * 8, types.float32(-np.inf)
        for c in range(num_partials):
            its = vec.get_f32(stats + c * step)
            top = top if its <= top else its
        total = types.float32(0.0)
        vec.clear(acc, job.padded_dim)
        for c in range(num_partials):
            its = vec.get_f32(stats + c * step)
            if its != -np.inf:
                weight, line = vec.exp(its - top), base + c * step + m * job.padded_dim * 4
                vec.scaled_add(acc, types.float32(1.0), line, weight, job.padded_dim)
                total += vec.get_f32(stats + c * step + 4) * weight
        _write_line(
            job, start + m // job.group, kv_head * job.group + m % job.group, acc, top, total
        )


@_compiled
def _attend_span(job, work, row, kv_head, num_tokens, many, entry, stop, after):
    """Unnormalised sums of a task over entries entry .. stop - 1 of `row`, its first member.

    many: it has further members. after: (row, kv_head, entry, stop) of the worker's next task.
    """
    lines = num_tokens * job.group
    vec.clear(work + job.acc_at, lines * job.padded_dim)
    for m in range(lines):
        vec.set_f32(work + job.stats_at + m * 8, types.float32(-np.inf))
        vec.set_f32(work + job.stats_at + m * 8 + 4, types.float32(0.0))
    _load_query(job, work, kv_head, num_tokens)
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
                while last < end and _turn_alike(job, work, begin, last, num_tokens):
                    last += 1
                if turned < 0 or not _turn_alike(job, work, turned, begin, num_tokens):
                    query = _turn_query(job, work, begin, num_tokens)
                turned = begin
            line = scores + (begin - step) * block_bytes
            _score_entries(job, work, row, kv_head, begin, last, query, num_tokens, line, ahead)
            begin = last
        for e in range(step, end):
            _mask_entry(job, work, row, e, num_tokens, many, scores + (e - step) * block_bytes)
        _softmax_step(job, work, lines, (end - step) * job.padded_block)
        _add_values(job, work, row, kv_head, step, end, num_tokens, ahead)


@_compiled
def _start_of(job, index):
    """(row, kv_head, entry, stop) of the first step of task `index`, empty behind the last."""
    none = types.int64(0)
    if index >= job.num_tasks * job.num_kv_heads or job.key_bytes * job.value_bytes == 0:
        return none, none, none, none
    task = index // job.num_kv_heads
    row = _int(job.members + _task(job, task, FIRST_MEMBER) * 4)
    entry = _task(job, task, ENTRY)
    stop = min(_task(job, task, STOP_ENTRY), entry + job.step_entries)
    return row, index % job.num_kv_heads, entry, stop


@_compiled
def _run_task(job, work, index, following):
    kv_head, task = index % job.num_kv_heads, index // job.num_kv_heads
    num_tokens = _list_tokens(job, work, task)
    members, num_members = _task(job, task, FIRST_MEMBER), _task(job, task, NUM_MEMBERS)
    entry, stop = _task(job, task, ENTRY), _task(job, task, STOP_ENTRY)
    row = _int(job.members + members * 4)
    after = _start_of(job, following)
    _attend_span(job, work, row, kv_head, num_tokens, num_members > 1, entry, stop, after)
    span = _task(job, task, SPAN)
    if span < 0:
        _write(job, work, kv_head, num_tokens)
        return
    _keep_partials(job, work, span, kv_head, num_tokens)
    for member in range(members, members + num_members):
        row = _int(job.members + member * 4)
        num_partials = _int(job.row_partials + row * 8 + 4)
        arrived = job.arrived + (row * job.num_kv_heads + kv_head) * 8
        if vec.fetch_add(arrived) == num_partials - 1:
            _merge(job, work, row, kv_head, num_partials)


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


run = _entry_point(zlib.crc32(Path(vec.__file__).read_bytes()) + 1)
