"""Time of 1, 2, 4 and 8 paths of 128 tokens over the time of one chain of the same tokens."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

from tests.bench.engine import bench_profile, forever, make_llm, prompt_of

PATH_TOKENS = 128
CONCLUSION_TOKENS = 8
WIDTHS = (2, 4, 8)


def timed(llm: Any, prompt: dict[str, Any], params: Any) -> tuple[float, Any]:
    """Return the seconds one request takes, and its output."""
    start = time.perf_counter()
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    return time.perf_counter() - start, output


def measure(llm: Any, width: int, rounds: int) -> dict[str, Any]:
    """Run both forms in turn and return medians, with the parallel form's summary."""
    prompt = prompt_of(64)
    parallel = forever(100_000, parallel_think=f"bench-{width}", pt_path_tokens=PATH_TOKENS)
    # The whole answer: one token of trunk, the paths with their headings, and the conclusion.
    tokenizer = llm.get_tokenizer()
    heading = len(tokenizer.encode("\n1.", add_special_tokens=False))
    join = len(tokenizer.encode("\nSo", add_special_tokens=False))
    parallel.max_tokens = 1 + width * (heading + PATH_TOKENS) + join + CONCLUSION_TOKENS
    chain = forever(parallel.max_tokens, parallel_think="off")
    ratios, together, alone, summary = [], [], [], {}
    for _ in range(rounds):
        seconds, output = timed(llm, prompt, parallel)
        summary = output.kv_transfer_params["parallel_think"]
        assert summary["widest_fork"] == width
        assert len(output.outputs[0].token_ids) == parallel.max_tokens
        other, plain = timed(llm, prompt, chain)
        assert len(plain.outputs[0].token_ids) == parallel.max_tokens
        together.append(seconds)
        alone.append(other)
        ratios.append(seconds / other)
    return {
        "paths": width,
        "tokens": parallel.max_tokens,
        "parallel_s": statistics.median(together),
        "chain_s": statistics.median(alone),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "parallelism_ratio": summary["parallelism_ratio"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    profiles = [bench_profile(width) for width in WIDTHS]
    llm = make_llm(args.model, {"profile": "off", "profiles": profiles}, max_model_len=4096)
    timed(llm, prompt_of(64), forever(8, parallel_think="off"))
    for width in WIDTHS:
        print(json.dumps(measure(llm, width, args.rounds)), flush=True)


if __name__ == "__main__":
    main()
