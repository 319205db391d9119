"""The precisions a command can load a model in."""

from __future__ import annotations

from typing import Literal

Dtype = Literal["float32", "bfloat16", "float16", "auto"]
"""``auto`` is what the model's files are in."""
