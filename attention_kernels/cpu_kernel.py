"""The compiled CPU kernel: one task is a tile of query tokens, one KV head, one span of entries.

Scores and values are computed by small vector routines written as LLVM vector code, since loops
over the 16 slots of a block are too short for automatic vectorisation. Addresses and strides are
in bytes. All of the kernel is in one file because Numba's cache is keyed by the file's time stamp.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, from_dtype, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

F32, BF16, F16 = 0, 1, 2
LANES = 16
ROWS_AT_ONCE = 4

_POINTERS = (
    "query key value out lse blocks first count bound query_start "
    "shift_index cos sin visible_index visible_offset visible_limit "
    "tasks next_task next_worker arrived partials workspace"
)
_SIZES = (
    "kind num_tasks num_kv_heads group head_dim padded_dim padded_block tile_tokens step_entries "
    "num_entries query_token query_head out_token out_head "
    "key_block key_slot key_head key_dim value_block value_slot value_head value_dim "
    "key_direct value_direct shift_width rotary_half neox visible_width "
    "partial_bytes worker_bytes query_at turned_at scores_at acc_at key_at value_at"
)
JOB = np.dtype(
    [(name, np.int64) for name in (_POINTERS + " " + _SIZES).split()] + [("scale", np.float32)],
    align=True,
)
# Columns of the task table.
ROW, TOKEN, STOP_TOKEN, ENTRY, STOP_ENTRY, PARTIAL, FIRST_PARTIAL, NUM_PARTIALS, GROUP = range(9)
TASK_COLUMNS = 9

_i16, _i32, _i64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_f16, _f32 = ir.HalfType(), ir.FloatType()
_vf32 = ir.VectorType(_f32, LANES)
_vi32 = ir.VectorType(_i32, LANES)


def _const(value: float) -> Any:
    return ir.Constant(_vf32, [value] * LANES)


def _load(builder: Any, address: Any, kind: Any, align: int = 4) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)


def _store(builder: Any, value: Any, address: Any, align: int = 4) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=align)


def _call(builder: Any, name: str, result: Any, *args: Any) -> Any:
    signature = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), args)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return _call(builder, f"llvm.fmuladd.v{LANES}f32", _vf32, a, b, c)


def _splat(builder: Any, scalar: Any) -> Any:
    undefined = ir.Constant(_vf32, ir.Undefined)
    one = builder.insert_element(undefined, scalar, _i32(0))
    return builder.shuffle_vector(one, undefined, ir.Constant(_vi32, [0] * LANES))


def _widen(builder: Any, kind: int, address: Any) -> Any:
    """LANES elements of dtype `kind` at `address`, as fp32."""
    if kind == F32:
        return _load(builder, address, _vf32)
    if kind == F16:
        half = _load(builder, address, ir.VectorType(_f16, LANES), align=2)
        return builder.fpext(half, _vf32)
    bits = builder.zext(_load(builder, address, ir.VectorType(_i16, LANES), align=2), _vi32)
    return builder.bitcast(builder.shl(bits, ir.Constant(_vi32, [16] * LANES)), _vf32)


def _step(builder: Any, address: Any, index: Any, stride: Any) -> Any:
    return builder.add(address, builder.mul(index, stride))


def _accumulate(builder: Any, kind: int, rows: int, args: Any, keep: bool) -> None:
    """out[r] (+)= sum_i weight[r, i] * matrix[i, :LANES], for `rows` rows."""
    weight, weight_row, matrix, matrix_row, depth, out, out_row = args
    outs = [_step(builder, out, _i64(r), out_row) for r in range(rows)]
    sums = [cgutils.alloca_once(builder, _vf32) for _ in range(rows)]
    for total, at in zip(sums, outs, strict=True):
        builder.store(_load(builder, at, _vf32) if keep else _const(0.0), total)
    with cgutils.for_range(builder, depth) as loop:
        vector = _widen(builder, kind, _step(builder, matrix, loop.index, matrix_row))
        column = _step(builder, weight, loop.index, _i64(4))
        for r, total in enumerate(sums):
            scalar = _load(builder, _step(builder, column, _i64(r), weight_row), _f32)
            term = _fma(builder, _splat(builder, scalar), vector, builder.load(total))
            builder.store(term, total)
    for total, at in zip(sums, outs, strict=True):
        _store(builder, builder.load(total), at)


def _accumulator(keep: bool) -> Any:
    """An intrinsic (kind, rows, weight, weight_row, matrix, matrix_row, depth, out, out_row)."""

    def accumulate(
        typingctx, kind, rows, weight, weight_row, matrix, matrix_row, depth, out, out_row
    ):
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind, rows, *rest = args
            done = builder.append_basic_block("accumulated")
            case = builder.add(builder.mul(kind, _i64(ROWS_AT_ONCE)), builder.sub(rows, _i64(1)))
            switch = builder.switch(case, done)
            for number in range(3 * ROWS_AT_ONCE):
                block = builder.append_basic_block(f"accumulate{number}")
                switch.add_case(_i64(number), block)
                builder.position_at_end(block)
                some_kind, some_rows = divmod(number, ROWS_AT_ONCE)
                _accumulate(builder, some_kind, some_rows + 1, rest, keep)
                builder.branch(done)
            builder.position_at_end(done)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), codegen

    return intrinsic(accumulate)


_dot_rows = _accumulator(keep=False)
_add_rows = _accumulator(keep=True)


def _exp(builder: Any, x: Any) -> Any:
    """exp of x <= 0: Cephes' expf (x = n ln 2 + r, degree-6 polynomial); 0 below -87, NaN kept."""
    low = builder.fcmp_ordered("<", x, _const(-87.0))
    safe = builder.select(builder.fcmp_ordered(">=", x, _const(-87.0)), x, _const(0.0))
    scaled = builder.fmul(safe, _const(1.4426950408889634))
    number = builder.fptosi(builder.fsub(scaled, _const(0.5)), _vi32)
    whole = builder.sitofp(number, _vf32)
    rest = _fma(builder, whole, _const(-0.693359375), safe)
    rest = _fma(builder, whole, _const(2.1219444e-4), rest)
    poly = _const(1.9875691500e-4)
    for factor in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5):
        poly = _fma(builder, poly, rest, _const(float(np.float32(factor))))
    poly = _fma(builder, builder.fmul(rest, rest), poly, builder.fadd(rest, _const(1.0)))
    power = builder.shl(
        builder.add(number, ir.Constant(_vi32, [127] * LANES)), ir.Constant(_vi32, [23] * LANES)
    )
    result = builder.fmul(poly, builder.bitcast(power, _vf32))
    result = builder.select(low, _const(0.0), result)
    return builder.select(builder.fcmp_unordered("uno", x, x), x, result)


