"""Times of one point: all contenders in turn, over as many layers as it takes to empty the caches.

A model's step reads another layer's keys in between, so a layer's own are never in a cache when
they are needed. Times with warm caches would flatter whoever reads them more often.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from tests.bench.attention.contenders import Missing, Run
from tests.bench.attention.problems import Layer, Point, expected, make_layer

CACHE_BYTES = {"cpu": 128 << 20, "cuda": 256 << 20}
MOST_BYTES = {"cpu": 3 << 30, "cuda": 32 << 30}
MOST_LAYERS = 64
# Largest error of an output, whose values are means of unit normals.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}


def copy_bandwidth(device: str) -> float:
    """Bytes per second read and written by a copy that fits no cache, best of several."""
    source = torch.ones(256 << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = min(_seconds(lambda: target.copy_(source), device) for _ in range(9))
    return 2 * source.numel() / seconds


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Multiply-adds per second of a large matrix product, best of several."""
    size = 1024 if device == "cpu" else 8192
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    seconds = min(_seconds(lambda: torch.mm(a, b), device) for _ in range(9))
    return float(size**3 / seconds)


def measure(
    point: Point,
    device: str,
    contenders: dict[str, Callable[[Layer], Run]],
    rounds: int,
    say: Callable[[str], None],
    hot: bool = False,
) -> dict[str, dict[str, float]]:
    """For each contender: seconds a layer and, over the first one's, the ratio with its quartiles.

    hot: one layer over and over. Raises AssertionError if an output is wrong.
    """
    layers = [make_layer(point, device, 0)]
    runs: dict[str, list[Run]] = {}
    num_layers = 1 if hot else _num_layers(layers[0], device)
    layers += [make_layer(point, device, seed) for seed in range(1, num_layers)]
    for name, prepare in contenders.items():
        try:
            runs[name] = [prepare(layer) for layer in layers]
        except Missing as reason:
            say(f"{name}: {reason}")
            continue
        _check(name, runs[name][0](), layers[0])
    passes = {name: _pass(name, steps, device, say) for name, steps in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for number in range(rounds + 1):
        for name in list(passes) if number % 2 else list(passes)[::-1]:
            took = _seconds(passes[name], device) / len(layers)
            if number:  # the first round warms up
                seconds[name].append(took)
    base = seconds[next(iter(seconds))]
    return {name: _summary(times, base) for name, times in seconds.items()}


def _num_layers(layer: Layer, device: str) -> int:
    size = layer.cache.numel() * layer.cache.element_size()
    wanted = -(-CACHE_BYTES[device] // size)
    return max(2, min(MOST_LAYERS, wanted, MOST_BYTES[device] // size))


def _check(name: str, out: torch.Tensor, layer: Layer) -> None:
    for row in {0, layer.point.width - 1}:
        wanted = expected(layer, row, transposed=layer.query.device.type == "cpu")
        error = float((out[row].double() - wanted).abs().max())
        assert error <= TOLERANCE[layer.point.dtype], f"{name} at {layer.point}: error {error:.1e}"


def _pass(
    name: str, steps: list[Run], device: str, say: Callable[[str], None]
) -> Callable[[], Any]:
    """One run of every layer; on a GPU as a graph, so that launches are not what is measured."""

    def run() -> None:
        for step in steps:
            step()

    if device != "cuda":
        return run
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as error:
        say(f"{name}: without a graph, {error}")
        torch.cuda.synchronize()
        return run
    return graph.replay


def _seconds(run: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _summary(times: list[float], base: list[float]) -> dict[str, float]:
    ratios = [theirs / own for own, theirs in zip(times, base, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "seconds": statistics.median(times),
        "speedup": statistics.median(ratios),
        "low": quartiles[0],
        "high": quartiles[2],
    }
