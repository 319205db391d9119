"""Small vector routines for the CPU kernel, written as LLVM vector code.

Loops over the 16 slots of a block are too short for automatic vectorisation, and one query row at
a time leaves most of a core's multipliers idle. `dot` and `add` hold a tile of up to 6 rows by 64
lanes in registers: 24 sums in flight hide the latency of a multiply-add, and a load serves several
of them. Addresses and strides are in bytes. Each row's sums run in the same order whatever tile
it is part of, so that a row's result does not depend on its neighbours.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

F32, BF16, F16 = 0, 1, 2
LANES = 16
# Floats from one row of queries or scores to the next; a constant, so that the rows of a tile
# are reached by fixed displacements. The odd line beyond 512 spreads rows over the cache's sets.
LINE = 512 + LANES
TILE_ROWS = (1, 2, 3, 4, 6)
TILE_COLUMNS = (1, 2, 4)

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


def _cases(builder: Any, args: Any, emit: Any) -> None:
    """Branches on (kind, rows, columns) = args[:3] to the code that `emit` writes for each."""
    wanted = args[0]
    for arg in args[1:3]:
        wanted = builder.add(builder.mul(wanted, _i64(8)), arg)
    done = builder.append_basic_block("done")
    switch = builder.switch(wanted, done)
    for kind in (F32, BF16, F16):
        for rows in TILE_ROWS:
            for columns in TILE_COLUMNS:
                block = builder.append_basic_block("tile")
                switch.add_case(_i64((kind * 8 + rows) * 8 + columns), block)
                builder.position_at_end(block)
                emit(kind, rows, columns)
                builder.branch(done)
    builder.position_at_end(done)


def _sums(builder: Any, rows: int, columns: int) -> Any:
    """Variables for a tile's sums, which LLVM keeps in registers."""
    return [[cgutils.alloca_once(builder, _vf32) for _ in range(columns)] for _ in range(rows)]


def _multiply(builder: Any, sums: Any, weight: Any, vectors: Any) -> None:
    """sums[r][c] += weight[r] * vectors[c]; rows of `weight` are LINE floats apart."""
    for r, line in enumerate(sums):
        scalar = _splat(builder, _load(builder, builder.add(weight, _i64(r * LINE * 4)), _f32))
        for total, vector in zip(line, vectors, strict=True):
            builder.store(_fma(builder, scalar, vector, builder.load(total)), total)


