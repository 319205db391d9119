"""One question to a real ``vllm serve``: its points written side by side, then the plain answer.

Run by ``make demo``. Starts a server with the skeleton profile on a free port of the loopback,
shows the paths as they grow, and ends with a table. Everything it starts is stopped again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI
from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

QUESTION = "How do I stay healthy?"
MODEL_NAME = "SmolLM2-135M-Instruct"
START_SECONDS = 300
PANEL_LINES = 9 if (os.get_terminal_size().lines if sys.stdout.isatty() else 40) >= 32 else 3
MIN_WIDTH = 18

console = Console()


@dataclass
class Answer:
    """What one request brought, and how long it took."""

    seconds: float = 0.0
    tokens: int = 0
    text: str = ""
    summary: dict[str, Any] = field(default_factory=dict)
    paths: list[dict[str, Any]] = field(default_factory=list)


def free_port() -> int:
    """Return a port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve_command(model: str, port: int) -> list[str]:
    """Return the command a user would type, for this environment's vLLM."""
    return [
        str(Path(sys.executable).with_name("vllm")),
        "serve",
        model,
        "--served-model-name",
        MODEL_NAME,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-model-len",
        "4096",
        "--additional-config",
        '{"parallel_think": {"profile": "skeleton"}}',
    ]


@contextlib.contextmanager
def server(model: str) -> Iterator[str]:
    """Start a server, wait until it answers, and stop it at the end.

    Yields:
        The base URL.

    Raises:
        SystemExit: It did not start; the end of its log says why.

    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = serve_command(model, port)
    env = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_LOGGING_LEVEL": "WARNING", **os.environ}
    with tempfile.NamedTemporaryFile("w+", prefix="vllm-serve-", suffix=".log") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
        try:
            wait_until_healthy(process, url, Path(log.name))
            yield url
        finally:
            stop(process)


def wait_until_healthy(process: subprocess.Popen[Any], url: str, log: Path) -> None:
    """Show the seconds go by until the server answers."""
    start = time.monotonic()
    with console.status("") as status:
        while True:
            elapsed = time.monotonic() - start
            status.update(f"vllm serve {MODEL_NAME}: loading, {elapsed:.0f} s")
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                    break
            if process.poll() is not None or elapsed > START_SECONDS:
                console.print(log.read_text("utf-8", "replace")[-4000:], markup=False)
                raise SystemExit("vllm serve did not start; the end of its log is above")
            time.sleep(0.5)
    console.print(f"vllm serve is ready after {time.monotonic() - start:.0f} s")


def stop(process: subprocess.Popen[Any]) -> None:
    """Stop the server with all its processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=15)
        os.killpg(process.pid, signal.SIGKILL)


def ask(client: OpenAI, question: str, max_tokens: int, **xargs: Any) -> Iterator[Answer]:
    """Stream one answer; yield it again and again as it grows."""
    answer, start = Answer(), time.perf_counter()
    stream = client.chat.completions.create(
        model=MODEL_NAME,
        messages=[{"role": "user", "content": question}],
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={
            "vllm_xargs": xargs,
            "ignore_eos": xargs.get("parallel_think") == "off",
        },
    )
    for chunk in stream:
        extra = chunk.model_extra or {}
        answer.paths = extra.get("parallel_think_live") or answer.paths
        if extra.get("parallel_think"):
            answer.summary = extra["parallel_think"][0]
        if chunk.usage is not None:
            answer.tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            answer.text += choice.delta.content or ""
        answer.seconds = time.perf_counter() - start
        yield answer


