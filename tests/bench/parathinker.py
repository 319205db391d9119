"""ParaThinker's figures: P paths over one, the summary's start, and votes at an equal budget.

Three tables, as lines of JSON. ``time``: P paths of equal length over one, and the step of P
branches over the step of P plain requests on the same prompt. ``summary``: from the last path's
end to the summary's first token, K/V reused and prefilled again. ``votes``: one chain, a majority
of independent answers, and paths with a summary, on the same questions with the same budget.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench.engine import NEVER, forever, make_llm, prompt_of
from tests.bench.joins import JoinProbe

PATH_TOKENS = 128
SUMMARY_TOKENS = 8
WIDTHS = (1, 2, 4, 8, 16)
BUDGET = 256
"""Tokens that a question may cost by any method: a share for each voter, or paths and a summary."""
NUM_VOTERS = 4
SUMMARY_SHARE = SUMMARY_TOKENS // NUM_VOTERS
TEMPERATURE = 0.5
ANSWER = r"Answer:\s*(-?\d+)"


def write_profile(name: str, path_start: str, path_end: str, join_start: str) -> str:
    """Write a profile of paths right behind the prompt; arguments are TOML values."""
    path = Path(tempfile.mkdtemp(prefix="parallel-think-bench-")) / f"{name}.toml"
    path.write_text(
        f"""
name = "{name}"
summary = "paths behind the prompt"
max_depth = 1
[fork]
at_start = true
num_paths = 2
[path]
start = {path_start}
end = {path_end}
[join]
start = {join_start}
""",
        "utf-8",
    )
    return str(path)


class StepClock:
    """Times of the steps in which so many requests decode one token each."""

    def __init__(self, llm: Any) -> None:
        self._last: tuple[float, int] | None = None
        self.width = 0
        self.times: list[float] = []
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        schedule = scheduler.schedule

        def clocked(*args: Any, **kwargs: Any) -> Any:
            now = time.perf_counter()
            if self._last is not None and self._last[1] == self.width:
                self.times.append(now - self._last[0])
            output = schedule(*args, **kwargs)
            counts = output.num_scheduled_tokens.values()
            width = len(counts) if set(counts) == {1} else 0
            self._last = (now, width)
            return output

        scheduler.schedule = clocked

    def median(self, width: int, run: Any) -> float:
        """Run something; return the median step in which so many requests decode."""
        self._last, self.width, self.times = None, width, []
        run()
        return statistics.median(self.times)


def measure_time(llm: Any, rounds: int, widths: list[int]) -> None:
    """Print one line for every number of paths."""
    clock = StepClock(llm)
    prompt, heading = prompt_of(512), 3

    def paths(width: int) -> Any:
        extra = {"pt_num_paths": width, "pt_path_tokens": PATH_TOKENS}
        params = forever(100_000, **extra, pt_summary_tokens=SUMMARY_TOKENS)
        return llm.generate([prompt], params, use_tqdm=False)

    def plain(width: int) -> None:
        params = forever(PATH_TOKENS + heading, parallel_think="off")
        llm.generate([prompt] * width, params, use_tqdm=False)

    paths(2), plain(2)
    for width in widths:
        ratios, steps, seconds = [], [], []
        for _ in range(rounds):
            start = time.perf_counter()
            paths(1)
            one = time.perf_counter() - start
            start = time.perf_counter()
            ours = clock.median(width, lambda: paths(width))  # noqa: B023
            seconds.append(time.perf_counter() - start)
            ratios.append(seconds[-1] / one)
            steps.append(ours / clock.median(width, lambda: plain(width)))  # noqa: B023
        row = {"table": "time", "paths": width, "seconds": statistics.median(seconds)}
        row |= {"over_one": statistics.median(ratios), "step_over_plain": statistics.median(steps)}
        row |= {"step_min": min(steps), "step_max": max(steps)}
        print(json.dumps(row), flush=True)


def measure_summary(llm: Any, rounds: int) -> None:
    """Print the summary's start for growing numbers and lengths of paths."""
    probe = JoinProbe(llm)
    for width, length in ((2, 128), (4, 128), (8, 128), (8, 256), (8, 512)):
        times: dict[str, list[float]] = {"kv": [], "reprefill": []}
        for _ in range(rounds):
            for mode in times:
                probe.reset()
                extra = {"pt_num_paths": width, "pt_path_tokens": length, "pt_join": mode}
                params = forever(100_000, **extra, pt_summary_tokens=2)
                llm.generate([prompt_of(64)], params, use_tqdm=False)
                times[mode].append(probe.first_token_at - probe.joined_at)
        row = {"table": "summary", "paths": width, "path_tokens": length}
        row |= {f"{mode}_ms": 1000 * statistics.median(values) for mode, values in times.items()}
        print(json.dumps(row), flush=True)


