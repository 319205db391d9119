"""What metrics cost: a batch of groups with and without them, in turn, and the time inside them.

The paired ratio says whether the difference can be seen at all; the processor time spent inside the
observer is its cost without the noise of the model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

from tests.bench.engine import bench_profile, forever, make_llm, prompt_of

NUM_GROUPS, NUM_PATHS, PATH_TOKENS = 8, 4, 16
EVENTS = ("started", "changed", "ended", "stepped")


class Stopwatch:
    """Adds up the processor time an observer takes, and counts engine steps."""

    def __init__(self, scheduler: Any) -> None:
        self.seconds = 0.0
        self.steps = 0
        observer = scheduler.observer
        for event in EVENTS:
            setattr(observer, event, self._timed(getattr(observer, event)))
        schedule = scheduler.schedule

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.steps += 1
            return schedule(*args, **kwargs)

        scheduler.schedule = counted

    def _timed(self, event: Any) -> Any:
        def timed(*args: Any) -> None:
            start = time.thread_time()  # not what others on the machine take meanwhile
            event(*args)
            self.seconds += time.thread_time() - start

        return timed

    def take(self) -> tuple[float, int]:
        """Return the seconds and the steps since the last call."""
        taken = self.seconds, self.steps
        self.seconds, self.steps = 0.0, 0
        return taken


def measure(model: str, rounds: int) -> dict[str, Any]:
    """Let the same batch run with and without viewers, in turn."""
    profiles = [bench_profile(NUM_PATHS)]
    llm = make_llm(
        model, {"profile": "off", "profiles": profiles}, max_model_len=2048, disable_log_stats=False
    )
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    viewers = scheduler.observer._viewers
    assert list(viewers) == ["metrics"]
    watch = Stopwatch(scheduler)
    name = f"bench-{NUM_PATHS}"
    params = forever(100_000, parallel_think=name, pt_path_tokens=PATH_TOKENS)
    params.max_tokens = 1 + NUM_PATHS * (PATH_TOKENS + 4) + 8
    prompts = [prompt_of(32 + row) for row in range(NUM_GROUPS)]
    llm.generate(prompts, params, use_tqdm=False)
    ratios, inside, per_step = [], [], []
    for number in range(rounds):
        seconds = {}
        for on in ((True, False), (False, True))[number % 2]:
            scheduler.observer._viewers = viewers if on else {}
            watch.take()
            start = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            seconds[on] = time.perf_counter() - start
            spent, steps = watch.take()
            if on:
                inside.append(1e6 * spent / steps)
                per_step.append(1e3 * seconds[on] / steps)
        ratios.append(seconds[True] / seconds[False])
        print(
            f"round {number + 1}: {seconds[True]:.1f} s with, {seconds[False]:.1f} s without, "
            f"{inside[-1]:.0f} µs of {per_step[-1]:.0f} ms a step",
            file=sys.stderr,
            flush=True,
        )
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return {
        "groups": NUM_GROUPS,
        "branches": NUM_GROUPS * NUM_PATHS,
        "step_ms": statistics.median(per_step),
        "observer_us_per_step": statistics.median(inside),
        "ratio": statistics.median(ratios),
        "ratio_low": quartiles[0],
        "ratio_high": quartiles[2],
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    print(json.dumps(measure(args.model, args.rounds)), flush=True)


if __name__ == "__main__":
    main()
