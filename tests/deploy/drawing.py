"""Panels of the dashboard as SVG, from what Prometheus answers to their own queries."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

COLORS = ("#73bf69", "#5794f2", "#ff9830", "#f2495c", "#b877d9", "#37872d", "#fade2a", "#8ab8ff")
TEXT, QUIET, GRID, CARD = "#d8d9da", "#8e8e93", "#2c2f36", "#181b1f"


@dataclass(frozen=True)
class Line:
    """One series: a name, and a value (or NaN) for every time."""

    name: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class Frame:
    """A panel's place on the picture, in pixels."""

    x: float
    y: float
    width: float
    height: float


def show(value: float, unit: str, decimals: int | None = None) -> str:
    """Write a value as Grafana does in this unit."""
    if math.isnan(value):
        return "–"
    if unit == "percentunit":
        return f"{100 * value:.{decimals or 0}f} %"
    if unit == "s":
        return f"{1000 * value:.0f} ms" if 0 < value < 1 else f"{value:.{decimals or 1}f} s"
    suffix = {"reqps": " req/s", "ops": " /s"}.get(unit, "")
    if value >= 1000:
        return f"{value / 1000:.1f} K{suffix}"
    if decimals is None:
        decimals = 0 if value == round(value) else 2
    return f"{value:.{decimals}f}{suffix}"