def measure_votes(llm: Any, num_questions: int) -> None:
    """Print how many answers are right by each method, and what they cost."""
    from vllm import SamplingParams

    from spec_decode.tasks.arithmetic import make_problems
    from spec_decode.training.evaluate import interval
    from spec_decode.vocabulary import line_ids
    from vllm_parallel_think.core.fork_join.vote import extract

    problems = make_problems(num_questions, seed=5)
    share = BUDGET // NUM_VOTERS
    paths = {"parallel_think": "bench-attempts", "pt_num_paths": NUM_VOTERS}
    with_summary = {"pt_path_tokens": share - SUMMARY_SHARE, "pt_summary_tokens": SUMMARY_TOKENS}
    ends = {"stop_token_ids": sorted(line_ids(llm.get_tokenizer()))}
    methods = {
        "one chain": ({"parallel_think": "off"}, BUDGET, ends),
        f"majority of {NUM_VOTERS}": (
            {**paths, "pt_path_tokens": share, "pt_vote": True},
            BUDGET,
            ends,
        ),
    }
    for join in ("kv", "reprefill"):
        # Their text has words that the model did not write; the budgets bound what it writes.
        extra = {**paths, **with_summary, "pt_join": join}
        methods[f"{NUM_VOTERS} paths, summary by {join}"] = (extra, 2 * BUDGET, {})
    for name, (extra, max_tokens, stops) in methods.items():
        # A path with a summary begins with what ends the prompts of the other two.
        prompts = [p.question if stops else p.question.removesuffix("\nA:") for p in problems]
        params = SamplingParams(
            temperature=TEMPERATURE, seed=1, max_tokens=max_tokens, extra_args=extra, **stops
        )
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        right = tokens = 0
        for output, problem in zip(outputs, problems, strict=True):
            text = output.outputs[0].text
            right += extract(text, re.compile(ANSWER)) == problem.answer
            summary = (output.kv_transfer_params or {}).get("parallel_think")
            tokens += summary["generated_tokens"] if summary else len(output.outputs[0].token_ids)
        low, high = interval(right, num_questions)
        row = {"table": "votes", "method": name, "right": right, "questions": num_questions}
        row |= {"low": low, "high": high, "tokens": tokens / num_questions, "seconds": seconds}
        print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=128)
    parser.add_argument("--paths", type=int, nargs="+", default=list(WIDTHS), help="of time")
    parser.add_argument("--table", choices=["time", "summary", "votes"])
    args = parser.parse_args()
    options = {
        "profile": write_profile("bench-paths", r'"\n{name}."', NEVER, r'"\nSo"'),
        "profiles": [write_profile("bench-attempts", r'"\nA:"', r'"\n"', r'"\nAnswer:"')],
        "max_paths": 16,
        "vote_pattern": ANSWER,
    }
    llm = make_llm(args.model, options, max_model_len=8192)
    if args.table in (None, "time"):
        measure_time(llm, args.rounds, args.paths)
    if args.table in (None, "summary"):
        measure_summary(llm, args.rounds)
    if args.table in (None, "votes"):
        measure_votes(llm, args.questions)


if __name__ == "__main__":
    main()
