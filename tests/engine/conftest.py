"""One environment for every test that runs a vLLM engine in this process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.repository import ROOT
from tests.support.runners import set_environment


def pytest_configure() -> None:
    """Set what vLLM reads when it is imported."""
    set_environment()


@pytest.fixture(scope="session")
def hf_model(tiny_model: Path) -> Any:
    """The same model in transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct; made on first use, then taken from the cache."""
    command = [sys.executable, "deploy/local/smollm2.py"]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return Path(done.stdout.splitlines()[-1])


@pytest.fixture
def make_engine(tiny_model: Path) -> Iterator[Callable[..., Any]]:
    """Start engines with the plugin on; they are shut down after the test."""
    from tests.support.engine import Engine

    engines: list[Engine] = []

    def start(**kwargs: Any) -> Engine:
        engine = Engine(str(kwargs.pop("model", tiny_model)), **kwargs)
        engines.append(engine)
        return engine

    yield start
    for engine in engines:
        engine.close()
