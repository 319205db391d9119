"""Order of the tests, and what many of them share: models."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.local import smollm2

# Helpers compare, too: pytest shows what differed.
pytest.register_assert_rewrite("tests.support")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run engines in this process last: they fix torch's number of threads for good."""
    items.sort(key=lambda item: "tests/engine/" in item.nodeid)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama."""
    from tests.support.tiny import make_model

    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def model() -> Path:
    """A small instruct model as a local folder."""
    return smollm2.ensure_model()