@intrinsic
def dot(typingctx, kind, rows, columns, weight, table, stride, depth, offset, ahead, pace):
    """out[c][r, :LANES] = sum_i weight[r, i] * column[c][i, :LANES].

    table: int64 pairs (address of column c, address of its output); `stride` bytes lead from
    one i of a column to the next. Rows of weights and outputs are LINE floats apart, the first
    ones `offset` bytes behind the addresses given. Step i also fetches `ahead` + i * `pace` into
    the cache: one line at a time, as a burst would hold up the loads of the sum.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        weight, table, stride, depth, offset, early, pace = args[3:]
        weight = builder.add(weight, offset)

        def emit(kind: int, rows: int, columns: int) -> None:
            pairs = [builder.add(table, _i64(16 * c)) for c in range(columns)]
            starts = [_load(builder, pair, _i64, 8) for pair in pairs]
            outs = [_load(builder, builder.add(pair, _i64(8)), _i64, 8) for pair in pairs]
            outs = [builder.add(out, offset) for out in outs]
            sums = _sums(builder, rows, columns)
            for total in (total for line in sums for total in line):
                builder.store(_const(0.0), total)
            with cgutils.for_range(builder, depth) as loop:
                _fetch(builder, _step(builder, early, loop.index, pace))
                inner = builder.mul(loop.index, stride)
                vectors = [_widen(builder, kind, builder.add(at, inner)) for at in starts]
                at = builder.add(weight, builder.mul(loop.index, _i64(4)))
                _multiply(builder, sums, at, vectors)
            for r, line in enumerate(sums):
                for total, out in zip(line, outs, strict=True):
                    at = builder.add(out, _i64(r * LINE * 4))
                    _store(builder, builder.load(total), at)

        _cases(builder, args, emit)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 10), codegen


@intrinsic
def add(typingctx, kind, rows, columns, weight, table, runs, stride, offset, out, out_row, call):
    """out[r, :LANES * columns] += sum_i weight[r, i] * matrix[i, :LANES * columns].

    The matrix lies in `runs` pieces, one line of `table` each: int64 (address, number of i, byte
    offset of their weights, address to fetch ahead, step of that). Call number `call` fetches the
    `call`-th line of each i ahead. `stride` bytes lead from one i of a piece to the next, `offset`
    bytes into it begins the part in use. Rows of weights are LINE floats apart, of sums `out_row`
    bytes.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        weight, table, runs, stride, offset, out, out_row, call = args[3:]

        def emit(kind: int, rows: int, columns: int) -> None:
            size = 4 if kind == F32 else 2
            sums = _sums(builder, rows, columns)
            places = [
                (total, builder.add(_step(builder, out, _i64(r), out_row), _i64(64 * c)))
                for r, line in enumerate(sums)
                for c, total in enumerate(line)
            ]
            for total, at in places:
                builder.store(_load(builder, at, _vf32), total)
            with cgutils.for_range(builder, runs) as piece:
                line = builder.add(table, builder.mul(piece.index, _i64(40)))
                start = builder.add(_load(builder, line, _i64, 8), offset)
                depth = _load(builder, builder.add(line, _i64(8)), _i64, 8)
                its = _load(builder, builder.add(line, _i64(16)), _i64, 8)
                its = builder.add(weight, its)
                early = _load(builder, builder.add(line, _i64(24)), _i64, 8)
                pace = _load(builder, builder.add(line, _i64(32)), _i64, 8)
                early = _step(builder, early, builder.mul(call, depth), pace)
                with cgutils.for_range(builder, depth) as loop:
                    _fetch(builder, _step(builder, early, loop.index, pace))
                    at = _step(builder, start, loop.index, stride)
                    vectors = [
                        _widen(builder, kind, builder.add(at, _i64(c * LANES * size)))
                        for c in range(columns)
                    ]
                    at = builder.add(its, builder.mul(loop.index, _i64(4)))
                    _multiply(builder, sums, at, vectors)
            for total, at in places:
                _store(builder, builder.load(total), at)

        _cases(builder, args, emit)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 11), codegen


def _fetch(builder: Any, address: Any) -> None:
    """Asks for a line to be brought into the second-level cache."""
    byte = ir.IntType(8).as_pointer()
    signature = ir.FunctionType(ir.VoidType(), [byte, _i32, _i32, _i32])
    function = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0i8")
    # Read, locality 2, data.
    builder.call(function, [builder.inttoptr(address, byte), _i32(0), _i32(2), _i32(1)])


@intrinsic
def prefetch(typingctx, address, length):
    """Asks for `length` bytes at `address` to be brought into the cache."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address, length = args
        lines = builder.sdiv(builder.add(length, _i64(63)), _i64(64))
        with cgutils.for_range(builder, lines) as loop:
            _fetch(builder, _step(builder, address, loop.index, _i64(64)))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def _exp(builder: Any, x: Any) -> Any:
    """exp of x <= 0: Cephes' expf (x = n ln 2 + r, degree-6 polynomial); 0 below -87, NaN kept.

    n is rounded by adding 1.5 * 2 ** 23, and the exponent's bias with it: n + 127 is then what the
    sum's low bits hold.
    """
    low = builder.fcmp_ordered("<", x, _const(-87.0))
    safe = builder.select(low, _const(-87.0), x)
    shifted = _fma(builder, safe, _const(1.4426950408889634), _const(12582912.0 + 127))
    whole = builder.fsub(shifted, _const(12582912.0 + 127))
    rest = _fma(builder, whole, _const(-0.693359375), safe)
    rest = _fma(builder, whole, _const(2.1219444e-4), rest)
    poly = _const(1.9875691500e-4)
    for factor in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5):
        poly = _fma(builder, poly, rest, _const(float(np.float32(factor))))
    poly = _fma(builder, builder.fmul(rest, rest), poly, builder.fadd(rest, _const(1.0)))
    bits = builder.shl(builder.bitcast(shifted, _vi32), ir.Constant(_vi32, [23] * LANES))
    result = builder.fmul(poly, builder.bitcast(bits, _vf32))
    return builder.select(low, _const(0.0), result)


@intrinsic
def exp(typingctx, value):
    """exp of one float <= 0."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.extract_element(_exp(builder, _splat(builder, args[0])), _i32(0))

    return types.float32(types.float32), codegen


