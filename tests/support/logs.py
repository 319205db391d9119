"""What was logged."""

from __future__ import annotations

import pytest


def times_said(caplog: pytest.LogCaptureFixture, words: str) -> int:
    """How often something was logged; a record counts once although two loggers hand it on."""
    return len({id(record) for record in caplog.records if words in record.getMessage()})
