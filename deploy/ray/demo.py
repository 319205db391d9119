"""`make ray-demo`: two replicas of SmolLM2 on this machine's CPU, and some parallel requests."""

from __future__ import annotations

import argparse
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import ray
import yaml
from ray import serve

QUESTIONS = ("How do I stay healthy?", "How do I learn a language?", "How do I save money?")
HERE = Path(__file__).parent


def load(model: str, port: int) -> dict[str, Any]:
    """Return the demo's configuration, with a folder for the model."""
    config: dict[str, Any] = yaml.safe_load((HERE / "serve.yaml").read_text("utf-8"))
    config["http_options"]["port"] = port
    config["applications"][0]["args"]["vllm"]["model"] = model
    return config


def start(config: dict[str, Any], seconds: float = 300) -> str:
    """Start Ray and the application on this machine; return its URL once every replica answers.

    Raises:
        TimeoutError: Not all replicas were ready in time; their logs are in Ray's folder.

    """
    from ray.serve.schema import ServeDeploySchema

    # Replicas import this repository by its folder, not by what happens to be installed.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not ray.is_initialized():
        ray.init(num_cpus=6, include_dashboard=False, log_to_driver=False, namespace="serve")
    http = config["http_options"]
    serve.start(http_options={"host": http["host"], "port": http["port"]})
    schema = ServeDeploySchema.model_validate(config)
    serve.context._get_global_client().deploy_apps(schema, _blocking=False)
    name = config["applications"][0]["name"]
    deadline = time.monotonic() + seconds
    while serve.status().applications[name].status != "RUNNING":
        if time.monotonic() > deadline:
            raise TimeoutError(f"{name} is not running after {seconds} s: {serve.status()}")
        time.sleep(0.5)
    return f"http://127.0.0.1:{http['port']}"


def ask(url: str, question: str, **body: Any) -> tuple[str, dict[str, Any]]:
    """Send one question; return which replica answered, and the response."""
    messages = [{"role": "user", "content": question}]
    sent = {"model": "SmolLM2-135M-Instruct", "messages": messages, "temperature": 0, **body}
    response = httpx.post(f"{url}/v1/chat/completions", json=sent, timeout=300, trust_env=False)
    response.raise_for_status()
    return response.headers["x-replica"], response.json()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--requests", type=int, default=6)
    args = parser.parse_args()
    print("starting Ray and two replicas (a minute on two cores) ...", flush=True)
    url = start(load(args.model, args.port))
    print(f"ready at {url}/v1", flush=True)
    extra = {"max_tokens": 300, "vllm_xargs": {"pt_path_tokens": 48, "pt_max_paths": 4}}
    questions = [QUESTIONS[number % len(QUESTIONS)] for number in range(args.requests)]
    with ThreadPoolExecutor(4) as pool:
        for question, (replica, answer) in zip(
            questions, pool.map(lambda q: ask(url, q, **extra), questions), strict=True
        ):
            summary = answer["kv_transfer_params"]["parallel_think"]
            print(
                f"replica {replica}: {question} {summary['paths']} paths, "
                f"{answer['usage']['completion_tokens']} tokens, "
                f"parallelism ratio {summary['parallelism_ratio']}",
                flush=True,
            )
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
