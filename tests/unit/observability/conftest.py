"""The simulator's model, and a process that exports metrics as a front end does."""

import pytest

from tests.engine.conftest import tiny_model
from vllm_parallel_think.observability.metrics import export

__all__ = ["tiny_model"]


@pytest.fixture(scope="session", autouse=True)
def _front_end() -> None:
    export.prepare()