def view(question: str, answer: Answer) -> Group:
    """Draw the answer in the order of the text, and its paths side by side."""
    rows = (console.height or 24) - 3
    across = max(1, min(len(answer.paths), (console.width - 4) // MIN_WIDTH))
    path_rows = -(-len(answer.paths) // across) * (PANEL_LINES + 2) if answer.paths else 0
    # Whole lines from the end of the text, as many as fit below the paths.
    wrapped = Text(answer.text).wrap(console, console.width - 4)
    shown = Text("\n").join(wrapped[-max(2, rows - path_rows - 5) :])
    parts: list[Any] = [
        Panel(Text(question), title="question", border_style="blue"),
        Panel(shown, title=f"the client's text so far, {answer.seconds:.0f} s"),
    ]
    if answer.paths:
        width = (console.width - 4) // across - 1
        panels = [
            Panel(
                Text("\n").join(Text(path["tail"]).wrap(console, width - 4)[-PANEL_LINES:]),
                title=f"{path['path']}. {path['title']}"[: width - 4],
                subtitle=f"{path['tokens']} tokens{', done' if path['done'] else ''}",
                border_style="green" if path["done"] else "yellow",
                width=width,
                height=PANEL_LINES + 2,
            )
            for path in answer.paths
        ]
        parts.insert(1, Columns(panels, padding=0))
    return Group(*parts)


def show(question: str, answers: Iterator[Answer]) -> Answer:
    """Follow an answer on the terminal; return it when it is complete."""
    if not console.is_terminal:
        console.print(f"question: {question}", markup=False)
        answer = last(answers)
        for path in answer.paths:
            console.print(f"  path {path['path']} ({path['title']}): {path['tokens']} tokens")
        console.print(answer.text, markup=False)
        return answer
    answer = Answer()
    # The view fits the screen while it moves; the whole text is printed at the end.
    with Live(console=console, refresh_per_second=8, vertical_overflow="crop") as live:
        for answer in answers:
            live.update(view(question, answer))
    console.print(Panel(Text(answer.text), title="the whole answer"))
    return answer


def last(answers: Iterator[Answer]) -> Answer:
    """Return the complete answer."""
    return deque(answers, maxlen=1)[0]


def table_of(parallel: Answer, chain: Answer) -> Table:
    """Compare the two answers."""
    table = Table(title="The same question, the same number of sampled tokens")
    for name in ("", "wall time", "sampled tokens", "tokens a second", "parallelism ratio"):
        table.add_column(name, justify="left" if not name else "right")
    sampled = parallel.summary["generated_tokens"]
    for name, answer, tokens in (
        ("parallel paths", parallel, sampled),
        ("one chain", chain, chain.tokens),
    ):
        table.add_row(
            name,
            f"{answer.seconds:.1f} s",
            str(tokens),
            f"{tokens / answer.seconds:.1f}",
            f"{answer.summary.get('parallelism_ratio', 1.0):.2f}",
        )
    table.caption = "parallelism ratio: sampled tokens over those of the longest chain"
    return table


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--path-tokens", type=int, default=96, help="budget of one path")
    args = parser.parse_args()
    with server(args.model) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600)
        # The first request of a server compiles and touches memory; it would distort the table.
        last(ask(client, "Hello", 8, parallel_think="off"))
        console.rule("parallel: a list's points side by side, and a conclusion")
        parallel = show(
            args.question,
            ask(
                client,
                args.question,
                800,
                pt_max_paths=4,
                pt_path_tokens=args.path_tokens,
                pt_live=True,
            ),
        )
        if not parallel.summary.get("forks"):
            console.print("The model began no list: the answer is the plain one.")
            return
        sampled = parallel.summary["generated_tokens"]
        console.rule(f"one chain of as many sampled tokens ({sampled})")
        with console.status("the same question without branches"):
            chain = last(ask(client, args.question, sampled, parallel_think="off"))
    console.print(table_of(parallel, chain))
    summary = parallel.summary
    console.print(
        f"{summary['paths']} paths; {summary['generated_tokens']} tokens were sampled, "
        f"{summary['critical_path_tokens']} of them one after another; K/V of "
        f"{summary['reused_kv_tokens']} tokens was read again instead of computed again."
    )


if __name__ == "__main__":
    main()
