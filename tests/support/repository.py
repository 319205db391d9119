"""Where tests find what is no Python module."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

VISIBLE_OUTLINE = str(Path(__file__).parent / "visible-outline.toml")
"""A profile without tags whose outline is part of the answer; it forks whatever is asked."""
