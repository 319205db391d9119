"""Order of the tests."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run engines in this process last: they fix torch's number of threads for good."""
    items.sort(key=lambda item: "tests/engine/" in item.nodeid)
