"""Two replicas on this machine, a few parallel requests to both, and what came back."""

from __future__ import annotations

import argparse
import socket
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from deploy.ray.cluster import Cluster, request_body

QUESTIONS = (
    "How do I stay healthy?",
    "How do I learn a language?",
    "How do I plan a trip?",
    "How do I save money?",
)


def ask(url: str, question: str) -> str:
    """Return a line about one answer."""
    answer = httpx.post(
        f"{url}/v1/chat/completions", json=request_body(question), timeout=300, trust_env=False
    )
    answer.raise_for_status()
    body = answer.json()
    summary = body["kv_transfer_params"]["parallel_think"]
    text = " ".join(body["choices"][0]["message"]["content"].split())
    return f"{question}\n  {text[:160]} …\n  {summary}\n"


def main() -> None:
    """Start, ask, print, stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of the model")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    parser.add_argument("--port", type=int, default=free, help="port (default: any free one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print("starting Ray and two replicas: a minute or two", flush=True)
        with Cluster(options.model, options.port, Path(folder)) as cluster:
            print(f"{cluster.num_replicas} replicas behind {cluster.url}/v1\n", flush=True)
            with ThreadPoolExecutor(len(QUESTIONS)) as pool:
                for line in pool.map(lambda question: ask(cluster.url, question), QUESTIONS):
                    print(line, flush=True)
            for pid in cluster.replicas():
                count = cluster.metric(pid, "vllm_pt_requests_total")
                print(f"replica with process id {pid}: {count:.0f} requests")
    print("stopped")


if __name__ == "__main__":
    main()
