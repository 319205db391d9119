"""Runs a compiled function on the OpenMP threads that torch already has.

A second thread pool would fight with torch's: OpenMP threads spin for a while after each region,
and threads started later inherit the affinity mask of a main thread that has been pinned to one
core. Joining torch's own team avoids both, and uses whatever cores its threads were bound to.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

# void GOMP_parallel(void (*fn)(void *), void *data, unsigned num_threads, unsigned flags): the
# ABI behind `#pragma omp parallel` in code compiled by GCC; LLVM's and Intel's runtimes have it.
_ENTRY_POINT = "GOMP_parallel"


@functools.cache
def _openmp_parallel() -> Any:
    """The OpenMP runtime's entry point as torch's own code resolves it, or None.

    The global scope comes first (a preloaded runtime), then the libraries torch links to.
    """
    lib = Path(torch.__file__).parent / "lib"
    for name in (None, *map(str, sorted(lib.glob("libtorch_cpu.*")))):
        try:
            entry = getattr(ctypes.CDLL(name), _ENTRY_POINT)
        except (OSError, AttributeError):
            continue
        entry.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        entry.restype = None
        return entry
    return None


def num_workers() -> int:
    """How many threads torch's regions use, as `run_on_workers` does; 1 without OpenMP."""
    return torch.get_num_threads() if _openmp_parallel() is not None else 1


def run_on_workers(function: int, argument: int, workers: int) -> None:
    """Calls the C function at address `function` with `argument` on `workers` threads at once.

    workers: 1, or all of `num_workers()`. GCC's runtime ends the surplus threads of a smaller team,
    and those it starts later lack the cores that a server bound them to (pytorch#32008).
    Returns when all have returned. The GIL is not held.
    """
    parallel = _openmp_parallel()
    if workers > 1 and parallel is not None:
        parallel(function, argument, workers, 0)
    else:
        _function_at(function)(argument)


@functools.cache
def _function_at(address: int) -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)
