"""The simulator is vLLM's scheduler in this process."""

from tests.support.runners import set_environment


def pytest_configure() -> None:
    """Set what vLLM reads when it is imported."""
    set_environment()
