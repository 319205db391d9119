"""The grid as a picture: speed-up over prefix, a colour per width, a panel per model and suffix."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any
from xml.sax.saxutils import escape

WIDTH, HEIGHT, MARGIN, HEAD = 300, 220, 46, 44
COLORS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#777777")


def draw(records: Iterable[dict[str, Any]], contender: str) -> str:
    """An SVG of `contender`'s speed-up over the first one; dashed: the bound by traffic."""
    panels: dict[tuple[str, str, int], dict[int, list[tuple[int, float, float]]]] = {}
    for record in records:
        point = record["point"]
        if not point["shared"] or contender not in record["contenders"]:
            continue
        panel = panels.setdefault(
            (point["model"], point["dtype"], point["suffix"]), defaultdict(list)
        )
        speedup = record["contenders"][contender]["speedup"]
        panel[point["width"]].append((point["prefix"], speedup, record["bound"]))
    columns = min(4, max(1, len({suffix for *_, suffix in panels})))
    if columns == 1:
        columns = min(3, max(1, len(panels)))
    rows = -(-len(panels) // columns)
    size = f'width="{columns * WIDTH}" height="{rows * HEIGHT + HEAD}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="10">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="8" y="16" font-size="12">{escape(contender)}: times as fast as row by row, '
        "over the prefix; dashed: bound by traffic</text>",
    ]
    widths = sorted({width for lines in panels.values() for width in lines})
    colors = dict(zip(widths, COLORS, strict=False))
    for number, (width, color) in enumerate(colors.items()):
        parts.append(
            f'<text x="{MARGIN + 60 * number}" y="34" fill="{color}">'
            f"{width} row{'s' if width > 1 else ''}</text>"
        )
    for number, (name, lines) in enumerate(sorted(panels.items())):
        x, y = number % columns * WIDTH, number // columns * HEIGHT + HEAD
        parts.append(f'<g transform="translate({x},{y})">{_panel(name, lines, colors)}</g>')
    return "\n".join([*parts, "</svg>\n"])


def _panel(
    name: tuple[str, str, int],
    lines: dict[int, list[tuple[int, float, float]]],
    colors: dict[int, str],
) -> str:
    prefixes = sorted({p for points in lines.values() for p, _, _ in points})
    top = max(max(s, b) for points in lines.values() for _, s, b in points)
    left, right = math.log2(prefixes[0]), math.log2(max(prefixes[-1], prefixes[0] * 2))
    high = max(1.0, math.log2(top))

    def at(prefix: float, speedup: float) -> tuple[float, float]:
        across = (math.log2(prefix) - left) / (right - left)
        up = (math.log2(max(speedup, 0.5)) + 1) / (high + 1)
        return MARGIN + across * (WIDTH - 1.6 * MARGIN), HEIGHT - 30 - up * (HEIGHT - 60)

    title = f"{name[0]}, {name[1]}, suffix {name[2]}"
    parts = [f'<text x="{MARGIN}" y="14">{escape(title)}</text>']
    for power in range(-1, math.floor(high) + 1):
        x, y = at(prefixes[0], 2.0**power)
        end = at(2**right, 1)[0]
        parts.append(f'<path d="M{x:.1f} {y:.1f}H{end:.1f}" stroke="#ddd"/>')
        parts.append(
            f'<text x="{x - 5:.1f}" y="{y + 3:.1f}" text-anchor="end">{2.0**power:g}</text>'
        )
    for prefix in prefixes:
        x, _ = at(prefix, 1)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 16}" text-anchor="middle">{prefix}</text>')
    for width, points in sorted(lines.items()):
        color = colors[width]
        points.sort()
        for column, dash in ((1, ""), (2, ' stroke-dasharray="3 3" opacity="0.6"')):
            places = [at(point[0], point[column]) for point in points]
            line = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
            parts.append(f'<path d="M{line}" fill="none" stroke="{color}"{dash}/>')
        for point in points:
            x, y = at(point[0], point[1])
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{color}"/>')
    return "".join(parts)
