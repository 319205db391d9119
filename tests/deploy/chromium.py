"""The system's Chromium: where it is, and how it starts without reaching out for anything."""

from __future__ import annotations

import shutil

FLAGS = (
    *("--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)


def find() -> str:
    """Return its path.

    Raises:
        RuntimeError: It is not installed.

    """
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        raise RuntimeError("chromium is not installed: apt-get install chromium")
    return program