def _fold(builder: Any, vector: Any, combine: Any) -> Any:
    """Reduces a vector to a scalar by halves, in a fixed order."""
    undefined = ir.Constant(_vf32, ir.Undefined)
    width = LANES // 2
    while width:
        lanes = ir.Constant(_vi32, [(i + width) % LANES for i in range(LANES)])
        vector = combine(vector, builder.shuffle_vector(vector, undefined, lanes))
        width //= 2
    return builder.extract_element(vector, _i32(0))


@intrinsic
def _max_of(typingctx, address, length):
    """Largest of `length` floats (a multiple of LANES); NaN if one is NaN."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def larger(a: Any, b: Any) -> Any:
            return builder.select(builder.fcmp_unordered(">", a, b), a, b)

        best = cgutils.alloca_once_value(builder, _const(-np.inf))
        with cgutils.for_range(builder, builder.sdiv(args[1], _i64(LANES))) as loop:
            vector = _load(builder, _step(builder, args[0], loop.index, _i64(4 * LANES)), _vf32)
            builder.store(larger(vector, builder.load(best)), best)
        return _fold(builder, builder.load(best), larger)

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def _exp_sum(typingctx, address, length, top):
    """Replaces `length` floats (a multiple of LANES) x by exp(x - top) and returns their sum."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        total = cgutils.alloca_once_value(builder, _const(0.0))
        top = _splat(builder, args[2])
        with cgutils.for_range(builder, builder.sdiv(args[1], _i64(LANES))) as loop:
            at = _step(builder, args[0], loop.index, _i64(4 * LANES))
            value = _exp(builder, builder.fsub(_load(builder, at, _vf32), top))
            _store(builder, value, at)
            builder.store(builder.fadd(value, builder.load(total)), total)
        return _fold(builder, builder.load(total), builder.fadd)

    return types.float32(types.int64, types.int64, types.float32), codegen