def text(
    x: float, y: float, words: str, size: float = 12, color: str = TEXT, anchor: str = "start"
) -> str:
    """Write words at a place."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{color}" text-anchor="{anchor}">'
        f"{html.escape(words)}</text>"
    )


def card(frame: Frame, title: str) -> str:
    """Draw the panel behind everything."""
    return (
        f'<rect x="{frame.x}" y="{frame.y}" width="{frame.width}" height="{frame.height}" rx="3" '
        f'fill="{CARD}" stroke="{GRID}"/>' + text(frame.x + 10, frame.y + 20, title, 13)
    )


def stat(frame: Frame, line: Line | None, unit: str, decimals: int | None) -> str:
    """Draw the newest value over its history."""
    known = [v for v in line.values if not math.isnan(v)] if line else []
    parts = []
    if line and len(known) > 1:
        below = Frame(frame.x, frame.y + frame.height * 0.68, frame.width, frame.height * 0.32)
        top = max(known) or 1
        parts.append(_curve(below, line.values, [0.0] * len(line.values), top * 1.05, COLORS[0]))
    words = show(known[-1], unit, decimals) if known else "No data"
    middle = frame.x + frame.width / 2
    color = COLORS[0] if known else QUIET
    parts.append(text(middle, frame.y + frame.height * 0.58, words, 32, color, "middle"))
    return "".join(parts)


def lines(
    frame: Frame, series: Sequence[Line], unit: str, stacked: bool, times: Sequence[str]
) -> str:
    """Draw curves over time with their axes and names."""
    plot = Frame(frame.x + 76, frame.y + 32, frame.width - 92, frame.height - 32 - 42)
    if not series:
        middle = frame.x + frame.width / 2
        return text(middle, frame.y + frame.height / 2 + 6, "No data", 15, QUIET, "middle")
    length = len(series[0].values)
    base = [0.0] * length
    tops = []
    for line in series:
        values = [0.0 if math.isnan(v) else v for v in line.values]
        tops.append(tuple(b + v for b, v in zip(base, values, strict=True)))
        if stacked:
            base = list(tops[-1])
    shown = tops if stacked else [line.values for line in series]
    highest = max((v for values in shown for v in values if not math.isnan(v)), default=0.0)
    top, ticks = _axis(highest)
    parts = []
    for tick in ticks:
        y = plot.y + plot.height * (1 - tick / top)
        parts.append(
            f'<line x1="{plot.x}" x2="{plot.x + plot.width}" y1="{y:.1f}" y2="{y:.1f}" '
            f'stroke="{GRID}"/>'
        )
        parts.append(text(plot.x - 6, y + 4, show(tick, unit), 11, QUIET, "end"))
    parts += _times(plot, times)
    floor = [0.0] * length
    for number, values in enumerate(shown):
        color = COLORS[number % len(COLORS)]
        parts.append(_curve(plot, values, floor, top, color, 0.28 if stacked else 0.08))
        if stacked:
            floor = list(values)
    x = frame.x + 12
    for number, line in enumerate(series):
        color = COLORS[number % len(COLORS)]
        y = frame.y + frame.height - 11
        if x + 16 + 6.4 * len(line.name) > frame.x + frame.width:
            break
        parts.append(f'<rect x="{x}" y="{y - 6}" width="12" height="3" fill="{color}"/>')
        parts.append(text(x + 16, y, line.name, 11.5))
        x += 32 + 6.4 * len(line.name)
    return "".join(parts)


def heatmap(frame: Frame, buckets: Sequence[tuple[str, Line]], times: Sequence[str]) -> str:
    """Draw how many requests fell into each bucket, column by column of time.

    Args:
        frame: The panel.
        buckets: Upper bound and counts up to it, from the smallest bound.
        times: Names of the time axis.

    """
    plot = Frame(frame.x + 62, frame.y + 32, frame.width - 78, frame.height - 32 - 24)
    num_columns = 60
    counts = []
    below: Sequence[float] = [0.0] * len(buckets[0][1].values) if buckets else []
    for bound, line in buckets:
        values = [0.0 if math.isnan(v) else v for v in line.values]
        counts.append((bound, [max(0.0, v - b) for v, b in zip(values, below, strict=True)]))
        below = values
    while counts and not any(counts[-1][1]):
        counts.pop()
    if not counts:
        middle = frame.x + frame.width / 2
        return text(middle, frame.y + frame.height / 2, "No data", 15, QUIET, "middle")
    cells = []
    for row, (_, values) in enumerate(counts):
        step = len(values) / num_columns
        for column in range(num_columns):
            part = values[
                int(column * step) : max(int(column * step) + 1, int((column + 1) * step))
            ]
            cells.append((row, column, max(part)))
        height = plot.height / len(counts)
    most = max(value for _, _, value in cells) or 1
    height, width = plot.height / len(counts), plot.width / num_columns
    parts = []
    for row, column, value in cells:
        if value <= 0:
            continue
        strength = 0.18 + 0.82 * (value / most) ** 0.6
        parts.append(
            f'<rect x="{plot.x + column * width:.1f}" '
            f'y="{plot.y + plot.height - (row + 1) * height:.1f}" width="{width - 1:.1f}" '
            f'height="{height - 1:.1f}" fill="{COLORS[0]}" fill-opacity="{strength:.2f}"/>'
        )
    for row, (bound, _) in enumerate(counts):
        y = plot.y + plot.height - (row + 0.5) * height + 4
        parts.append(text(plot.x - 6, y, f"≤ {bound.removesuffix('.0')}", 11, QUIET, "end"))
    parts += _times(plot, times)
    return "".join(parts)


def _times(plot: Frame, times: Sequence[str]) -> list[str]:
    """Write the time axis; its ends stay within the panel."""
    last = len(times) - 1
    anchors = {0: "start", last: "end"}
    return [
        text(
            plot.x + plot.width * number / last,
            plot.y + plot.height + 15,
            words,
            11,
            QUIET,
            anchors.get(number, "middle"),
        )
        for number, words in enumerate(times)
    ]


def _axis(highest: float) -> tuple[float, list[float]]:
    """Return the end of an axis and its ticks: at most six, on round values."""
    if highest <= 0:
        return 1.0, [0.0, 1.0]
    rough = highest / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough)
    count = math.ceil(highest / step - 1e-9)
    return count * step, [number * step for number in range(count + 1)]


def _curve(
    plot: Frame,
    values: Sequence[float],
    floor: Sequence[float],
    top: float,
    color: str,
    opacity: float = 0.15,
) -> str:
    """Draw one curve, with gaps where there are no values, and the area below it."""

    def at(index: int, value: float) -> str:
        x = plot.x + plot.width * index / max(1, len(values) - 1)
        return f"{x:.1f},{plot.y + plot.height * (1 - min(value, top) / top):.1f}"

    runs: list[list[int]] = [[]]
    for index, value in enumerate(values):
        if math.isnan(value):
            runs.append([])
        else:
            runs[-1].append(index)
    parts = []
    for run in runs:
        if not run:
            continue
        line = " ".join(at(index, values[index]) for index in run)
        back = " ".join(at(index, floor[index]) for index in reversed(run))
        parts.append(f'<polygon points="{line} {back}" fill="{color}" fill-opacity="{opacity}"/>')
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.8" '
            'stroke-linejoin="round"/>'
        )
    return "".join(parts)
