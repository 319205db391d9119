"""Ray Serve for tests, free of what other tests set."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from deploy.ray.cluster import Cluster
from tests.support.server import environment, free_port


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
    with pytest.MonkeyPatch.context() as patch:
        # Replicas inherit this process's variables, and the engine tests set some.
        for name in os.environ.keys() - environment().keys():
            patch.delenv(name)
        for name, value in (changes or {}).items():
            patch.setenv(name, value)
        with Cluster(str(model), free_port(), folder, **how) as cluster:
            yield cluster
