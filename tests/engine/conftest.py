"""One environment for every test that runs a vLLM engine in this process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Read by vLLM when it is imported, and by the OpenMP runtime when torch is.
os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_WAIT_POLICY="passive",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama."""
    from tests.support.tiny import make_model

    return make_model(tmp_path_factory.mktemp("tiny"))


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
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, check=True, stdout=subprocess.PIPE, text=True)
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
