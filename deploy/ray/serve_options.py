"""The parser of ``vllm serve``, wherever the installed vLLM keeps it."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

PLACES = (
    "vllm.entrypoints.launchers.cli_args",  # vLLM 0.32
    "vllm.entrypoints.common.cli_args",  # vLLM 0.33
)


def cli_args() -> ModuleType:
    """Return vLLM's module that has ``make_arg_parser`` and ``validate_parsed_serve_args``.

    Raises:
        ImportError: This vLLM has it at none of the known places.

    """
    for place in PLACES:
        if _is_there(place):
            return import_module(place)
    raise ImportError(
        f"vLLM has none of {', '.join(PLACES)}: install a vLLM that pyproject.toml allows"
    )


def _is_there(module: str) -> bool:
    """Whether a module can be found; one that is there and broken is, and says so on import."""
    package = module.rpartition(".")[0]
    return ("." not in package or _is_there(package)) and find_spec(module) is not None
