"""Attention over a shared prefix: ``python -m tests.bench.attention``, `--quick` for minutes.

Writes a line of JSON per point as it goes, goes on where it stopped, and ends with a table and a
picture. Where a GPU is at hand it measures that, everything in one command.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from rich.console import Console
from rich.table import Table

from tests.bench.attention.contenders import CONTENDERS, TUNINGS
from tests.bench.attention.measure import copy_bandwidth, matmul_rate, measure
from tests.bench.attention.picture import draw
from tests.bench.attention.problems import DTYPES, HEADS, MODELS, Point

console = Console(width=None if sys.stdout.isatty() else 120)
BLOCK_SIZE = {"cpu": 32, "cuda": 16}
OURS = {"cpu": "cpu", "cuda": "triton"}
COLUMNS = (
    "model", "type", "P", "W", "S", "", "us", "speed-up", "of bound", "of copy", "of matmul",
)  # fmt: skip


def grid(device: str, quick: bool, dtypes: list[str]) -> list[Point]:
    """The aims' points first, then the grid; points of more than 2 GiB on a CPU are left out."""
    aims = [
        Point("SmolLM2-135M", "float32", 4096, 8, 64, BLOCK_SIZE[device]),
        Point("SmolLM2-135M", "float32", 16384, 8, 64, BLOCK_SIZE[device]),
        Point("SmolLM2-135M", "float32", 4096, 8, 64, BLOCK_SIZE[device], shared=False),
        Point("SmolLM2-135M", "float32", 512, 8, 64, BLOCK_SIZE[device], shared=False),
    ]
    if device == "cuda":
        aims = [
            Point("Qwen2.5-7B", "bfloat16", 8192, 8, 512, BLOCK_SIZE[device]),
            Point("Qwen2.5-7B", "bfloat16", 32768, 32, 512, BLOCK_SIZE[device]),
            Point("Qwen2.5-7B", "bfloat16", 8192, 8, 512, BLOCK_SIZE[device], shared=False),
            Point("Qwen2.5-7B", "bfloat16", 32768, 32, 512, BLOCK_SIZE[device], shared=False),
        ]
    sizes: tuple[tuple[int, ...], ...] = (
        (512, 1024, 2048, 4096, 8192, 16384, 32768),
        (1, 2, 4, 8, 16, 32, 64),
        (64, 256, 1024, 2048),
    )
    models = list(MODELS)
    if quick:
        sizes, models = ((512, 4096, 16384), (1, 2, 8), (64,)), models[:2]
    points = [
        Point(model, dtype, prefix, width, suffix, BLOCK_SIZE[device])
        for model, dtype, suffix, width, prefix in itertools.product(
            models, dtypes, sizes[2], sizes[1], sizes[0]
        )
    ]
    fits = [p for p in points if device == "cuda" or p.unique_bytes <= 2 << 30]
    return list(dict.fromkeys(aims + fits))


def gate_points(device: str) -> list[Point]:
    """Few rows over short prefixes: where sharing begins to pay."""
    dtype = "float32" if device == "cpu" else "bfloat16"
    return [
        Point(model, dtype, prefix, width, 64, BLOCK_SIZE[device])
        for model, width, prefix in itertools.product(HEADS, (2, 3, 4, 8), (256, 1024, 4096))
    ]


def tuning_points() -> list[Point]:
    """A row alone, a few, and many; short, middle and long prefixes."""
    return [
        Point("Qwen2.5-7B", "bfloat16", prefix, width, 512, BLOCK_SIZE["cuda"])
        for prefix, width in itertools.product((1024, 8192, 32768), (1, 8, 32))
    ]


def table_of(records: list[dict[str, Any]]) -> Table:
    table = Table(title="Attention of one layer; speed-up over the first contender (quartiles)")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("model", "type", "") else "right")
    for record in records:
        point = record["point"]
        prefix = str(point["prefix"]) + ("" if point["shared"] else " own")
        for name, result in record["contenders"].items():
            share = record["unique_bytes"] / result["seconds"] / record["copy_bandwidth"]
            products = record["multiply_adds"] / result["seconds"] / record["matmul_rate"]
            table.add_row(
                point["model"], point["dtype"], prefix, str(point["width"]), str(point["suffix"]),
                name, f"{result['seconds'] * 1e6:.0f}",
                f"{result['speedup']:.2f} ({result['low']:.2f}-{result['high']:.2f})",
                f"{result['speedup'] / record['bound']:.0%}", f"{share:.0%}", f"{products:.0%}",
            )  # fmt: skip
        table.add_section()
    return table


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small grid, some minutes")
    parser.add_argument("--gate", action="store_true", help="where sharing begins to pay")
    parser.add_argument("--tune", action="store_true", help="other tunings of the Triton kernel")
    parser.add_argument("--hot", action="store_true", help="one layer over and over: warm caches")
    parser.add_argument("--rounds", type=int, default=9, help="paired rounds of each point")
    parser.add_argument("--points", type=int, help="only the first points")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--dtypes", default="float32" if device == "cpu" else "bfloat16")
    parser.add_argument("--out", type=Path, default=Path("build/bench-attention"))
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.tune and device != "cuda":
        parser.error("--tune measures what only a GPU can tell; there is none here")
    if args.tune:
        points = tuning_points()
    elif args.gate:
        points = gate_points(device)
    else:
        points = grid(device, args.quick, args.dtypes.split(","))
    records = run(points[: args.points], device, args)
    console.print(table_of(records))
    if args.tune:
        return
    picture = args.out / f"{device}.svg"
    picture.write_text(draw(records, OURS[device]))
    console.print(f"picture: {picture}")


def run(points: list[Point], device: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures what the results file does not have yet; returns the records of `points`."""
    args.out.mkdir(parents=True, exist_ok=True)
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "cpu"
    label = f"{machine}, {torch.get_num_threads()} threads" + (", hot" if args.hot else "")
    label += ", tunings" if args.tune else ""
    contenders = TUNINGS if args.tune else CONTENDERS[device]
    path = args.out / "results.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = [r for r in map(json.loads, lines) if "matmul_rate" in r]  # not an older version's
    known = {(r["machine"], r["key"]): r for r in found}
    bandwidth, told = copy_bandwidth(device), set[str]()
    rates = {name: matmul_rate(device, DTYPES[name]) for name in {p.dtype for p in points}}
    console.print(f"{label}: copy {bandwidth / 1e9:.1f} GB/s read and written; {path}")

    def say(message: str) -> None:
        if message not in told:
            told.add(message)
            console.print(message)

    with path.open("a") as file:
        for number, point in enumerate(points, start=1):
            if (label, point.key) in known:
                continue
            with console.status(f"{number} of {len(points)}: {point.key}"):
                results = measure(point, device, contenders, args.rounds, say, args.hot)
            record = {
                "machine": label,
                "key": point.key,
                "point": asdict(point),
                "unique_bytes": point.unique_bytes,
                "bound": point.bound,
                "copy_bandwidth": bandwidth,
                "multiply_adds": point.multiply_adds,
                "matmul_rate": rates[point.dtype],
                "contenders": results,
            }
            known[label, point.key] = record
            file.write(json.dumps(record) + "\n")
            file.flush()
            best = results.get(OURS[device])
            console.print(f"{number} of {len(points)}: {point.key}", end="")
            console.print(f": {best['speedup']:.2f} of {point.bound:.2f}" if best else "")
    return [known[label, point.key] for point in points]


if __name__ == "__main__":
    main()
