"""Step time of W branches behind one prefix through ``vllm serve``, beside W plain requests.

The plain requests find the same prefix in vLLM's prefix cache: it is stored once for them too, but
read once a request. A step's time is the difference between long and short answers over the
difference in their tokens, so that prefill, join and HTTP cancel. Lines of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench.engine import NEVER, prompt_of
from tests.bench.parathinker import write_profile
from tests.support.server import Server

PREFIXES = (256, 2048, 8192)
WIDTHS = (1, 2, 4, 8, 16)
SHORT, LONG = 8, 56
MAX_MODEL_LEN = 12288


def start_server(model: Path, folder: Path) -> Server:
    profile = write_profile("bench-paths", r'"\n{name}."', NEVER, r'"\nSo"')
    options = {"profile": profile, "max_paths": max(WIDTHS)}
    positions = json.dumps({"max_position_embeddings": MAX_MODEL_LEN})
    server = Server(
        model, folder / "server.log", options,
        "--max-model-len", str(MAX_MODEL_LEN), "--hf-overrides", positions,
        "--max-num-seqs", "32", "--disable-uvicorn-access-log",
    )  # fmt: skip
    server.wait_ready()
    return server


def ask(server: Server, prompt: list[int], max_tokens: int, **xargs: Any) -> None:
    """Complete a prompt greedily, whatever the model thinks of an end."""
    body = {"prompt": prompt, "temperature": 0, "ignore_eos": True, "max_tokens": max_tokens}
    response = server.post("/v1/completions", **body, vllm_xargs=xargs)
    assert response.status_code == 200, response.text


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class Steps:
    """Step times on one server."""

    def __init__(self, server: Server, pool: ThreadPoolExecutor) -> None:
        self._server = server
        self._pool = pool

    def branches(self, prompt: list[int], width: int) -> float:
        """Seconds of a step in which so many branches of one request decode."""

        def run(tokens: int) -> None:
            paths = {"pt_num_paths": width, "pt_path_tokens": tokens, "pt_summary_tokens": 1}
            ask(self._server, prompt, 10_000, **paths)

        return self._slope(run)

    def plain(self, prompt: list[int], width: int) -> float:
        """Seconds of a step in which so many requests with one prompt decode."""

        def run(tokens: int) -> None:
            one = [
                self._pool.submit(ask, self._server, prompt, tokens, parallel_think="off")
                for _ in range(width)
            ]
            for future in one:
                future.result()

        return self._slope(run)

    @staticmethod
    def _slope(run: Callable[[int], None]) -> float:
        short, long = (seconds(partial(run, n)) for n in (SHORT, LONG))
        return (long - short) / (LONG - SHORT)


def measure(steps: Steps, prefix: int, width: int, rounds: int) -> dict[str, Any]:
    """Paired rounds of one point."""
    prompt = prompt_of(prefix)["prompt_token_ids"]
    branches, plain = [], []
    for _ in range(rounds):
        branches.append(steps.branches(prompt, width))
        plain.append(steps.plain(prompt, width))
    ratios = [theirs / ours for ours, theirs in zip(branches, plain, strict=True)]
    row: dict[str, Any] = {"prefix": prefix, "branches": width}
    row |= {"branch_ms": 1000 * statistics.median(branches)}
    row |= {"plain_ms": 1000 * statistics.median(plain)}
    return row | {"speedup": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prefixes", type=int, nargs="+", default=list(PREFIXES))
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(max(args.widths)) as pool:
        server = start_server(args.model, Path(folder))
        try:
            for prefix in args.prefixes:
                ask(server, prompt_of(prefix)["prompt_token_ids"], 1, parallel_think="off")
                for width in args.widths:
                    row = measure(Steps(server, pool), prefix, width, args.rounds)
                    print(json.dumps(row), flush=True)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
