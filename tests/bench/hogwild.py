"""Tokens a second of W workers that see each other, beside one request and W plain ones."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench.engine import forever, make_llm

WIDTHS = (1, 2, 4, 8)
CONTEXTS = (512, 1024, 2048, 4096, 8192)
STEPS = 48
"""Steps of the engine that are timed; each worker ends two steps of its own in them."""

_ids = itertools.count()


def recipe() -> str:
    """Write a recipe whose steps end after so many tokens, and only a budget ends the work."""
    path = Path(tempfile.mkdtemp(prefix="parallel-think-bench-")) / "bench.toml"
    names = ", ".join(f'"W{number}"' for number in range(16))
    path.write_text(
        f"""
name = "bench"
summary = "steps of 24 tokens"
[workers]
names = [{names}]
max_tokens = 100000
step = "**{{name}} [{{number}}]:** "
others = "### Work in progress (others)\\n\\n"
own = "\\n\\n### Work in progress (own)\\n\\n"
max_step_tokens = 24
[answer]
forced = "The answer is"
""",
        "utf-8",
    )
    return str(path)


def prompt(num_tokens: int) -> dict[str, Any]:
    """Return a prompt that no other one begins like."""
    own = next(_ids)
    return {"prompt_token_ids": [1000 + (7 * i + 31 * own) % 4001 for i in range(num_tokens)]}


def seconds_of_a_step(llm: Any, requests: list[Any], context: int, num_rows: int) -> float:
    """Return the mean time of a step once all prompts are computed, then drop the requests."""
    core = llm.llm_engine
    scheduler = core.engine_core.engine_core.scheduler
    for params in requests:
        core.add_request(f"bench-{next(_ids)}", prompt(context), params)
    # Rows that decode: in the engine when each of them computes one token.
    while len(scheduler.running) < num_rows or any(
        request.num_tokens - request.num_computed_tokens > 1 for request in scheduler.running
    ):
        core.step()
    for _ in range(4):
        core.step()
    start = time.perf_counter()
    for _ in range(STEPS):
        core.step()
    taken = (time.perf_counter() - start) / STEPS
    roots = {r.request_id.split("#")[0] for r in scheduler.requests.values()}
    core.abort_request(sorted(roots), internal=True)
    while core.has_unfinished_requests():
        core.step()
    core.step()
    return taken


def measure(llm: Any, context: int, width: int, rounds: int) -> dict[str, Any]:
    """Return medians over rounds in which all three take their turn."""
    plain = forever(100_000, parallel_think="off")
    workers = forever(100_000, parallel_think="bench", pt_num_workers=width)
    together, alone, apart = [], [], []
    for _ in range(rounds):
        if width > 1:
            together.append(seconds_of_a_step(llm, [workers], context, width))
        apart.append(seconds_of_a_step(llm, [plain] * width, context, width))
        alone.append(seconds_of_a_step(llm, [plain], context, 1))
    if width == 1:
        together = apart
    pairs = list(zip(together, alone, apart, strict=True))
    return {
        "context": context,
        "workers": width,
        "tokens_s": width / statistics.median(together),
        "one": 1 / statistics.median(alone),
        "apart": width / statistics.median(apart),
        "over_one": statistics.median(width * one / all_ for all_, one, _ in pairs),
        "apart_over_one": statistics.median(width * one / each for _, one, each in pairs),
        "over_apart": statistics.median(each / all_ for all_, _, each in pairs),
        "low": min(each / all_ for all_, _, each in pairs),
        "high": max(each / all_ for all_, _, each in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    args = parser.parse_args()
    longest = max(args.contexts) + 2048
    # Rows of a context each, and what workers write.
    llm = make_llm(
        args.model,
        {"profile": "off", "profiles": [recipe()]},
        max_model_len=longest,
        max_num_batched_tokens=2048,
        hf_overrides={"max_position_embeddings": max(longest, 8192)},
    )
    for context in args.contexts:
        for width in args.widths:
            print(json.dumps(measure(llm, context, width, args.rounds)), flush=True)


if __name__ == "__main__":
    main()
