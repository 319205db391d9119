"""All benchmarks, each in a process of its own, as tables with bars: ``python -m tests.bench``."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

console = Console(width=max(110, Console().width))
BAR_WIDTH = 30
LONG = ("parathinker", "serving", "hogwild")
"""Run only where they are named."""


def rows(module: str, model: str, extra: list[str]) -> Iterator[dict[str, Any]]:
    """Run one benchmark and yield its result lines as they come."""
    command = [sys.executable, "-m", f"tests.bench.{module}", "--model", model, *extra]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout is not None and process.stderr is not None
    for line in process.stdout:
        if line.startswith("{"):
            yield json.loads(line)
    errors = process.stderr.read()
    if process.wait():
        raise SystemExit(f"{' '.join(command)} failed:\n{errors[-3000:]}")


def bar(share: float) -> str:
    """Draw a share of one."""
    return "█" * max(1, round(BAR_WIDTH * min(share, 1.0)))


def paths(model: str, extra: list[str]) -> None:
    table = Table(title="Paths of 128 tokens side by side, over one chain of the same tokens")
    for name in ("paths", "tokens", "parallel s", "chain s", "ratio (min-max)", "parallelism", ""):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row("1", "", "", "", "1.00", "1.00", bar(1))
    with console.status("paths: SmolLM2, paired runs"):
        for row in rows("paths", model, extra):
            spread = f"{row['ratio']:.2f} ({row['ratio_min']:.2f}-{row['ratio_max']:.2f})"
            table.add_row(
                str(row["paths"]),
                str(row["tokens"]),
                f"{row['parallel_s']:.1f}",
                f"{row['chain_s']:.1f}",
                spread,
                f"{row['parallelism_ratio']:.2f}",
                bar(row["ratio"]),
            )
    console.print(table)


def joins(model: str, extra: list[str]) -> None:
    table = Table(title="Join of 4 paths: from the last path's end to the conclusion's first token")
    for name in (
        "path tokens",
        "K/V reused",
        "computed",
        "prefilled again",
        "computed",
        "blocks",
        "bound",
    ):
        table.add_column(name, justify="right")
    table.add_column("K/V reused / prefilled again")
    with console.status("joins: SmolLM2, paired runs"):
        for row in rows("joins", model, extra):
            table.add_row(
                str(row["path_tokens"]),
                f"{row['kv_ms']:.0f} ms",
                str(row["kv_computed"]),
                f"{row['reprefill_ms']:.0f} ms",
                str(row["reprefill_computed"]),
                str(row["blocks"]),
                str(row["blocks_bound"]),
                f"{bar(row['ratio'])} {row['ratio']:.2f}",
            )
    console.print(table)


PARATHINKER = {
    "time": (
        "P paths of 128 tokens behind the prompt, over one",
        "the summary's 8 tokens included",
    ),
    "summary": ("From the last path's end to the summary's first token", ""),
    "votes": ("The same questions and budget of tokens", "95 % confidence intervals"),
}


def parathinker(model: str, extra: list[str]) -> None:
    tables: dict[str, Table] = {}
    with console.status("parathinker: SmolLM2, paired runs"):
        for row in rows("parathinker", model, extra):
            name = row.pop("table")
            if name not in tables:
                title, caption = PARATHINKER[name]
                tables[name] = Table(*row, title=title, caption=caption)
            tables[name].add_row(
                *(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values())
            )
    for table in tables.values():
        console.print(table)


def unbranched(model: str, extra: list[str]) -> None:
    table = Table(title="A batch without groups: vLLM with the plugin over vLLM without it")
    for name in ("rows", "plain ms/step", "plugin ms/step", "ratio (quartiles)", "rounds"):
        table.add_column(name, justify="right")
    with console.status("unbranched: two engines in turn"):
        for row in rows("unbranched", model, extra):
            table.add_row(
                str(row["rows"]),
                f"{row['plain_ms_per_step']:.1f}",
                f"{row['plugin_ms_per_step']:.1f}",
                f"{row['ratio']:.3f} ({row['ratio_low']:.3f}-{row['ratio_high']:.3f})",
                str(row["rounds"]),
            )
    console.print(table)


def observing(model: str, extra: list[str]) -> None:
    table = Table(title="Groups with metrics over groups without, and the time spent on metrics")
    for name in ("groups", "branches", "ms/step", "metrics µs/step", "ratio (quartiles)", "rounds"):
        table.add_column(name, justify="right")
    with console.status("observing: one engine, with and without in turn"):
        for row in rows("observing", model, extra):
            table.add_row(
                str(row["groups"]),
                str(row["branches"]),
                f"{row['step_ms']:.1f}",
                f"{row['observer_us_per_step']:.0f}",
                f"{row['ratio']:.3f} ({row['ratio_low']:.3f}-{row['ratio_high']:.3f})",
                str(row["rounds"]),
            )
    console.print(table)


def serving(model: str, extra: list[str]) -> None:
    table = Table(title="A step of W branches through `vllm serve`, beside W plain requests")
    for name in ("prefix", "branches", "branches ms", "plain ms", "speed-up (min-max)"):
        table.add_column(name, justify="right")
    with console.status("serving: a real server, paired runs"):
        for row in rows("serving", model, extra):
            table.add_row(
                str(row["prefix"]),
                str(row["branches"]),
                f"{row['branch_ms']:.0f}",
                f"{row['plain_ms']:.0f}",
                f"{row['speedup']:.2f} ({row['low']:.2f}-{row['high']:.2f})",
            )
    console.print(table)


def hogwild(model: str, extra: list[str]) -> None:
    table = Table(
        title="Tokens a second of W workers that see each other, of one request, of W plain ones",
        caption="steps of 24 tokens; 48 steps of the engine behind the prompt; medians",
    )
    for name in ("context", "W", "workers", "one", "W plain", "over one", "over plain (min-max)"):
        table.add_column(name, justify="right")
    table.add_column("workers over W times one")
    with console.status("hogwild: SmolLM2, paired runs"):
        for row in rows("hogwild", model, extra):
            table.add_row(
                str(row["context"]),
                str(row["workers"]),
                f"{row['tokens_s']:.1f}",
                f"{row['one']:.1f}",
                f"{row['apart']:.1f}",
                f"{row['over_one']:.2f} ({row['apart_over_one']:.2f} plain)",
                f"{row['over_apart']:.2f} ({row['low']:.2f}-{row['high']:.2f})",
                bar(row["over_one"] / row["workers"]),
            )
    console.print(table)


def main() -> None:
    benches = {
        "paths": paths,
        "joins": joins,
        "unbranched": unbranched,
        "parathinker": parathinker,
        "observing": observing,
        "serving": serving,
        "hogwild": hogwild,
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--only", choices=list(benches))
    parser.add_argument("--rounds", help="paired runs of each measurement")
    args = parser.parse_args()
    extra = ["--rounds", args.rounds] if args.rounds else []
    for name, bench in benches.items():
        if args.only == name or (args.only is None and name not in LONG):
            bench(args.model, extra)


if __name__ == "__main__":
    main()
