"""INV-1: a batch without groups, on vLLM with and without the plugin, in turn.

Two engines in two processes take turns at the same batch; the tokens must be the same, and the
ratio of their times is taken round by round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

from tests.bench.engine import forever, make_llm, prompt_of

BLOCK_SIZE = 32
NUM_ROWS = 8
NUM_TOKENS = 64


def serve(model: str, with_plugin: bool) -> None:
    """Answer every line on standard input with one run of the batch."""
    options = {"profile": "multiverse"} if with_plugin else None
    # The plugin's own block size for both: smaller blocks let more of a prompt hit the cache.
    llm = make_llm(model, options, max_model_len=2048, block_size=BLOCK_SIZE)
    prompts = [prompt_of(32 + row) for row in range(NUM_ROWS)]
    params = forever(NUM_TOKENS)
    llm.generate(prompts, params, use_tqdm=False)
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        print(json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)


class Peer:
    """An engine in a process of its own."""

    def __init__(self, model: str, with_plugin: bool) -> None:
        command = [sys.executable, "-m", "tests.bench.unbranched", "--model", model, "--serve"]
        command.append("plugin" if with_plugin else "plain")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._read()

    def run(self) -> dict[str, Any]:
        """Run the batch once."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError("the engine's process ended")


def measure(model: str, rounds: int) -> dict[str, Any]:
    """Let both engines take turns; the order changes from round to round."""
    peers = {name: Peer(model, name == "plugin") for name in ("plain", "plugin")}
    try:
        ratios, seconds = [], {"plain": [], "plugin": []}
        for number in range(rounds):
            order = list(peers) if number % 2 else list(peers)[::-1]
            results = {name: peers[name].run() for name in order}
            assert results["plain"]["tokens"] == results["plugin"]["tokens"]
            for name in peers:
                seconds[name].append(results[name]["seconds"])
            ratios.append(results["plugin"]["seconds"] / results["plain"]["seconds"])
    finally:
        for peer in peers.values():
            peer.close()
    per_token = {n: 1000 * statistics.median(s) / NUM_TOKENS for n, s in seconds.items()}
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return {
        "rows": NUM_ROWS,
        "plain_ms_per_step": per_token["plain"],
        "plugin_ms_per_step": per_token["plugin"],
        "ratio": statistics.median(ratios),
        "ratio_low": quartiles[0],
        "ratio_high": quartiles[2],
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--serve", choices=["plain", "plugin"])
    args = parser.parse_args()
    if args.serve:
        serve(args.model, args.serve == "plugin")
    else:
        print(json.dumps(measure(args.model, args.rounds)), flush=True)


if __name__ == "__main__":
    main()