@intrinsic
def _scaled_add(typingctx, out, factor, other, weight, length):
    """out = out * factor + other * weight over `length` floats (a multiple of LANES)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        out, factor, other, weight, length = args
        factor, weight = _splat(builder, factor), _splat(builder, weight)
        with cgutils.for_range(builder, builder.sdiv(length, _i64(LANES))) as loop:
            offset = builder.mul(loop.index, _i64(4 * LANES))
            at = builder.add(out, offset)
            added = builder.fmul(_load(builder, builder.add(other, offset), _vf32), weight)
            _store(builder, _fma(builder, _load(builder, at, _vf32), factor, added), at)
        return context.get_dummy_value()

    arguments = (types.int64, types.float32, types.int64, types.float32, types.int64)
    return types.void(*arguments), codegen


def _loader(llvm_type: Any, result: Any) -> Any:
    def load(typingctx, address):
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            align = 2 if llvm_type in (_i16, _f16) else 4
            value = _load(builder, args[0], llvm_type, align)
            return builder.fpext(value, _f32) if llvm_type == _f16 else value

        return result(types.int64), codegen

    return intrinsic(load)


def _storer(llvm_type: Any, argument: Any) -> Any:
    def store(typingctx, address, value):
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value = builder.fptrunc(args[1], _f16) if llvm_type == _f16 else args[1]
            _store(builder, value, args[0], 2 if llvm_type in (_i16, _f16) else 4)
            return context.get_dummy_value()

        return types.void(types.int64, argument), codegen

    return intrinsic(store)


_get_f32, _set_f32 = _loader(_f32, types.float32), _storer(_f32, types.float32)
_get_f16, _set_f16 = _loader(_f16, types.float32), _storer(_f16, types.float32)
_get_u16, _set_u16 = _loader(_i16, types.uint16), _storer(_i16, types.uint16)
_get_i32 = _loader(_i32, types.int32)


@intrinsic
def _bits_of(typingctx, value):
    """The bit pattern of a float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _i32)

    return types.uint32(types.float32), codegen


@intrinsic
def _float_of(typingctx, bits):
    """The float32 with this bit pattern."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _f32)

    return types.float32(types.uint32), codegen


@intrinsic
def _fetch_add(typingctx, address):
    """Atomically adds 1 to the int64 at `address`; returns what it was before."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], _i64.as_pointer())
        return builder.atomic_rmw("add", pointer, _i64(1), "seq_cst")

    return types.int64(types.int64), codegen


# Not cached themselves: the code of `run`, which is, contains them.
_compiled = njit(error_model="numpy")


@_compiled
def _get(kind, address):
    if kind == F32:
        return _get_f32(address)
    if kind == F16:
        return _get_f16(address)
    return _float_of(types.uint32(_get_u16(address)) << types.uint32(16))


@_compiled
def _set(kind, address, value):
    """Stores with rounding to nearest even."""
    if kind == F32:
        _set_f32(address, value)
    elif kind == F16:
        _set_f16(address, value)
    elif value != value:
        _set_u16(address, types.uint16(0x7FC0))
    else:
        bits = types.uint64(_bits_of(value))
        _set_u16(address, types.uint16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16))


@_compiled
def _dot(kind, rows, weight, weight_row, matrix, matrix_row, depth, out, out_row):
    for r in range(0, rows, ROWS_AT_ONCE):
        some = min(rows - r, ROWS_AT_ONCE)
        at, to = weight + r * weight_row, out + r * out_row
        _dot_rows(kind, some, at, weight_row, matrix, matrix_row, depth, to, out_row)


@_compiled
def _add(kind, rows, weight, weight_row, matrix, matrix_row, depth, out, out_row):
    for r in range(0, rows, ROWS_AT_ONCE):
        some = min(rows - r, ROWS_AT_ONCE)
        at, to = weight + r * weight_row, out + r * out_row
        _add_rows(kind, some, at, weight_row, matrix, matrix_row, depth, to, out_row)


