"""The results of tasks: written, or kept and merged where a row was cut into spans."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np
from numba import types

from attention_kernels.cpu import vectors as vec
from attention_kernels.cpu.job import compiled, int_at, place_of, row_of, store, token_of
from attention_kernels.cpu.vectors import F32


@compiled
def _write_line(job, place, head, source, top, total):
    """Normalises one line into `out` and `lse`."""
    size = types.int64(4 if job.kind == F32 else 2)
    empty = top == -np.inf
    inverse = types.float32(0.0) if empty else types.float32(1.0) / total
    target = job.out + place * job.out_token + head * job.out_head
    for d in range(job.head_dim):
        value = types.float32(0.0) if empty else vec.get_f32(source + d * 4) * inverse
        store(job.kind, target + d * size, value)
    log_sum = types.float32(-np.inf) if empty else types.float32(top + np.log(total))
    vec.set_f32(job.lse + (place * job.num_kv_heads * job.group + head) * 4, log_sum)


@compiled
def write_whole(job, work, kv_head, num_tokens):
    """Normalises a task that is all of its row."""
    for m in range(num_tokens * job.group):
        stats = work + job.stats_at + m * 8
        _write_line(
            job, place_of(job, work, m // job.group), kv_head * job.group + m % job.group,
            work + job.acc_at + m * job.padded_dim * 4, vec.get_f32(stats),
            vec.get_f32(stats + 4),
        )  # fmt: skip


@compiled
def _partial(job, row, span, kv_head):
    """Address of a row's sums over one of its spans."""
    number = int_at(job.row_partials + row * 8) + span
    return job.partials + (number * job.num_kv_heads + kv_head) * job.partial_bytes


@compiled
def keep_partials(job, work, span, kv_head, num_tokens):
    """Copies a task's sums to where each of its rows collects them."""
    for m in range(num_tokens * job.group):
        token = m // job.group
        target = _partial(job, row_of(job, work, token), span, kv_head)
        line = token_of(job, work, token) * job.group + m % job.group
        source = work + job.acc_at + m * job.padded_dim * 4
        vec.move(source, target + line * job.padded_dim * 4, job.padded_dim)
        stats = target + job.partial_stats + line * 8
        vec.set_f32(stats, vec.get_f32(work + job.stats_at + m * 8))
        vec.set_f32(stats + 4, vec.get_f32(work + job.stats_at + m * 8 + 4))


@compiled
def merge(job, work, row, kv_head, num_partials):
    """Merges the spans of a row by log-sum-exp, in order."""
    step = job.num_kv_heads * job.partial_bytes
    base, acc = _partial(job, row, 0, kv_head), work + job.acc_at
    start = int_at(job.query_start + row * 4)
    for m in range(int_at(job.query_len + row * 4) * job.group):
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
