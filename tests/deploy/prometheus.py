"""A real Prometheus with the rules of this repository, scraping one server of this machine."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.support.repository import ROOT
from tests.support.server import free_port, wait_until

FOLDER = ROOT / "deploy" / "prometheus"


def program(name: str) -> str:
    """Return the path of a program that these tests need.

    Raises:
        AssertionError: Says how to install it.

    """
    found = shutil.which(name)
    assert found, f"{name} is not installed: apt-get install prometheus (it brings promtool, too)"
    return found


class Prometheus:
    """A Prometheus server on a random port of the loopback, with its data in a folder."""

    def __init__(self, target: str, folder: Path, interval: str = "1s") -> None:
        config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
        config["global"] = {"scrape_interval": interval, "evaluation_interval": interval}
        config["rule_files"] = [str(FOLDER / name) for name in config["rule_files"]]
        config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        port = free_port()
        self.log = folder / "prometheus.log"
        command = [program("prometheus"), f"--config.file={folder / 'prometheus.yaml'}"]
        command += [f"--storage.tsdb.path={folder / 'data'}"]
        command += [f"--web.listen-address=127.0.0.1:{port}"]
        with self.log.open("wb") as out:
            self._process = subprocess.Popen(command, stdout=out, stderr=out, cwd=folder)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False)

    def wait_ready(self) -> None:
        """Wait until the server was scraped."""

        def is_up() -> bool:
            assert self._process.poll() is None, self.log.read_text()[-3000:]
            try:
                return bool(self.query("up == 1"))
            except httpx.TransportError:
                return False

        wait_until(is_up, "Prometheus has scraped the server", 30)

    def query(self, expression: str, time: float | None = None) -> list[dict[str, Any]]:
        """Return the series of an instant query."""
        return self._ask("query", {"query": expression, **({"time": time} if time else {})})

    def range(self, expression: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        """Return the series of a range query."""
        asked = {"query": expression, "start": start, "end": end, "step": step}
        return self._ask("query_range", asked)

    def value(self, expression: str) -> float:
        """Return the one value of an instant query; NaN where it has none."""
        found = self.query(expression)
        assert len(found) <= 1, found
        return float(found[0]["value"][1]) if found else math.nan

    def rules(self) -> list[dict[str, Any]]:
        """Return all rules with their health."""
        answer = self.http.get("/api/v1/rules").json()
        return [rule for group in answer["data"]["groups"] for rule in group["rules"]]

    def stop(self) -> None:
        """End the server."""
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _ask(self, path: str, asked: dict[str, Any]) -> list[dict[str, Any]]:
        answer = self.http.post(f"/api/v1/{path}", data=asked)
        if answer.status_code == 503:  # it has only just started
            return []
        body = answer.json() if answer.content else {}
        assert body.get("status") == "success", f"{asked['query']}: {json.dumps(body)[:500]}"
        return body["data"]["result"]


def promtool(*arguments: str) -> str:
    """Run promtool in the folder of the rules; return what it says.

    Raises:
        AssertionError: It found something wrong.

    """
    done = subprocess.run(
        [program("promtool"), *arguments],
        cwd=FOLDER,
        env={**os.environ, "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout
