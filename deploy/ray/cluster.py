"""The application on this machine: Ray, its replicas and their endpoint, started and stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import yaml

ROOT = Path(__file__).resolve().parents[2]
CONFIG = Path(__file__).with_name("laptop.yaml")
START_SECONDS = 400


class Cluster:
    """``serve run`` with a config file, in a session of its own; a context manager.

    Args:
        model: Replaces ``args.vllm.model`` of the file.
        port: Replaces ``http_options.port``.
        folder: For the config as started, the log, and the list of replicas.
        options: Further options of ``vllm serve``, over those of the file.
        num_replicas: Replaces the file's number of replicas.

    Attributes:
        url: The endpoint of all replicas.

    """

    def __init__(
        self,
        model: str,
        port: int,
        folder: Path,
        options: Mapping[str, Any] | None = None,
        num_replicas: int | None = None,
    ) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "serve.log"
        self._targets = folder / "replicas"
        config = yaml.safe_load(CONFIG.read_text())
        config["http_options"]["port"] = port
        (application,) = config["applications"]
        (engine,) = application["deployments"]
        scaling = engine["autoscaling_config"]
        if num_replicas is not None:
            scaling["min_replicas"] = scaling["max_replicas"] = num_replicas
        self.num_replicas = scaling["min_replicas"]
        application["args"]["vllm"].update({"model": model, **(options or {})})
        application["args"]["metrics"] = {"port": 0, "folder": str(self._targets)}
        started = folder / "serve.yaml"
        started.write_text(yaml.safe_dump(config))
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_USAGE_STATS_ENABLED": "0",
            # A replica's engine is its child: it must not outlive a killed replica.
            "RAY_kill_child_processes_on_worker_exit_with_raylet_subreaper": "true",
        }
        with self.log.open("wb") as out:
            self._process = subprocess.Popen(
                ["serve", "run", str(started)],
                cwd=ROOT,
                env=environment,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def __enter__(self) -> Cluster:
        try:
            self.wait_replicas()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def replicas(self) -> dict[int, str]:
        """Return the address of each living replica's ``/metrics``, by process id."""
        found = {}
        for path in self._targets.glob("*.json"):
            pid = int(path.name.split(".")[-2])
            if Path(f"/proc/{pid}").exists():
                (entry,) = json.loads(path.read_text())
                found[pid] = f"http://{entry['targets'][0]}/metrics"
        return found

    def metric(self, pid: int, name: str) -> float:
        """Return the sum of a metric of one replica, over its labels."""
        text = httpx.get(self.replicas()[pid], trust_env=False, timeout=10).text
        lines = [line for line in text.splitlines() if line.startswith((f"{name}{{", f"{name} "))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def wait_replicas(self) -> None:
        """Wait until every replica answers; fail at once if Ray Serve ended."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"Ray Serve ended:\n{self.log_tail()}")
            if len(self.replicas()) >= self.num_replicas and self._answers():
                return
            time.sleep(0.5)
        raise TimeoutError(f"no {self.num_replicas} replicas in time:\n{self.log_tail()}")

    def _answers(self) -> bool:
        try:
            addresses = [f"{self.url}/v1/models", *self.replicas().values()]
            return all(httpx.get(at, trust_env=False).is_success for at in addresses)
        except httpx.TransportError:
            return False

    def log_tail(self, num_lines: int = 60) -> str:
        """Return the end of what Ray Serve printed."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-num_lines:])

    def stop(self) -> None:
        """End Ray Serve, Ray and the replicas."""
        for number, seconds in ((signal.SIGINT, 60), (signal.SIGKILL, 10)):
            if self._process.poll() is None:
                send = os.killpg if number == signal.SIGKILL else os.kill
                send(self._process.pid, number)
            try:
                self._process.wait(seconds)
                return
            except subprocess.TimeoutExpired:
                continue


def request_body(question: str, **more: Any) -> dict[str, Any]:
    """Return the body of a greedy chat request whose points are written side by side."""
    return {
        "model": "SmolLM2-135M-Instruct",
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 200,
        "vllm_xargs": {"pt_path_tokens": 40, "pt_max_paths": 3},
        **more,
    }
