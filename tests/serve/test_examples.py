"""What stands in deploy/examples runs as it stands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.server import MODEL_NAME, Server, environment

EXAMPLES = Path(__file__).parents[2] / "deploy" / "examples"
TOKENS = "16"

pytestmark = pytest.mark.timeout(600)  # a model is loaded, or a server starts, on a busy machine


def run(*command: str, **changes: str) -> tuple[str, str]:
    """Run a command; return what it printed, on stdout and on stderr."""
    done = subprocess.run(
        command, env=environment(**changes), capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout, done.stderr


def assert_branched(text: str, summary: dict[str, object]) -> None:
    """The points of a list, written side by side, with their headings in order."""
    assert summary["profile"] == "skeleton" and summary["forks"] == 1
    assert isinstance(summary["paths"], int) and summary["paths"] >= 2
    at = [text.index(f"\n{number}. **") for number in range(2, summary["paths"] + 1)]
    assert at == sorted(at)


@pytest.mark.parametrize("live", [False, True], ids=["quiet", "live"])
def test_stream(server: Server, live: bool) -> None:
    command = [sys.executable, str(EXAMPLES / "stream.py"), "--url", server.url]
    command += ["--model", MODEL_NAME, "--path-tokens", TOKENS, *(["--live"] if live else [])]
    out, err = run(*command)
    text, _, last = out.rstrip().rpartition("\n")
    assert_branched(text, json.loads(last))
    assert ("[tokens a path: 1: " in err) == live


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl: install curl")
def test_curl(server: Server) -> None:
    assert os.access(EXAMPLES / "curl.sh", os.X_OK)
    out, _ = run(str(EXAMPLES / "curl.sh"), URL=server.url, MODEL=MODEL_NAME, PATH_TOKENS=TOKENS)
    answer, *metrics = out.strip().splitlines()
    response = json.loads(answer)
    text = response["choices"][0]["message"]["content"]
    assert_branched(text, response["kv_transfer_params"]["parallel_think"])
    assert any('profile="skeleton"' in line for line in metrics)


def test_offline(model: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "offline.py"), str(model), "--path-tokens", TOKENS]
    out, _ = run(*command, "--dtype", "float32", VLLM_LOGGING_STREAM="ext://sys.stderr")
    text, _, last = out.rstrip().rpartition("\n")
    assert_branched(text, json.loads(last))
