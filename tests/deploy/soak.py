"""A server under a mixed load for minutes, in a pool of KV blocks in which its requests do not fit.

    python -m tests.deploy.soak --minutes 10      (or `make soak MINUTES=10`)

All profiles, several choices a request, streams, and clients that leave; a small random model, so
that thousands of requests pass. At the end nothing may be held, memory and descriptors must be
where they were, and the server's counts must be what the clients saw.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from deploy.local import smollm2
from tests.support.scrape import Scrape, growth
from tests.support.server import ENDLESS, MODEL_NAME, SHORT_STEPS, Server, outline_of, wait_until
from vllm_parallel_think.core.config.loading import builtin_profiles

BLOCKS = 60
"""Of 32 tokens: a family alone fits, two or three do not."""

TREE = """
name = "tree"
summary = "Nested blocks wherever a line ends"

[fork]
trigger = ["\\n"]
num_paths = 3

[path]
start = "P{name}:"
end = ["."]
close = "."

[join]
start = "So"
"""
WARM_UP = 0.25
"""Share of the time after which memory and descriptors are looked at for the first time."""

ROOM_TO_GROW = 64 << 20
"""Bytes that all processes together may grow by: allocators keep what they once had."""


@dataclass
class Tally:
    """What clients saw.

    Attributes:
        ends: Choices by how they ended.
        wrong: What should not have been seen, the first few.
        done: Requests.
        parallel: Choices of requests that had a profile; one of a single token has none.

    """

    ends: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    done: int = 0
    parallel: int = 0

    def complain(self, what: str) -> None:
        """Keep the first few surprises."""
        if len(self.wrong) < 20:
            self.wrong.append(what)


def make_model(folder: Path) -> Path:
    """Write a small random model with SmolLM2's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    source = smollm2.ensure_model()
    config = AutoConfig.from_pretrained(source)
    config.hidden_size, config.num_hidden_layers, config.intermediate_size = 128, 2, 256
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 2, 1, 64
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() == 2:
                weights.normal_(0, 0.25)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def bodies(seed: int, words: list[int]) -> Iterator[tuple[dict[str, Any], int | None]]:
    """Return requests without end, and the chunk after which a client leaves, if it does."""
    rng = random.Random(seed)
    names = [*builtin_profiles(), "tree", "endless", "short-steps", "off"]
    while True:
        name = rng.choice(names)
        xargs: dict[str, Any] = {"parallel_think": name}
        if "hogwild" in name or name == "short-steps":
            xargs |= {
                "pt_num_workers": rng.choice([2, 3]),
                "pt_worker_tokens": rng.choice([20, 80]),
            }
        elif name != "off":
            xargs["pt_path_tokens"] = rng.choice([5, 40, 120])
        if name.startswith("parathinker"):
            xargs |= {"pt_num_paths": rng.choice([2, 4]), "pt_vote": rng.random() < 0.3}
        leaves = rng.randrange(1, 20) if rng.random() < 0.2 else None
        stream = leaves is not None or rng.random() < 0.5
        body = {
            "model": MODEL_NAME,
            "messages": outline_of("Three fruits?"),
            "temperature": rng.choice([0.0, 0.7]),
            "seed": rng.randrange(1000),
            "n": rng.choice([1, 1, 1, 2, 3]),
            "max_tokens": rng.choice([1, 20, 120, 400]),
            "stream": stream,
            "vllm_xargs": xargs,
        }
        if body["temperature"] == 0.0:
            body["n"] = 1
        if name == "tree":
            body["allowed_token_ids"] = words
        yield body, leaves


async def ask(http: httpx.AsyncClient, body: dict[str, Any], leaves: int | None) -> list[str]:
    """Send one request; return how each choice ended, or that the client left."""
    path = "/v1/chat/completions"
    if not body["stream"]:
        answer = await http.post(path, json=body)
        if answer.status_code != 200:
            return [f"HTTP {answer.status_code}: {answer.text[:200]}"]
        return [end_of(choice) for choice in answer.json()["choices"]]
    ends: dict[int, str] = {}
    chunks = 0
    async with http.stream("POST", path, json=body) as answer:
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunks += 1
            if leaves is not None and chunks >= leaves:
                return ["left"] * body["n"]
            for choice in json.loads(line.removeprefix("data: ")).get("choices", ()):
                if choice.get("finish_reason"):
                    ends[choice["index"]] = end_of(choice)
    return list(ends.values())


def end_of(choice: dict[str, Any]) -> str:
    """Return a finish reason, with the plugin's words where there are some."""
    stop = choice.get("stop_reason")
    return (
        f"{choice['finish_reason']}: {stop}" if isinstance(stop, str) else choice["finish_reason"]
    )


