"""A curve as an SVG file: nothing to install, and any browser shows it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

SIZE, EDGE = 320, 48


def curve_svg(
    points: Sequence[tuple[float, float]],
    across: str,
    up: str,
    top: float = 1.0,
    span: tuple[float, float] = (0.0, 1.0),
    labels: Sequence[str] = (),
    intervals: Sequence[tuple[float, float]] = (),
) -> str:
    """Return a picture of points (x, y), joined in their order.

    Args:
        points: The curve.
        across: What x is.
        up: What y is, from 0 on.
        top: Highest y.
        span: Lowest and highest x.
        labels: A word for each point, or nothing.
        intervals: The lowest and highest y that a point may have, or nothing.

    """
    low, high = span
    points = [((x - low) / (high - low), y) for x, y in points]
    marks = "".join(
        f'<circle cx="{_x(x):.1f}" cy="{_y(y / top):.1f}" r="3" fill="#06c"/>'
        f'<text transform="translate({_x(x) + 4:.1f} {_y(y / top) - 8:.1f}) rotate(-60)">'
        f"{escape(label)}</text>"
        for (x, y), label in zip(points, labels, strict=False)
    )
    marks += "".join(
        f'<path d="M{_x(x):.1f} {_y(least / top):.1f}V{_y(most / top):.1f}" stroke="#06c"/>'
        for (x, _), (least, most) in zip(points, intervals, strict=False)
    )
    places = " ".join(f"{_x(x):.1f},{_y(y / top):.1f}" for x, y in points)
    ticks = "".join(
        f'<text x="{_x(t)}" y="{_y(0) + 16}" text-anchor="middle">{low + t * (high - low):g}</text>'
        f'<text x="{_x(0) - 6}" y="{_y(t) + 4}" text-anchor="end">{t * top:g}</text>'
        for t in (0, 0.5, 1)
    )
    full = SIZE + 2 * EDGE
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{full}" height="{full}" '
        f'font-family="sans-serif" font-size="12"><rect width="{full}" height="{full}" '
        f'fill="white"/><path d="M{_x(0)} {_y(1)}V{_y(0)}H{_x(1)}" fill="none" stroke="#888"/>'
        f'<polyline points="{places}" fill="none" stroke="#06c" stroke-width="2"/>{marks}{ticks}'
        f'<text x="{full / 2}" y="{full - 8}" text-anchor="middle">{escape(across)}</text>'
        f'<text x="14" y="{full / 2}" text-anchor="middle" '
        f'transform="rotate(-90 14 {full / 2})">{escape(up)}</text></svg>\n'
    )


def _x(value: float) -> float:
    return EDGE + SIZE * value


def _y(value: float) -> float:
    return EDGE + SIZE * (1 - value)
