"""Writes a report of folders of answers: a page, Markdown, plots and all figures as JSON."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .answers import AnswerFile, AnswerRecord, exams
from .disagreements import disagreements
from .errors import ExamError
from .page import Made, html_page, markdown_page
from .plots import THEMES, axes_of, plot
from .results import Results, results_of

DIGITS = 6
"""Of a figure in ``report.json``."""


def write_report(folders: Sequence[Path], out: Path, command: str) -> list[Path]:
    """Write the report; the same answers give the same bytes.

    Args:
        folders: What ``evaluate`` wrote.
        out: Where the report goes.
        command: What the report names as the command that made it.

    Returns:
        The files that were written.

    Raises:
        ExamError: A folder has no answers, or two folders disagree on one.

    """
    records = _read(folders)
    settings = [exam for folder in folders for exam in exams(folder)]
    order = [name for exam in settings for name in exam["methods"]]
    results = results_of(records, order)
    made = Made(command, settings, _versions(records))
    axes = axes_of(results)
    plots = {
        (set_name, axis.key, theme): plot(results, set_name, axis, theme)
        for set_name in results.sets
        for axis in axes
        for theme in THEMES
    }
    files = {
        "report.html": html_page(results, made, axes, plots),
        "report.md": markdown_page(results, made),
        "report.json": json.dumps(as_json(results, made), indent=1, sort_keys=True) + "\n",
    }
    for (set_name, key, theme), svg in plots.items():
        files[f"{set_name}-{key}-{theme}.svg"] = svg
    out.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (out / name).write_text(text, "utf-8")
    return [out / name for name in files]


def _read(folders: Sequence[Path]) -> list[AnswerRecord]:
    found: dict[str, AnswerRecord] = {}
    for folder in folders:
        records = AnswerFile(folder).read()
        if not records:
            raise ExamError(f"{folder} has no answers of `evaluate`")
        for record in records:
            if found.setdefault(record["key"], record)["request"] != record["request"]:
                raise ExamError(
                    f"{folder} and another folder have answers to different requests under "
                    f"{record['key']}; report them apart"
                )
    return list(found.values())


def _versions(records: Sequence[AnswerRecord]) -> dict[str, list[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for record in records:
        for name, version in record["versions"].items():
            found[name].add(str(version))
    return {name: sorted(found[name]) for name in sorted(found)}


def as_json(results: Results, made: Made) -> dict[str, Any]:
    """Return all figures of a report as plain values."""
    graders = results.graders
    worst = {
        name: [
            {"problem": each.problem, "budget": each.budget, "shares": each.shares}
            for each in disagreements(results, name)
        ]
        for name in results.sets
    }
    return _rounded(
        {
            "command": made.report,
            "exams": list(made.exams),
            "versions": made.versions,
            "methods": [{**asdict(row), "eta": row.eta} for row in results.rows],
            "pairs": [asdict(row) for row in results.pairs],
            "failures": results.failures,
            "disagreements": worst,
            "graders": {
                "compared": graders.compared,
                "disagreements": [record["key"] for record in graders.disagreements],
                "undecided": graders.undecided,
            },
        }
    )


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, DIGITS) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(each) for each in value]
    return value
