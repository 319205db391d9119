"""Accuracy over what it costs, as SVG, light and dark, in colours for any colour vision."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter, ScalarFormatter

from .results import MethodRow, Results

MARKERS = "osD^vPX*"
LINES = ("-", "--", "-.", ":")
WIDE_RANGE = 6
"""Costs that differ by more than this get a logarithmic axis."""


@dataclass(frozen=True)
class Theme:
    """Colours of a plot.

    Attributes:
        ink: Of texts and axes.
        ground: Of the background.
        grid: Of lines behind the points.
        lines: Of methods: Okabe and Ito's, which people with any colour vision can tell apart.

    """

    ink: str
    ground: str
    grid: str
    lines: tuple[str, ...]


THEMES: Mapping[str, Theme] = {
    "light": Theme(
        "#1f2328",
        "#ffffff",
        "#d0d7de",
        ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9"),
    ),
    "dark": Theme(
        "#e6edf3",
        "#0d1117",
        "#30363d",
        ("#56B4E9", "#E69F00", "#2FC79A", "#E79AC4", "#F5F5F5", "#F0E442", "#7C9CFF"),
    ),
}


@dataclass(frozen=True)
class Axis:
    """What a plot has at its foot.

    Attributes:
        key: Its name in files.
        label: Its words.
        cost: The cost of a row, where it is known.

    """

    key: str
    label: str
    cost: Callable[[MethodRow], float | None]


def axes_of(results: Results) -> list[Axis]:
    """Return the costs that accuracy can be plotted over: tokens, critical path, seconds."""
    concurrencies = sorted({each for row in results.rows for each in row.seconds})

    def seconds(concurrency: int) -> Axis:
        label = f"seconds an answer, {concurrency} at a time"
        return Axis(f"seconds-{concurrency}", label, lambda row: row.seconds.get(concurrency))

    return [
        Axis("tokens", "all generated tokens", lambda row: row.tokens),
        Axis("critical", "tokens of the critical path", lambda row: row.critical),
        *map(seconds, concurrencies),
    ]


def plot(results: Results, set_name: str, axis: Axis, theme_name: str) -> str:
    """Return the SVG of one set; the same figures give the same bytes."""
    theme = THEMES[theme_name]
    settings = {
        "svg.hashsalt": f"{set_name} {axis.key} {theme_name}",
        "svg.fonttype": "path",
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "text.color": theme.ink,
        "axes.labelcolor": theme.ink,
        "axes.edgecolor": theme.ink,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(7.2, 4.2), facecolor=theme.ground, layout="constrained")
        _draw(figure.subplots(), results, set_name, axis, theme)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def _draw(axes: Axes, results: Results, set_name: str, axis: Axis, theme: Theme) -> None:
    axes.set_facecolor(theme.ground)
    axes.grid(color=theme.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    costs = []
    for index, method in enumerate(results.methods):
        rows = [r for r in results.rows if (r.set_name, r.method) == (set_name, method)]
        costs += _line(axes, rows, index, method, axis, theme)
    if costs and min(costs) > 0 and max(costs) > WIDE_RANGE * min(costs):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(axis.label)
    axes.set_ylabel("right answers")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title(set_name, loc="left", color=theme.ink)
    if costs:
        axes.legend(
            loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, labelcolor=theme.ink
        )


def _line(
    axes: Axes, rows: Sequence[MethodRow], index: int, method: str, axis: Axis, theme: Theme
) -> list[float]:
    """Draw a method's budgets as points with intervals; return their costs."""
    points = sorted(
        (cost, row.accuracy.value, row.accuracy.low, row.accuracy.high)
        for row in rows
        if row.accuracy is not None and (cost := axis.cost(row)) is not None
    )
    if not points:
        return []
    costs, values, lows, highs = (list(each) for each in zip(*points, strict=True))
    below = [max(0.0, value - low) for value, low in zip(values, lows, strict=True)]
    above = [max(0.0, high - value) for value, high in zip(values, highs, strict=True)]
    axes.errorbar(
        costs,
        values,
        yerr=[below, above],
        label=method,
        color=theme.lines[index % len(theme.lines)],
        marker=MARKERS[index % len(MARKERS)],
        linestyle=LINES[index % len(LINES)],
        markersize=6,
        linewidth=1.6,
        elinewidth=0.9,
        capsize=2.5,
    )
    return costs
