"""The report as one HTML page that needs nothing beside itself, and as Markdown."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from .answers import AnswerRecord
from .disagreements import Disagreement, disagreements
from .plots import THEMES, Axis
from .results import Results
from .tables import ReportTable, branching_table, main_table, pair_table, share

TEMPLATE = Path(__file__).with_name("page.html")
MOST_CHARACTERS = 6000
"""Of a text on the page; the middle of a longer one is left out."""
MOST_GRADES = 20
"""Disagreements of graders whose texts the page shows; ``report.json`` names all of them."""


@dataclass(frozen=True)
class Made:
    """How a report came about.

    Attributes:
        report: The command that wrote it.
        exams: The settings of the exams it is about, their commands among them.
        versions: What answers depended on, as they name it.

    """

    report: str
    exams: Sequence[Mapping[str, Any]]
    versions: Mapping[str, Sequence[str]]

    @property
    def commands(self) -> list[str]:
        """All commands, in order."""
        return [*(str(exam["command"]) for exam in self.exams), self.report]


Plots = Mapping[tuple[str, str, str], str]
"""SVGs by set, axis and theme."""


def html_page(results: Results, made: Made, axes: Sequence[Axis], plots: Plots) -> str:
    """Return the page."""
    parts = [*_head(results, made)]
    for set_name in results.sets:
        parts += _set(results, made, axes, plots, set_name)
    parts += _graders(results)
    return Template(TEMPLATE.read_text("utf-8")).substitute(body="\n".join(parts))


def _head(results: Results, made: Made) -> Iterator[str]:
    yield (
        f"<p>Answers: {len(results.answers)}; methods: {len(results.methods)}; "
        f"sets: {len(results.sets)}. No figure is an average over sets.</p>"
    )
    yield "<h2>How it was made</h2>"
    yield f"<pre>{html.escape(chr(10).join(made.commands))}</pre>"
    versions = "; ".join(f"{name}: {', '.join(found)}" for name, found in made.versions.items())
    yield f'<p class="note">{html.escape(versions)}</p>'
    if results.failures:
        reasons = [f"{count} x {reason}" for reason, count in results.failures.items()]
        yield "<h2>Requests without an answer</h2>"
        yield f"<pre>{html.escape(chr(10).join(reasons))}</pre>"


def _set(
    results: Results, made: Made, axes: Sequence[Axis], plots: Plots, set_name: str
) -> Iterator[str]:
    yield f"<h2>{html.escape(set_name)}</h2>"
    yield from _table(main_table(results, set_name), made)
    for axis in axes:
        yield _figure(plots, set_name, axis)
        yield f'<p class="note"><code>{html.escape(made.report)}</code></p>'
    yield from _table(branching_table(results, set_name), made)
    pairs = pair_table(results, set_name)
    if pairs.rows:
        yield '<div class="pairs">'
        yield from _table(pairs, made)
        yield "</div>"
    yield "<h3>Where methods disagree most</h3>"
    found = disagreements(results, set_name)
    if not found:
        yield "<p>Nowhere: on every problem all are right, or all are wrong.</p>"
    for each in found:
        yield from _disagreement(each)


def _table(table: ReportTable, made: Made) -> Iterator[str]:
    yield f"<h3>{html.escape(table.title)}</h3>"
    yield f'<div class="scroll">{table.html()}</div>'
    yield f'<p class="note">{html.escape(table.note)}<br>'
    yield f"<code>{html.escape(made.report)}</code></p>"


def _figure(plots: Plots, set_name: str, axis: Axis) -> str:
    light, dark = (_data(plots[set_name, axis.key, theme]) for theme in THEMES)
    alt = html.escape(f"{set_name}: right answers over {axis.label}; the figures are in the table")
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{alt}"></picture></figure>'
    )


def _data(svg: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def _disagreement(each: Disagreement) -> Iterator[str]:
    shares = ", ".join(f"{method} {share(value)}" for method, value in each.shares.items())
    yield f"<details><summary>{html.escape(each.problem)}: {html.escape(shares)}</summary>"
    first = each.answers[0]
    yield f"<pre>{_shown(first['question'])}</pre><p>Right: {html.escape(first['gold'])}</p>"
    for record in each.answers:
        yield _text(record)
    yield "</details>"


def _text(record: AnswerRecord) -> str:
    grade = record["grade"]
    verdict = "right" if grade["right"] else "wrong"
    figures = f"{record['tokens']['generated']} tokens, {record['seconds']:.1f} s"
    if record["cut"]:
        figures += ", cut by the budget"
    title = f"{record['method']}: {verdict}, read as {grade['found']} ({figures})"
    return (
        f"<details><summary>{html.escape(title)}</summary>"
        f"<pre>{_shown(record['text'])}</pre></details>"
    )


def _graders(results: Results) -> Iterator[str]:
    graders = results.graders
    if not graders.compared and not graders.undecided:
        return
    yield "<h2>How far grading can be trusted</h2>"
    yield f"<p>{html.escape(graders_in_words(results))}</p>"
    for record in graders.disagreements[:MOST_GRADES]:
        grade = record["grade"]
        said = "right" if grade["right"] else "wrong"
        title = f"{record['key']}: {said} by math-verify, which read {grade['found']}"
        yield f"<details><summary>{html.escape(title)}</summary>"
        yield f"<p>Right: {html.escape(record['gold'])}</p>"
        yield f"<pre>{_shown(record['text'])}</pre></details>"


def graders_in_words(results: Results) -> str:
    """Return how often the two comparisons of mathematics disagree."""
    graders = results.graders
    text = (
        f"math-verify and a plain comparison of texts both graded {graders.compared} answers and "
        f"disagree on {len(graders.disagreements)}; math-verify's word counts."
    )
    if graders.undecided:
        reasons = ", ".join(f"{reason} {count}" for reason, count in graders.undecided.items())
        text += f" It came to no end on some ({reasons}), where the plain comparison counts."
    return text


def _shown(text: str) -> str:
    if len(text) > MOST_CHARACTERS:
        half = MOST_CHARACTERS // 2
        left_out = len(text) - 2 * half
        text = f"{text[:half]}\n[… {left_out} characters …]\n{text[-half:]}"
    return html.escape(text)


def markdown_page(results: Results, made: Made) -> str:
    """Return the tables in Markdown, with the commands that made them."""
    parts = ["# Ways to think in parallel: an exam", "```\n" + "\n".join(made.commands) + "\n```"]
    if results.failures:
        reasons = [f"- {count} x `{reason}`" for reason, count in results.failures.items()]
        parts += ["Requests without an answer:", "\n".join(reasons)]
    for set_name in results.sets:
        tables = [build(results, set_name) for build in (main_table, branching_table, pair_table)]
        for table in tables:
            if table.rows:
                parts += [f"## {table.title}", table.markdown(), table.note]
    if results.graders.compared or results.graders.undecided:
        parts += ["## Grading", graders_in_words(results)]
    return "\n\n".join(parts) + "\n"
