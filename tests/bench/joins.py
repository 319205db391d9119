"""What a join costs: K/V reused against a linear prefill, for paths of 64 to 1024 tokens.

Measured from the step in which the last path ended to the conclusion's first token. Also counts the
tokens that had to be computed there, and the KV blocks held against their bound.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

from tests.bench.engine import bench_profile, forever, make_llm, prompt_of

NUM_PATHS = 4
LENGTHS = (64, 128, 256, 512, 1024)


class JoinProbe:
    """Watches one group at a time."""

    def __init__(self, llm: Any) -> None:
        from vllm_parallel_think.core.branch_graph import Kind
        from vllm_parallel_think.core.fork_join.group import ForkJoinGroup
        from vllm_parallel_think.core.fork_join.joins import Joins

        self.scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        self.joined_at = self.first_token_at = 0.0
        self.num_computed = self.peak_blocks = self.num_tokens = self.num_branches = 0
        probe, join, feed = self, Joins._join, ForkJoinGroup.feed
        schedule = self.scheduler.schedule

        def timed_join(joins: Joins, fork: Any) -> None:
            probe.joined_at = time.perf_counter()
            join(joins, fork)

        def timed_feed(group: ForkJoinGroup, node: Any, token: int) -> Any:
            if node.kind is Kind.CONCLUSION and node.num_sampled == 0:
                probe.first_token_at = time.perf_counter()
                probe.num_branches = len(group.nodes)
                probe.num_tokens = sum(len(n.tokens) for n in group.nodes if not n.retired)
            return feed(group, node, token)

        def counted(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            if probe.joined_at and not probe.first_token_at:
                probe.num_computed += output.total_num_scheduled_tokens
            pool = probe.scheduler.kv_cache_manager.block_pool
            used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
            probe.peak_blocks = max(probe.peak_blocks, used)
            return output

        Joins._join, ForkJoinGroup.feed = timed_join, timed_feed
        self.scheduler.schedule = counted

    def reset(self) -> None:
        """Forget the last request."""
        self.joined_at = self.first_token_at = 0.0
        self.num_computed = self.peak_blocks = 0


def measure(llm: Any, probe: JoinProbe, length: int, rounds: int) -> dict[str, Any]:
    """Run both joins in turn and return medians."""
    block_size = probe.scheduler.block_size
    row: dict[str, Any] = {"path_tokens": length, "paths": NUM_PATHS}
    times: dict[str, list[float]] = {"kv": [], "reprefill": []}
    for _ in range(rounds):
        for mode in times:
            probe.reset()
            params = forever(NUM_PATHS * (length + 8) + 16, pt_path_tokens=length, pt_join=mode)
            llm.generate([prompt_of(64)], params, use_tqdm=False)
            times[mode].append(probe.first_token_at - probe.joined_at)
            row[f"{mode}_computed"] = probe.num_computed
            if mode == "kv":
                bound = -(-probe.num_tokens // block_size) + probe.num_branches
                row["blocks"], row["blocks_bound"] = probe.peak_blocks, bound
    row |= {f"{mode}_ms": 1000 * statistics.median(values) for mode, values in times.items()}
    row["ratio"] = statistics.median(
        kv / again for kv, again in zip(times["kv"], times["reprefill"], strict=True)
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS)
    args = parser.parse_args()
    profile = bench_profile(NUM_PATHS)
    llm = make_llm(args.model, {"profile": profile}, max_model_len=8192)
    probe = JoinProbe(llm)
    llm.generate([prompt_of(16)], forever(64, pt_path_tokens=8), use_tqdm=False)
    for length in args.lengths:
        print(json.dumps(measure(llm, probe, length, args.rounds)), flush=True)


if __name__ == "__main__":
    main()