@intrinsic
def clear(typingctx, address, length):
    """Sets `length` floats (a multiple of LANES) to zero."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        with cgutils.for_range(builder, builder.sdiv(args[1], _i64(LANES))) as loop:
            _store(builder, _const(0.0), _step(builder, args[0], loop.index, _i64(4 * LANES)))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


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
def max_of(typingctx, address, length):
    """Largest of `length` floats (a multiple of LANES); NaN if all are NaN."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def larger(a: Any, b: Any) -> Any:
            return builder.select(builder.fcmp_ordered(">", a, b), a, b)

        best = cgutils.alloca_once_value(builder, _const(-np.inf))
        with cgutils.for_range(builder, builder.sdiv(args[1], _i64(LANES))) as loop:
            vector = _load(builder, _step(builder, args[0], loop.index, _i64(4 * LANES)), _vf32)
            builder.store(larger(builder.load(best), vector), best)
        return _fold(builder, builder.load(best), larger)

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def exp_sum(typingctx, address, length, top):
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
def scaled_add(typingctx, out, factor, other, weight, length):
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


@intrinsic
def widen(typingctx, kind, source, target, factor, length):
    """Writes `length` elements (a multiple of LANES) of dtype `kind` times `factor` as fp32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wanted, source, target, factor, length = args
        factor = _splat(builder, factor)
        done = builder.append_basic_block("done")
        switch = builder.switch(wanted, done)
        for kind in (F32, BF16, F16):
            block = builder.append_basic_block("kind")
            switch.add_case(_i64(kind), block)
            builder.position_at_end(block)
            with cgutils.for_range(builder, builder.sdiv(length, _i64(LANES))) as loop:
                at = _step(builder, source, loop.index, _i64((4 if kind == F32 else 2) * LANES))
                to = _step(builder, target, loop.index, _i64(4 * LANES))
                _store(builder, builder.fmul(_widen(builder, kind, at), factor), to)
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    arguments = (types.int64, types.int64, types.int64, types.float32, types.int64)
    return types.void(*arguments), codegen


@intrinsic
def move(typingctx, source, target, length):
    """Copies `length` floats (a multiple of LANES)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, target, length = args
        with cgutils.for_range(builder, builder.sdiv(length, _i64(LANES))) as loop:
            offset = builder.mul(loop.index, _i64(4 * LANES))
            vector = _load(builder, builder.add(source, offset), _vf32)
            _store(builder, vector, builder.add(target, offset))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


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


get_f32, set_f32 = _loader(_f32, types.float32), _storer(_f32, types.float32)
get_f16, set_f16 = _loader(_f16, types.float32), _storer(_f16, types.float32)
get_u16, set_u16 = _loader(_i16, types.uint16), _storer(_i16, types.uint16)
get_i32 = _loader(_i32, types.int32)
get_i64, set_i64 = _loader(_i64, types.int64), _storer(_i64, types.int64)


@intrinsic
def bits_of(typingctx, value):
    """The bit pattern of a float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _i32)

    return types.uint32(types.float32), codegen


@intrinsic
def float_of(typingctx, bits):
    """The float32 with this bit pattern."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _f32)

    return types.float32(types.uint32), codegen


@intrinsic
def fetch_add(typingctx, address):
    """Atomically adds 1 to the int64 at `address`; returns what it was before."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], _i64.as_pointer())
        return builder.atomic_rmw("add", pointer, _i64(1), "seq_cst")

    return types.int64(types.int64), codegen
