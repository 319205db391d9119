"""Tables of a report, once for Markdown and HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from .results import MethodRow, PairRow, Results
from .statistics import LEVEL, Estimate

UNKNOWN = "–"


@dataclass(frozen=True)
class ReportTable:
    """A table.

    Attributes:
        title: What it shows.
        head: Names of the columns.
        rows: Cells, as plain text.
        note: How to read it.

    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self) -> str:
        """Return it in Markdown, without its title."""
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return "\n".join(f"| {' | '.join(map(_in_markdown, cells))} |" for cells in lines)

    def html(self) -> str:
        """Return it in HTML, without its title."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.head)
        rows = "\n".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self.rows
        )
        return f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table>"


def _in_markdown(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def main_table(results: Results, set_name: str) -> ReportTable:
    """Return the table people want: accuracy, tokens, critical path, seconds of each method."""
    rows = [row for row in results.rows if row.set_name == set_name]
    concurrencies = sorted({each for row in rows for each in row.seconds})
    head = ["method", "budget", "right (95 %)", "problems x seeds", "failed", "tokens", "critical"]
    head += [f"s at {each}" for each in concurrencies]
    cells = [
        [
            row.method,
            str(row.budget),
            share_with_interval(row.accuracy),
            f"{row.accuracy.num if row.accuracy else 0} x {row.seeds}",
            str(row.asked - row.answered),
            number(row.tokens, 0),
            number(row.critical, 0),
            *(number(row.seconds.get(each), 2) for each in concurrencies),
        ]
        for row in rows
    ]
    note = (
        f"Right: mean over problems of the mean over seeds; BCa bootstrap over problems, "
        f"{LEVEL:.0%} (Wilson's interval where all are alike). Means of tokens and seconds are "
        "over answers. Failed requests are in no other figure."
    )
    return ReportTable(f"{set_name}: methods", head, cells, note)


def branching_table(results: Results, set_name: str) -> ReportTable:
    """Return how methods branched, and what their budgets did to them."""
    head = ["method", "budget", "parallel rate", "ratio", "eta", "valid grammar"]
    head += ["cut", "closed", "over budget", "fallbacks"]
    rows = [_branching(row) for row in results.rows if row.set_name == set_name]
    note = (
        "Parallel rate: share of answers with a fork. Ratio: all tokens over those of the critical "
        "path; eta: 1 - critical / all. Cut: ended by the budget, and graded by what stands there. "
        "Closed: ended by the exam's closing text. Over budget: took more tokens than allowed."
    )
    return ReportTable(f"{set_name}: branches and budgets", head, rows, note)


def _branching(row: MethodRow) -> list[str]:
    reasons = ", ".join(f"{reason} {count}" for reason, count in row.fallbacks.items())
    return [
        row.method,
        str(row.budget),
        share(row.parallel_rate),
        number(row.ratio, 2),
        number(row.eta, 2),
        share(row.valid_grammar),
        share(row.cut),
        share(row.closed),
        share(row.over_budget),
        reasons or UNKNOWN,
    ]


def pair_table(results: Results, set_name: str) -> ReportTable:
    """Return the differences between methods on the same problems."""
    head = ["budget", "first", "second", "difference (95 %)", "problems", "p", "p (Holm)"]
    head += ["only first", "only second", "McNemar", "McNemar (Holm)"]
    rows = [_pair(row) for row in results.pairs if row.set_name == set_name]
    note = (
        "Difference: first less second, in points, over problems with answers of both. p: paired "
        "sign flips over problems. McNemar's test is exact and looks at the first seed. Holm: "
        "corrected for all pairs of this set and budget."
    )
    return ReportTable(f"{set_name}: pairs", head, rows, note)


def _pair(row: PairRow) -> list[str]:
    found, difference = row.found, row.found.difference
    ends = f"{100 * difference.low:+.1f} to {100 * difference.high:+.1f}"
    return [
        str(row.budget),
        row.first,
        row.second,
        f"{100 * difference.value:+.1f} ({ends})",
        str(difference.num),
        f"{found.p_flips:.3f}",
        f"{row.p_flips_holm:.3f}",
        str(found.first_only),
        str(found.second_only),
        f"{found.p_mcnemar:.3f}",
        f"{row.p_mcnemar_holm:.3f}",
    ]


def share_with_interval(estimate: Estimate | None) -> str:
    """Return a share and its interval in percent."""
    if estimate is None:
        return UNKNOWN
    low, high = 100 * estimate.low, 100 * estimate.high
    return f"{100 * estimate.value:.1f} % ({low:.1f}-{high:.1f})"


def share(value: float | None) -> str:
    """Return a share in percent."""
    return UNKNOWN if value is None else f"{100 * value:.0f} %"


def number(value: float | None, digits: int) -> str:
    """Return a number with so many digits behind the point."""
    return UNKNOWN if value is None else f"{value:.{digits}f}"