@_compiled
def _exp_one(x):
    return types.float32(np.exp(x))


@_compiled
def _load_query(job, work, row, kv_head, token, num_tokens):
    """Scaled queries of a tile as fp32 [tokens * group, padded_dim]."""
    size = types.int64(4 if job.kind == F32 else 2)
    start = _get_i32(job.query_start + row * 4) + token
    for m in range(num_tokens * job.group):
        head = kv_head * job.group + m % job.group
        source = job.query + (start + m // job.group) * job.query_token + head * job.query_head
        target = work + job.query_at + m * job.padded_dim * 4
        for d in range(job.head_dim):
            _set_f32(target + d * 4, _get(job.kind, source + d * size) * job.scale)
        for d in range(job.head_dim, job.padded_dim):
            _set_f32(target + d * 4, types.float32(0.0))


@_compiled
def _turn_query(job, work, vector, token, num_tokens):
    """The tile's queries rotated by shift vector `vector`; returns their address."""
    if vector == 0:
        return work + job.query_at
    half = job.rotary_half
    for m in range(num_tokens * job.group):
        source = work + job.query_at + m * job.padded_dim * 4
        target = work + job.turned_at + m * job.padded_dim * 4
        table = ((vector * job.shift_width + token + m // job.group) * half) * 4
        for i in range(half):
            left, right = (i, i + half) if job.neox else (2 * i, 2 * i + 1)
            cos, sin = _get_f32(job.cos + table + i * 4), _get_f32(job.sin + table + i * 4)
            a, b = _get_f32(source + left * 4), _get_f32(source + right * 4)
            _set_f32(target + left * 4, a * cos - b * sin)
            _set_f32(target + right * 4, b * cos + a * sin)
        for d in range(2 * half, job.padded_dim):
            _set_f32(target + d * 4, _get_f32(source + d * 4))
    return work + job.turned_at


@_compiled
def _num_visible(job, row, entry, token):
    """How many of the entry's valid slots the row's token sees; they are its first ones."""
    at = (row * job.num_entries + entry) * 4
    seen = min(_get_i32(job.count + at), token - _get_i32(job.bound + at) + 1)
    if job.visible_index:
        vector = types.int64(_get_i32(job.visible_index + at))
        limit = _get_i32(job.visible_limit + (vector * job.visible_width + token) * 4)
        seen = min(seen, limit - _get_i32(job.visible_offset + at))
    return max(types.int64(0), types.int64(seen))


@_compiled
def _most_visible(job, row, entry, token, num_tokens):
    if not job.visible_index:
        return _num_visible(job, row, entry, token + num_tokens - 1)
    most = types.int64(0)
    for t in range(num_tokens):
        most = max(most, _num_visible(job, row, entry, token + t))
    return most


@_compiled
def _copy_keys(job, source, first, count, target):
    """Slots of one block as fp32 [head_dim, padded_block]."""
    for slot in range(first, first + count):
        for d in range(job.head_dim):
            value = _get(job.kind, source + slot * job.key_slot + d * job.key_dim)
            _set_f32(target + (d * job.padded_block + slot) * 4, value)


@_compiled
def _copy_values(job, source, first, count, target):
    """Slots of one block as fp32 [block_size, padded_dim]."""
    for slot in range(first, first + count):
        for d in range(job.head_dim):
            value = _get(job.kind, source + slot * job.value_slot + d * job.value_dim)
            _set_f32(target + (slot * job.padded_dim + d) * 4, value)
        for d in range(job.head_dim, job.padded_dim):
            _set_f32(target + (slot * job.padded_dim + d) * 4, types.float32(0.0))


@_compiled
def _score_entry(job, work, row, kv_head, entry, query, token, num_tokens, scores, width):
    """Scores of one entry into `scores` (rows `width` bytes apart); -inf where unseen."""
    at = row * job.num_entries + entry
    first = types.int64(_get_i32(job.first + at * 4))
    most = _most_visible(job, row, entry, token, num_tokens)
    block = types.int64(_get_i32(job.blocks + at * 4))
    keys = job.key + block * job.key_block + kv_head * job.key_head
    kind, dim_stride, lane_bytes = job.kind, job.key_dim, types.int64(4 if job.kind == F32 else 2)
    if not job.key_direct:
        _copy_keys(job, keys, first, most, work + job.key_at)
        keys, kind, lane_bytes = work + job.key_at, types.int64(F32), types.int64(4)
        dim_stride = job.padded_block * 4
    begin, end = first // LANES * LANES, -(-(first + most) // LANES) * LANES
    rows = num_tokens * job.group
    for lane in range(begin, end, LANES):
        _dot(
            kind, rows, query, job.padded_dim * 4, keys + lane * lane_bytes, dim_stride,
            job.head_dim, scores + lane * 4, width,
        )  # fmt: skip
    for m in range(rows):
        seen = most
        if num_tokens > 1:
            seen = _num_visible(job, row, entry, token + m // job.group)
        line = scores + m * width
        for lane in range(0, first if seen else job.padded_block):
            _set_f32(line + lane * 4, types.float32(-np.inf))
        for lane in range(first + seen, job.padded_block):
            _set_f32(line + lane * 4, types.float32(-np.inf))


@_compiled
def _softmax_step(job, rows, scores, width, lanes, acc, stats):
    """Online softmax: turns scores into weights and rescales what was summed so far."""
    for m in range(rows):
        line = scores + m * width
        old, total = _get_f32(stats + m * 8), _get_f32(stats + m * 8 + 4)
        top = _max_of(line, lanes)
        if not top <= old:
            if old != -np.inf:
                factor, row = _exp_one(old - top), acc + m * job.padded_dim * 4
                _scaled_add(row, factor, row, types.float32(0.0), job.padded_dim)
                total *= factor
        else:
            top = old
        # With nothing seen yet every weight is exp(-inf - 0) = 0.
        total += _exp_sum(line, lanes, types.float32(0.0) if top == -np.inf else top)
        _set_f32(stats + m * 8, top)
        _set_f32(stats + m * 8 + 4, total)


@_compiled
def _value_entry(job, work, row, kv_head, entry, token, num_tokens, weights, width, acc):
    at = row * job.num_entries + entry
    first = types.int64(_get_i32(job.first + at * 4))
    most = _most_visible(job, row, entry, token, num_tokens)
    block = types.int64(_get_i32(job.blocks + at * 4))
    values = job.value + block * job.value_block + kv_head * job.value_head
    kind, slot_stride, size = job.kind, job.value_slot, types.int64(4 if job.kind == F32 else 2)
    if not job.value_direct:
        _copy_values(job, values, first, most, work + job.value_at)
        values, kind, size = work + job.value_at, types.int64(F32), types.int64(4)
        slot_stride = job.padded_dim * 4
    values += first * slot_stride
    for d in range(0, job.padded_dim, LANES):
        _add(
            kind, num_tokens * job.group, weights + first * 4, width, values + d * size,
            slot_stride, most, acc + d * 4, job.padded_dim * 4,
        )  # fmt: skip


@_compiled
def _write(job, row, kv_head, token, num_tokens, acc, stats):
    """Normalises a tile into `out` and `lse`."""
    size = types.int64(4 if job.kind == F32 else 2)
    num_heads = job.num_kv_heads * job.group
    start = _get_i32(job.query_start + row * 4) + token
    for m in range(num_tokens * job.group):
        index, head = start + m // job.group, kv_head * job.group + m % job.group
        top, total = _get_f32(stats + m * 8), _get_f32(stats + m * 8 + 4)
        empty = top == -np.inf
        inverse = types.float32(0.0) if empty else types.float32(1.0) / total
        target = job.out + index * job.out_token + head * job.out_head
        source = acc + m * job.padded_dim * 4
        for d in range(job.head_dim):
            value = types.float32(0.0) if empty else _get_f32(source + d * 4) * inverse
            _set(job.kind, target + d * size, value)
        log_sum = types.float32(-np.inf) if empty else types.float32(top + np.log(total))
        _set_f32(job.lse + (index * num_heads + head) * 4, log_sum)


@_compiled
def _merge(job, row, kv_head, token, num_tokens, partial, num_partials):
    """Merges the spans of a tile into its first one by log-sum-exp, in order."""
    rows = num_tokens * job.group
    stats_at = job.tile_tokens * job.group * job.padded_dim * 4
    base = job.partials + partial * job.partial_bytes
    for c in range(1, num_partials):
        other = base + c * job.num_kv_heads * job.partial_bytes
        for m in range(rows):
            mine, its = base + stats_at + m * 8, other + stats_at + m * 8
            a, b = _get_f32(mine), _get_f32(its)
            top = b if not b <= a else a
            if b == -np.inf:
                continue
            old = types.float32(0.0) if a == -np.inf else _exp_one(a - top)
            new = _exp_one(b - top)
            line = m * job.padded_dim * 4
            _scaled_add(base + line, old, other + line, new, job.padded_dim)
            _set_f32(mine, top)
            _set_f32(mine + 4, _get_f32(mine + 4) * old + _get_f32(its + 4) * new)
    _write(job, row, kv_head, token, num_tokens, base, base + stats_at)


@_compiled
def _attend_span(job, work, row, kv_head, token, num_tokens, entry, stop, acc, stats):
    """Unnormalised sums of a tile over entries entry .. stop - 1."""
    rows = num_tokens * job.group
    for i in range(rows * job.padded_dim):
        _set_f32(acc + i * 4, types.float32(0.0))
    for m in range(rows):
        _set_f32(stats + m * 8, types.float32(-np.inf))
        _set_f32(stats + m * 8 + 4, types.float32(0.0))
    _load_query(job, work, row, kv_head, token, num_tokens)
    query, turned = work + job.query_at, types.int64(0)
    scores, width = work + job.scores_at, job.step_entries * job.padded_block * 4
    for step in range(entry, stop, job.step_entries):
        end = min(step + job.step_entries, stop)
        for e in range(step, end):
            if job.shift_index:
                vector = types.int64(_get_i32(job.shift_index + (row * job.num_entries + e) * 4))
                if vector != turned:
                    query, turned = _turn_query(job, work, vector, token, num_tokens), vector
            line = scores + (e - step) * job.padded_block * 4
            _score_entry(job, work, row, kv_head, e, query, token, num_tokens, line, width)
        _softmax_step(job, rows, scores, width, (end - step) * job.padded_block, acc, stats)
        for e in range(step, end):
            line = scores + (e - step) * job.padded_block * 4
            _value_entry(job, work, row, kv_head, e, token, num_tokens, line, width, acc)


@_compiled
def _run_task(job, work, index):
    kv_head = index % job.num_kv_heads
    task = job.tasks + index // job.num_kv_heads * TASK_COLUMNS * 4
    row, token = types.int64(_get_i32(task + ROW * 4)), types.int64(_get_i32(task + TOKEN * 4))
    num_tokens = _get_i32(task + STOP_TOKEN * 4) - token
    entry, stop = _get_i32(task + ENTRY * 4), _get_i32(task + STOP_ENTRY * 4)
    num_partials = _get_i32(task + NUM_PARTIALS * 4)
    stats_at = job.tile_tokens * job.group * job.padded_dim * 4
    acc = work + job.acc_at
    if num_partials > 1:
        partial = _get_i32(task + PARTIAL * 4) * job.num_kv_heads + kv_head
        acc = job.partials + partial * job.partial_bytes
    _attend_span(job, work, row, kv_head, token, num_tokens, entry, stop, acc, acc + stats_at)
    if num_partials == 1:
        _write(job, row, kv_head, token, num_tokens, acc, acc + stats_at)
        return
    counter = (_get_i32(task + GROUP * 4) * job.num_kv_heads + kv_head) * 8
    if _fetch_add(job.arrived + counter) == num_partials - 1:
        first = _get_i32(task + FIRST_PARTIAL * 4) * job.num_kv_heads + kv_head
        _merge(job, row, kv_head, token, num_tokens, first, num_partials)


@cfunc(types.void(types.CPointer(from_dtype(JOB))), cache=True, error_model="numpy")
def run(pointer):
    """Works on a job until its tasks are used up; any number of threads may run this at once."""
    job = carray(pointer, 1)[0]
    work = job.workspace + _fetch_add(job.next_worker) * job.worker_bytes
    while True:
        index = _fetch_add(job.next_task)
        if index >= job.num_tasks * job.num_kv_heads:
            return
        _run_task(job, work, index)
