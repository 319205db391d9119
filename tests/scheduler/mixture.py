"""Everything at once in one engine: workers, trees, paths, votes, plain requests; any schedule.

    python -m tests.scheduler.mixture --seeds 0:10000 [--jobs 2]

A seed is one play: an engine of some size, requests that come, leave and are preempted at random.
Whatever happens beside it, a request's text is what it writes alone, no step stands still, and
every block comes back. `make fuzz` runs ten thousand; the default suite a fixed hundred.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import re
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.hogwild_cases import write_recipe
from tests.support.schedules import GRAMMARS
from tests.support.tiny import VOCAB_SIZE, make_model

WORKERS, OFF = "workers", "off"
MOST_STEPS = 6000
TOO_LARGE = re.compile(r"needs \d+ KV blocks")


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        at: Step in which it comes.
        prompt: Its tokens.
        max_tokens: Most visible tokens.
        priority: vLLM's.
        extra: Its keys.

    """

    at: int
    prompt: tuple[int, ...]
    max_tokens: int
    priority: int
    extra: dict[str, Any]


@dataclass(frozen=True)
class Play:
    """One engine, and what happens in it.

    Attributes:
        engine: Arguments of the simulation.
        asks: Requests, in the order in which they come.
        events: Chance of an abort, a preemption and a reset in a step.
        seed: Of those.

    """

    engine: dict[str, Any]
    asks: tuple[Ask, ...]
    events: tuple[float, float, float]
    seed: int


