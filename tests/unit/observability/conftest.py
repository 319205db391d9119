"""A process that exports metrics as a front end does, and an exporter of spans."""

from __future__ import annotations

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.support.runners import set_environment


def pytest_configure() -> None:
    """Set what vLLM reads when it is imported."""
    set_environment()


@pytest.fixture(scope="session", autouse=True)
def _front_end() -> None:
    from vllm_parallel_think.observability.metrics import export

    export.prepare()


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    """What vLLM's tracer provider would send away."""
    exporter = InMemorySpanExporter()
    provider = trace.get_tracer_provider()
    if not isinstance(provider, TracerProvider):
        provider = TracerProvider()
        trace.set_tracer_provider(provider)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return exporter
