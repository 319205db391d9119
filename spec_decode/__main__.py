"""Training of drafts and judges: ``python -m spec_decode COMMAND --help``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from . import collect, distill, evaluate, fit, label

COMMANDS: dict[str, tuple[type[Any], Callable[[Any], None]]] = {
    "collect": (collect.Collect, collect.run),
    "distill": (distill.Distill, distill.run),
    "label": (label.Label, label.run),
    "fit": (fit.Fit, fit.run),
    "evaluate": (evaluate.Evaluate, evaluate.run),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the process's exit status."""
    parser = argparse.ArgumentParser(prog="python -m spec_decode", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (settings, run) in COMMANDS.items():
        lines = (sys.modules[settings.__module__].__doc__ or "").splitlines()
        command = commands.add_parser(name, help=lines[0].partition(": ")[2])
        command.set_defaults(settings=settings, run=run)
        _add_options(command, settings)
    values = vars(parser.parse_args(arguments))
    settings, run = values.pop("settings"), values.pop("run")
    try:
        run(settings(**values))
    except (ValueError, OSError) as error:
        print(f"spec_decode: {error}", file=sys.stderr)
        return 1
    return 0


def _add_options(parser: argparse.ArgumentParser, settings: type[Any]) -> None:
    """Make an option of every field, described by the attribute's line in the docstring."""
    hints, help_lines = get_type_hints(settings), _attributes(settings.__doc__ or "")
    for field in fields(settings):
        default = None if field.default is MISSING else field.default
        many = isinstance(default, tuple)
        kind = type(default[0]) if many and default else hints[field.name]
        choices = get_args(kind) if get_origin(kind) is Literal else None
        if kind not in (int, float, str):
            kind = Path if "Path" in str(kind) else str
        shown = " ".join(map(str, default)) if many and default else default
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=kind,
            choices=choices,
            required=field.default is MISSING,
            default=default,
            **({"nargs": "+"} if many else {}),
            help=help_lines.get(field.name, "") + ("" if shown is None else f" (default: {shown})"),
        )


def _attributes(docstring: str) -> dict[str, str]:
    lines: dict[str, str] = {}
    name = ""
    for line in docstring.partition("Attributes:")[2].splitlines():
        text = line.strip()
        if line.startswith("        ") and not line.startswith("            ") and ": " in text:
            name, _, text = text.partition(": ")
        if name and text:
            lines[name] = f"{lines.get(name, '')} {text}".strip()
    return {name: text.replace("``", "").replace("%", "%%") for name, text in lines.items()}


if __name__ == "__main__":
    sys.exit(main())
