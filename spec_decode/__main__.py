"""Training of drafts and judges: ``python -m spec_decode COMMAND --help``."""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

COMMANDS = {
    "collect": "Collect",
    "distill": "Distill",
    "label": "Label",
    "fit": "Fit",
    "evaluate": "Evaluate",
}
"""Each command's module, and the class of its settings there. Only a command that runs is imported:
torch takes seconds."""

EXTRA = frozenset({"torch", "transformers", "safetensors", "tqdm", "numpy"})
"""What the extra `train` installs."""

INSTALL = "install vllm-parallel-think with its extra `train` (pip install '.[train]')"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the process's exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m spec_decode", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    chosen = next((word for word in given if not word.startswith("-")), None)
    try:
        for name, settings in COMMANDS.items():
            command = commands.add_parser(name, help=_summary(name))
            if name == chosen:
                module = import_module(f"{__package__}.training.{name}")
                command.set_defaults(settings=getattr(module, settings), run=module.run)
                _add_options(command, getattr(module, settings))
        values = vars(parser.parse_args(given))
        settings, run = values.pop("settings"), values.pop("run")
        run(settings(**values))
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        print(f"spec_decode: {error.name} is missing; {INSTALL}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"spec_decode: {error}", file=sys.stderr)
        return 1
    return 0


def _summary(command: str) -> str:
    """Return what a command's module says of itself in its first line."""
    source = (Path(__file__).parent / "training" / f"{command}.py").read_text("utf-8")
    first = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
    return first.partition(": ")[2]


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
