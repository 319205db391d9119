"""The queries of a task: scaled fp32 lines, rotated by each row's shift."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from numba import types

from attention_kernels.cpu import vectors as vec
from attention_kernels.cpu.job import compiled, int_at, load, place_of, row_of, token_of
from attention_kernels.cpu.vectors import F32, LANES, LINE


@compiled
def load_query(job, work, kv_head, num_tokens):
    """Scaled queries of a task as fp32 lines."""
    size = types.int64(4 if job.kind == F32 else 2)
    for m in range(num_tokens * job.group):
        place, head = place_of(job, work, m // job.group), kv_head * job.group + m % job.group
        source = job.query + place * job.query_token + head * job.query_head
        target = work + job.query_at + m * LINE * 4
        whole = job.head_dim // LANES * LANES
        vec.widen(job.kind, source, target, job.scale, whole)
        for d in range(whole, job.head_dim):
            vec.set_f32(target + d * 4, load(job.kind, source + d * size) * job.scale)


@compiled
def _shift_of(job, row, entry):
    """Number of the shift vector by which a row's queries turn for an entry."""
    return int_at(job.shift_index + (row * job.num_entries + entry) * 4)


@compiled
def turn_alike(job, work, entry, other, num_tokens):
    """Whether each of the task's tokens turns for `other` as it does for `entry`."""
    for t in range(num_tokens):
        row = row_of(job, work, t)
        if _shift_of(job, row, entry) != _shift_of(job, row, other):
            return False
    return True


@compiled
def turn_query(job, work, entry, num_tokens):
    """The task's queries, each rotated by its row's shift for `entry`; returns their address."""
    turns = False
    for t in range(num_tokens):
        turns |= _shift_of(job, row_of(job, work, t), entry) != 0
    if not turns:
        return work + job.query_at
    half = job.rotary_half
    for m in range(num_tokens * job.group):
        source = work + job.query_at + m * LINE * 4
        target = work + job.turned_at + m * LINE * 4
        token = m // job.group
        vector = _shift_of(job, row_of(job, work, token), entry)
        if vector == 0:
            vec.move(source, target, job.padded_dim)
            continue
        table = ((vector * job.shift_width + token_of(job, work, token)) * half) * 4
        for i in range(half):
            left, right = (i, i + half) if job.neox else (2 * i, 2 * i + 1)
            cos, sin = vec.get_f32(job.cos + table + i * 4), vec.get_f32(job.sin + table + i * 4)
            a, b = vec.get_f32(source + left * 4), vec.get_f32(source + right * 4)
            vec.set_f32(target + left * 4, a * cos - b * sin)
            vec.set_f32(target + right * 4, b * cos + a * sin)
        for d in range(2 * half, job.head_dim):
            vec.set_f32(target + d * 4, vec.get_f32(source + d * 4))
    return work + job.turned_at
