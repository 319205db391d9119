"""Ray Serve for tests, free of what other tests set."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from deploy.ray.cluster import Cluster
from tests.serve.server import environment


@contextmanager
def started(
    model: Path, folder: Path, *, changes: dict[str, str] | None = None, **how: Any
) -> Iterator[Cluster]:
    """Start Ray Serve on a free port.

    Args:
        model: Folder of the model.
        folder: For logs and lists.
        changes: Environment variables of all its processes.
        **how: As :class:`Cluster` takes them.

    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        # Replicas inherit this process's variables, and the engine tests set some.
        for name in os.environ.keys() - environment().keys():
            patch.delenv(name)
        for name, value in (changes or {}).items():
            patch.setenv(name, value)
        with Cluster(str(model), port, folder, **how) as cluster:
            yield cluster
