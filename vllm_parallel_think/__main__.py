"""``vllm-parallel-think``, the same as ``python -m vllm_parallel_think``.

``trace`` is for people who write a profile or debug a model, ``patches`` for those who want to know
what of vLLM's is replaced, ``evaluate`` and ``report`` for those who compare methods.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .compat import patches
from .core.config.hogwild_profile import HogwildProfile
from .core.config.loading import builtin_profiles, load_profile
from .core.errors import OptionError, quoted
from .core.trace import PIECE_RULE, GrammarError, render, render_json, trace
from .core.vocabulary import Vocabulary
from .evaluation import command as evaluation
from .tokenizer import TokenizerVocabulary


def _tokenizer(folder: str) -> TokenizerVocabulary:
    """Load the tokenizer of a folder."""
    if not Path(folder).is_dir():
        raise OptionError(f"--tokenizer {quoted(folder)} is not a folder")
    from transformers import AutoTokenizer

    return TokenizerVocabulary(AutoTokenizer.from_pretrained(folder, local_files_only=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0, or 1 if a text breaks its grammar, or 2 for a wrong setting."""
    words = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(words, argparse.Namespace(words=words))
    command: Callable[[argparse.Namespace], int] = options.run
    try:
        return command(options)
    except (OptionError, OSError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _trace(options: argparse.Namespace) -> int:
    """Show the tree of a finished answer, or where it breaks its grammar."""
    profile = load_profile(options.profile)
    if isinstance(profile, HogwildProfile):
        raise OptionError(
            f"profile {quoted(profile.name)} has workers; a trace needs one with paths"
        )
    text = _read(options.file)
    vocabulary: Vocabulary | None = _tokenizer(options.tokenizer) if options.tokenizer else None
    counted_by = f"those of {options.tokenizer}" if options.tokenizer else PIECE_RULE
    try:
        result = trace(text, profile, vocabulary)
    except GrammarError as error:
        if options.json:
            print(render_json(error, PIECE_RULE))
        else:
            print(f"{options.file}: {error}", file=sys.stderr)
        return 1
    print(render_json(result, counted_by) if options.json else render(result, counted_by))
    return 0


def _patches(options: argparse.Namespace) -> int:
    """Show what of vLLM's is replaced."""
    print(patches.render_markdown() if options.markdown else patches.render())
    return 0


def _read(file: str) -> str:
    return sys.stdin.read() if file == "-" else Path(file).read_text("utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vllm-parallel-think")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_trace(commands)
    command = commands.add_parser(
        "patches",
        help="show what of vLLM's this package replaces, why, and what would let that go",
        description="Show what of vLLM's this package replaces, why, and what would let that go. "
        "Without parallel_think in --additional-config only the first is in place.",
    )
    command.add_argument("--markdown", action="store_true", help="print a Markdown table")
    command.set_defaults(run=_patches)
    evaluation.add_commands(commands)
    return parser


def _add_trace(commands: Any) -> None:
    command = commands.add_parser(
        "trace",
        help="show the tree of a finished answer",
        description="Show the branches of a finished answer with their tokens, RoPE positions and "
        "figures, or the first place where it breaks its grammar (exit code 1).",
    )
    command.add_argument("file", help="the answer's text, special tokens included; - for stdin")
    names = ", ".join(builtin_profiles())
    command.add_argument("--profile", required=True, help=f"{names}, or the path of a .toml file")
    command.add_argument(
        "--tokenizer", metavar="DIR", help=f"count this model's tokens (without: {PIECE_RULE})"
    )
    command.add_argument("--json", action="store_true", help="print a JSON object")
    command.set_defaults(run=_trace)


if __name__ == "__main__":
    sys.exit(main())
