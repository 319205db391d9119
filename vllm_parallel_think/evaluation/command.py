"""The commands ``evaluate`` and ``report``.

Imports what the extra ``eval`` brings only when a command runs, so that the plugin's other commands
work without it.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import os
import shlex
import sys
from pathlib import Path

from .errors import ExamError

COMMANDS = ("evaluate", "report")
PROGRAM = "python -m vllm_parallel_think"
EXTRA = frozenset({"httpx", "math_verify", "matplotlib", "numpy", "tqdm"})
KEY_VARIABLE = "OPENAI_API_KEY"
NOT_INSTALLED = 1
WRONG = 2
FAILED_REQUESTS = 3


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add both commands to a parser."""
    _add_evaluate(commands)
    _add_report(commands)


def _add_evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "evaluate",
        help="compare ways of thinking on problem sets, on equal budgets",
        description="Ask a server the problems of some sets by several methods, grade the answers "
        "and keep them. The same command again goes on where it was interrupted and asks again "
        "what failed (exit code 3: some requests had no answer).",
    )
    add = command.add_argument
    add("--base-url", required=True, help="of an OpenAI-compatible server")
    add("--sets", required=True, type=_names, help="NAME from the hub or NAME:FILE, by commas")
    add("--methods", required=True, type=_names, help="by commas; NAME+key=value changes an option")
    add("--budgets", required=True, type=_numbers, help="of all generated tokens, by commas")
    add("--out", required=True, type=Path, help="folder of the answers")
    add("--seeds", type=_positive, default=1, help="answers to a problem (default %(default)s)")
    add("--concurrency", type=_numbers, default=[1], help="requests at a time, by commas")
    add("--num", type=_positive, help="only so many problems of each set")
    add("--where", type=_where, action="append", default=[], metavar="FIELD=A,B", help="only these")
    add("--prompts", type=Path, metavar="TOML", help='prompts of sets: NAME = "... {question} ..."')
    add("--methods-file", type=Path, metavar="TOML", help="methods in the form of methods.toml")
    add("--closing", default="", help="text behind answers that the budget cut without a result")
    add("--closing-tokens", type=_positive, default=16, help="for the result behind it")
    add("--model", help="name of the model (default: the server's first)")
    add("--timeout", type=float, default=600.0, help="seconds of an attempt (default %(default)s)")
    add("--retries", type=int, default=4, help="further attempts (default %(default)s)")
    add("--run-code", action="store_true", help="run what the model writes against tests")
    command.set_defaults(run=run)


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "report",
        help="write a page about answers of evaluate",
        description="Write report.html, report.md, report.json and plots.",
    )
    command.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    command.add_argument("--out", type=Path, help="where to (default: the first DIR)")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run a command.

    Returns:
        0; 1 if a package is missing; 2 for a wrong setting; 3 if requests had no answer.

    """
    try:
        if options.command == "report":
            return _report(options)
        return asyncio.run(_examine(options, _words(options)))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRA:
            raise
        name = (error.name or "").replace("_", "-")
        print(f"{name} is missing; it is in the extra `eval`", file=sys.stderr)
        return NOT_INSTALLED
    except ExamError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _words(options: argparse.Namespace) -> str:
    """Return the command as it was given."""
    return shlex.join([*PROGRAM.split(), *options.words])


def _report(options: argparse.Namespace) -> int:
    from .report import write_report

    out = options.out or options.folders[0]
    for path in write_report(options.folders, out, _words(options)):
        print(path)
    return 0


async def _examine(options: argparse.Namespace, command: str) -> int:
    from .answers import AnswerFile, note_exam
    from .client import ExamClient, Retries
    from .grading import Grader
    from .math_process import MathGrader
    from .methods import load_methods
    from .run import Exam, versions_of
    from .schedule import Closing, waves
    from .sets import load_prompts, load_set

    if importlib.util.find_spec("math_verify") is None:
        # Its own process would otherwise end at every comparison.
        raise ModuleNotFoundError(name="math_verify")
    prompts = load_prompts(options.prompts)
    where = dict(options.where)
    sets = [
        load_set(each, num=options.num, where=where, prompt=prompts.get(each.partition(":")[0]))
        for each in options.sets
    ]
    if len({each.name for each in sets}) < len(sets):
        raise ExamError("--sets: each set once; a second file of a set needs an --out of its own")
    if not options.run_code and any(each.kind in ("function", "program") for each in sets):
        raise ExamError("answers that are code run only with --run-code: a model wrote them")
    methods = load_methods(options.methods, options.methods_file)
    closing = Closing(options.closing, options.closing_tokens)
    planned = list(
        waves(sets, methods, options.budgets, options.seeds, options.concurrency, closing)
    )
    retries, key = Retries(options.retries), os.environ.get(KEY_VARIABLE)
    file = AnswerFile(options.out)
    async with ExamClient(options.base_url, options.timeout, retries, key) as client:
        model = options.model or await client.model()
        with file.opened(), MathGrader() as mathematics:
            note_exam(
                options.out,
                {
                    "command": command,
                    "model": model,
                    "methods": {each.name: each.described() for each in methods},
                    "prompts": {each.name: each.prompt for each in sets},
                    "closing": {"text": closing.text, "max_tokens": closing.max_tokens},
                },
            )
            exam = Exam(
                client,
                model,
                file,
                Grader(mathematics, run_code=options.run_code),
                await versions_of(client, model),
            )
            outcome = await exam.run(planned)
    print(f"{outcome.asked} asked, {outcome.failed} failed; answers in {file.path}")
    print(f"now: {PROGRAM} report {shlex.quote(str(options.out))}")
    return FAILED_REQUESTS if outcome.failed else 0


def _names(text: str) -> list[str]:
    names = [each.strip() for each in text.split(",") if each.strip()]
    if not names:
        raise argparse.ArgumentTypeError("at least one name is needed")
    return names


def _numbers(text: str) -> list[int]:
    return list(dict.fromkeys(_positive(each) for each in text.split(",")))


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def _where(text: str) -> tuple[str, list[str]]:
    """Read ``level=1,2`` or ``level=1-3``."""
    field, equals, values = text.partition("=")
    if not equals or not values:
        raise argparse.ArgumentTypeError("expected FIELD=A,B or FIELD=1-3")
    first, dash, last = values.partition("-")
    if dash and first.isdecimal() and last.isdecimal():
        return field, [str(each) for each in range(int(first), int(last) + 1)]
    return field, values.split(",")