@dataclass
class Outcome:
    """What a play came to."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def draw(seed: int) -> Play:
    """Return the play of a seed."""
    rng = random.Random(seed)
    size, num_blocks = rng.choice([16, 16, 32, 64]), rng.choice([10, 12, 14, 16, 20, 24, 32, 64])
    rows = rng.choice([3, 6, 8, 16])
    asynchronous = rng.random() < 0.3
    drafts = 0 if rng.random() < 0.7 else rng.choice([1, 3])
    engine = {
        "asynchronous": asynchronous,
        "num_blocks": num_blocks,
        "block_size": size,
        "max_model_len": min(1024, (num_blocks - 1) * size),
        "max_num_seqs": rows,
        "max_num_batched_tokens": max(rows * (1 + drafts), rng.choice([32, 64, 256])),
        "policy": rng.choice(["fcfs", "priority"]),
        "num_drafts": drafts,
    }
    names = [OFF, *(grammar.name for grammar in GRAMMARS)]
    if not (asynchronous or drafts):
        names += [WORKERS, WORKERS, WORKERS]
    asks, at = [], 0
    for _ in range(rng.randint(2, 8)):
        at += rng.choice([0, 0, 1, 3, 10, 30])
        longest = max(2, min(200, (num_blocks - 1) * size // 2))
        length = min(longest, rng.choice([2, 10, 40, 120]))
        words = tuple(rng.randrange(170, VOCAB_SIZE) for _ in range(length))
        priority = rng.choice([0, 0, 1, 2])
        asks.append(Ask(at, words, rng.choice([1, 30, 90, 150]), priority, keys(rng, names)))
    chances = rng.choice([(0.0, 0.0, 0.0), (0.004, 0.0, 0.0), (0.004, 0.01, 0.002)])
    return Play(engine, tuple(asks), chances, seed)


def keys(rng: random.Random, names: list[str]) -> dict[str, Any]:
    """Return the keys of one request."""
    name = rng.choice(names)
    chosen: dict[str, Any] = {"parallel_think": name}
    if name == WORKERS:
        chosen["pt_num_workers"] = rng.choice([2, 2, 3, 4])
        chosen["pt_worker_tokens"] = rng.choice([5, 30, 60])
        chosen["pt_layout"] = rng.choice(["combined", "interleaved", "contiguous"])
        chosen["pt_check_every"] = rng.choice([0, 0, 16])
    elif name != OFF:
        chosen["pt_path_tokens"] = rng.choice([5, 20, 60])
        if name == GRAMMARS[-1].name:
            chosen["pt_num_paths"] = rng.choice([1, 2, 4])
            chosen["pt_vote"] = rng.random() < 0.3
    return chosen


def simulate(play: Play, model: Path, folder: Path) -> Any:
    """Return the engine of a play, in which no step may stand still."""
    from tests.support.simulator import Simulation

    first, *others = (grammar.write(folder) for grammar in GRAMMARS)
    options = {"profiles": [*others, write_recipe(folder, num_workers=3)], "max_paths": 8}
    simulation = Simulation(model, first, GRAMMARS[0], options=options, **play.engine)
    scheduler = simulation.scheduler
    # Whether the pool has room for a fork depends on the load; here the text must not.
    scheduler.lifecycle.has_room = lambda num_blocks: True

    def stand_still() -> None:
        raise AssertionError("steps without work followed each other")

    scheduler.preemption.end_standstill = stand_still
    return simulation


def send(simulation: Any, ask: Ask) -> Any:
    """Send a request; return the client."""
    return simulation.add(
        list(ask.prompt), max_tokens=ask.max_tokens, priority=ask.priority, **ask.extra
    )


def run(play: Play, model: Path, folder: Path) -> Outcome:
    """Play, then compare every text with what the same request writes alone."""
    simulation = simulate(play, model, folder)
    outcome = Outcome(counted(simulation))
    rng, asks, clients = random.Random(play.seed), list(play.asks), []
    for step in range(MOST_STEPS):
        while asks and asks[0].at <= step:
            clients.append(send(simulation, asks.pop(0)))
        disturb(simulation, rng, play.events)
        if not simulation.step() and not asks:
            break
    else:
        raise AssertionError("the engine did not come to an end")
    simulation.run()
    for ask, client in zip(play.asks, clients, strict=True):
        alone = simulate(play, model, folder)
        lone = send(alone, ask)
        alone.run(MOST_STEPS)
        outcome.counts[client.finish if not client.aborted else "aborted"] += 1
        if why := differs(client, lone):
            outcome.wrong.append(f"{client.request_id} {ask.extra}: {why}")
    return outcome


def counted(simulation: Any) -> Counter[str]:
    """Count groups that are evicted, in a counter that grows with the play."""
    counts: Counter[str] = Counter()
    evict = simulation.scheduler.preemption.evict

    def counting(state: Any) -> None:
        counts[f"{type(state.group).__name__} evicted"] += 1
        evict(state)

    simulation.scheduler.preemption.evict = counting
    return counts


def disturb(simulation: Any, rng: random.Random, chances: tuple[float, float, float]) -> None:
    """Let a client leave, a row be preempted, or all K/V be dropped, now and then."""
    leave, preempt, reset = (rng.random() < chance for chance in chances)
    if leave:
        here = [c for c in simulation.clients.values() if c.finish is None and not c.aborted]
        if here:
            simulation.abort(rng.choice(here))
    if preempt:
        simulation.preempt(rng.randrange(8))
    if reset:
        simulation.reset()


def differs(client: Any, lone: Any) -> str | None:
    """Say how an answer differs from the one that was written alone, if it does."""
    summary = client.summary or {}
    if summary.get("fallbacks", {}).get("out_of_step"):
        return "workers did not step together"
    if client.aborted:
        same = client.tokens == lone.tokens[: len(client.tokens)]
        return None if same else "what came before the client left is another text"
    if TOO_LARGE.search(client.finish or "") and TOO_LARGE.search(lone.finish or ""):
        return None
    if client.finish != lone.finish:
        return f"ended by {client.finish!r}, alone by {lone.finish!r}"
    return None if client.tokens == lone.tokens else f"{client.tokens} is not {lone.tokens}"


@functools.cache
def stage() -> tuple[Path, Path]:
    """Return the tiny model and a folder for profiles, once a process."""
    folder = Path(tempfile.mkdtemp(prefix="mixture-"))
    return make_model(folder / "model"), folder


def try_seed(seed: int) -> tuple[int, Counter[str], list[str]]:
    """Play one seed; a fault is a wrong outcome too."""
    try:
        outcome = run(draw(seed), *stage())
    except Exception:
        return seed, Counter(), [traceback.format_exc(limit=-5)]
    return seed, outcome.counts, outcome.wrong


def outcomes(first: int, last: int, jobs: int) -> Iterator[tuple[int, Counter[str], list[str]]]:
    """Play seeds, in this process or in several."""
    if jobs == 1:
        yield from map(try_seed, range(first, last))
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(try_seed, range(first, last), chunksize=4)


def main() -> int:
    """Play a range of seeds and show what failed."""
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", default="0:1000", metavar="FIRST:LAST")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    first, last = map(int, args.seeds.split(":"))
    total: Counter[str] = Counter()
    num_wrong = 0
    bar = tqdm(outcomes(first, last, args.jobs), total=last - first, unit=" seeds")
    for seed, counts, wrong in bar:
        total.update(counts)
        num_wrong += bool(wrong)
        for line in wrong:
            bar.write(f"seed {seed}: {line}")
        bar.set_postfix(wrong=num_wrong)
    print(f"{last - first} seeds, {num_wrong} wrong; {dict(total)}")
    return int(num_wrong > 0)


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_PT_METRICS_DIR", "")
    sys.exit(main())