async def load(url: str, tally: Tally, seconds: float, words: list[int], clients: int) -> None:
    """Keep so many clients asking for so long."""
    end = time.monotonic() + seconds

    async def client(http: httpx.AsyncClient, number: int) -> None:
        for body, leaves in bodies(number, words):
            if time.monotonic() > end:
                return
            what = f"{body['vllm_xargs']}, n={body['n']}, max_tokens={body['max_tokens']}"
            try:
                ends = await ask(http, body, leaves)
            except httpx.HTTPError as error:
                ends = [f"{type(error).__name__}"]
            tally.done += 1
            if body["vllm_xargs"]["parallel_think"] != "off" and body["max_tokens"] > 1:
                tally.parallel += body["n"]
            tally.ends.update(ends)
            for one in ends:
                if one not in ("stop", "length", "left") and "KV blocks" not in one:
                    tally.complain(f"{one} ({what})")
            if len(ends) != body["n"]:
                tally.complain(f"{len(ends)} of {body['n']} choices ended ({what})")

    async with httpx.AsyncClient(base_url=url, timeout=300, trust_env=False) as http:
        await asyncio.gather(*(client(http, number) for number in range(clients)))


def footprint(pid: int) -> tuple[int, int]:
    """Return the resident bytes and open descriptors of a process and all it started."""
    size = descriptors = 0
    for one in family_of(pid):
        try:
            pages = int(Path(f"/proc/{one}/statm").read_text().split()[1])
            descriptors += len(list(Path(f"/proc/{one}/fd").iterdir()))
        except OSError:
            continue
        size += pages * 4096
    return size, descriptors


def family_of(pid: int) -> list[int]:
    """Return a process and its descendants."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += family_of(int(child))
    return found


def soak(minutes: float, clients: int, folder: Path) -> list[str]:
    """Run the load on a server of its own; return what is wrong."""
    profiles = []
    for name, text in (("tree", TREE), ("endless", ENDLESS), ("short-steps", SHORT_STEPS)):
        (folder / f"{name}.toml").write_text(text)
        profiles.append(str(folder / f"{name}.toml"))
    model = make_model(folder / "model")
    options = {"profile": "off", "profiles": profiles, "max_paths": 8}
    more = ("--num-gpu-blocks-override", str(BLOCKS), "--max-num-seqs", "16")
    more += ("--max-model-len", "1024")
    server = Server(model, folder / "server.log", options, *more)
    try:
        server.wait_ready()
        return watch(server, minutes * 60, clients, model)
    finally:
        server.stop()


def watch(server: Server, seconds: float, clients: int, model: Path) -> list[str]:
    """Let clients ask, look at the server meanwhile, and compare at the end."""
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(model).encode
    words = [encode(text)[0] for text in ("\n", ".", " a", " the", " of", " is", " we", " x")]
    tally, before = Tally(), scrape(server)
    asyncio.run(load(server.url, tally, seconds * WARM_UP, words, clients))
    first = footprint(server.pid)
    print(f"warm: {tally.done} requests, {first[0] >> 20} MiB, {first[1]} descriptors", flush=True)
    asyncio.run(load(server.url, tally, seconds * (1 - WARM_UP), words, clients))
    wait_until(server.is_idle, "nothing runs, nothing is held")
    last, grown = footprint(server.pid), growth(before, scrape(server))
    print(f"end: {tally.done} requests, {last[0] >> 20} MiB, {last[1]} descriptors")
    print(f"choices by end: {dict(tally.ends.most_common())}")
    wrong = list(tally.wrong)
    if last[0] > first[0] + ROOM_TO_GROW:
        wrong.append(f"memory grew from {first[0] >> 20} to {last[0] >> 20} MiB")
    if last[1] > first[1] + 8:
        wrong.append(f"descriptors grew from {first[1]} to {last[1]}")
    if tally.parallel != grown("vllm_pt_requests_total"):
        counted = grown("vllm_pt_requests_total")
        wrong.append(f"{tally.parallel} choices had a profile, {counted:.0f} are counted")
    failed = sum(count for end, count in tally.ends.items() if "KV blocks" in end)
    if failed > (counted := grown("vllm_pt_requests_total", outcome="failed")):
        wrong.append(f"{failed} clients were told of a failure, {counted:.0f} are counted")
    if stalls := grown("vllm_pt_stalls_total"):
        wrong.append(f"{stalls:.0f} standstills")
    return wrong


def scrape(server: Server) -> Scrape:
    """Read the server's metrics."""
    return Scrape(server.http.get("/metrics").text)


def main() -> int:
    """Soak, and say what was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=12)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        wrong = soak(args.minutes, args.clients, Path(folder))
    for line in wrong:
        print(f"wrong: {line}")
    print("nothing is wrong" if not wrong else f"{len(wrong)} things are wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
