"""The dashboard as a picture: a server under load, Prometheus, and the dashboard's own queries.

    python -m tests.deploy.picture --out deploy/grafana/dashboard.png

Grafana itself is not needed: every panel's queries run in a real Prometheus, and what it answers is
drawn here in the panel's place. Chromium turns the drawing into a picture.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from PIL import Image

from deploy.local import smollm2
from tests.deploy import chromium, drawing, load, queries
from tests.deploy.prometheus import Prometheus
from tests.support.server import Server

COLUMN, LINE, GAP = 66, 30, 8
NUM_POINTS = 240
STAGES = ((4, 0.55), (8, 0.3), (3, 0.15))
"""Clients at a time, and their share of the requests."""


def lines_of(
    prometheus: Prometheus, panel: dict[str, Any], start: float, end: float, window: str
) -> list[tuple[dict[str, str], drawing.Line]]:
    """Run a panel's queries; return their series on one row of times."""
    step = (end - start) / (NUM_POINTS - 1)
    found = []
    for target in panel["targets"]:
        text = queries.fill(target["expr"], window, f"{math.ceil(end - start)}s")
        for series in prometheus.range(text, start, end, step):
            values = [math.nan] * NUM_POINTS
            for at, value in series["values"]:
                index = round((at - start) / step)
                if 0 <= index < NUM_POINTS:
                    values[index] = float(value)
            name = target["legendFormat"]
            for label, value in series["metric"].items():
                name = name.replace("{{" + label + "}}", value)
            found.append((series["metric"], drawing.Line(name, tuple(values))))
    return found


def clock(start: float, end: float, num: int = 5) -> list[str]:
    """Return the names of a time axis."""
    times = [start + (end - start) * number / (num - 1) for number in range(num)]
    return [time.strftime("%H:%M:%S", time.localtime(at)) for at in times]


def draw(
    prometheus: Prometheus, start: float, end: float, window: str, until: str | None
) -> tuple[str, int, int]:
    """Return the dashboard as SVG with its width and height.

    Args:
        prometheus: Where the data is.
        start: Begin of the time shown.
        end: Its end.
        window: The range of rates.
        until: Title of the row before which the picture ends.

    """
    parts = []
    bottom = 0.0
    times = clock(start, end)
    for panel in queries.dashboard()["panels"]:
        if panel["type"] == "row" and panel["title"] == until:
            break
        at = panel["gridPos"]
        frame = drawing.Frame(
            at["x"] * COLUMN + GAP,
            at["y"] * LINE + 44,
            at["w"] * COLUMN - GAP,
            at["h"] * LINE - GAP,
        )
        bottom = max(bottom, frame.y + frame.height)
        if panel["type"] == "row":
            parts.append(drawing.text(frame.x + 4, frame.y + 17, f"⌄  {panel['title']}", 15))
            continue
        found = lines_of(prometheus, panel, start, end, window)
        unit = panel["fieldConfig"]["defaults"]["unit"]
        parts.append(drawing.card(frame, panel["title"]))
        if panel["type"] == "stat":
            decimals = panel["fieldConfig"]["defaults"].get("decimals")
            parts.append(drawing.stat(frame, found[0][1] if found else None, unit, decimals))
        elif panel["type"] == "heatmap":
            buckets = sorted(found, key=lambda item: float(item[0]["le"]))
            parts.append(
                drawing.heatmap(frame, [(labels["le"], line) for labels, line in buckets], times)
            )
        else:
            custom = panel["fieldConfig"]["defaults"]["custom"]
            stacked = custom["stacking"]["mode"] == "normal"
            parts.append(
                drawing.lines(frame, [line for _, line in found], unit, stacked, times[::2])
            )
    width, height = 24 * COLUMN + GAP, int(bottom) + GAP
    title = drawing.text(GAP + 4, 29, queries.dashboard()["title"], 19)
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-family="DejaVu Sans, Inter, sans-serif"><rect width="100%" height="100%" '
        f'fill="#111217"/>{title}{"".join(parts)}</svg>'
    )
    return svg, width, height


def photograph(page: str, out: Path, width: int, height: int, delay_ms: int = 0) -> None:
    """Let Chromium show a page and keep a picture of it, with few colours."""
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "picture.png"
        command = [chromium.find(), "--headless", "--no-sandbox", *chromium.FLAGS]
        command.append("--hide-scrollbars")
        command += [f"--window-size={width},{height}", f"--screenshot={picture}"]
        command += [f"--user-data-dir={folder}/profile"]
        if delay_ms:
            command.append(f"--virtual-time-budget={delay_ms}")
        subprocess.run([*command, page], check=True, capture_output=True, timeout=120)
        image = Image.open(picture).convert("RGB")
        image.quantize(96, dither=Image.Dither.NONE).save(out, optimize=True)


def photograph_page(url: str, keep: Path) -> None:
    """Keep pictures of the page of recent requests, light and dark."""
    for theme, out in (("light", keep), ("dark", keep.with_stem(f"{keep.stem}-dark"))):
        photograph(f"{url}/parallel-think?theme={theme}", out, 1180, 800, 4000)


def watch(model: Path, folder: Path, num: int, out: Path, keep: Path | None) -> None:
    """Put a server under load, and draw what Prometheus saw of it."""
    server = Server(
        model,
        folder / "server.log",
        load.options(folder),
        VLLM_PLUGINS="parallel_think,parallel_think_page",
    )
    prometheus = None
    try:
        server.wait_ready()
        prometheus = Prometheus(server.url.removeprefix("http://"), folder)
        prometheus.wait_ready()
        start = time.time()
        done = [0]
        camera = threading.Thread(target=photograph_page, args=(server.url, keep))

        def count(_: load.Seen) -> None:
            done[0] += 1
            if keep is not None and done[0] == round(0.9 * num):  # some still run
                camera.start()
            print(f"\r{done[0]} of {num} requests", end="", file=sys.stderr, flush=True)

        for number, (clients, share) in enumerate(STAGES):
            load.run(
                server.url,
                round(share * num),
                leaving=0.1,
                seed=number,
                concurrency=clients,
                seconds=300 * share,
                on_answer=count,
            )
        if camera.is_alive():
            camera.join()
        server.wait_idle()
        time.sleep(5)
        svg, width, height = draw(
            prometheus, start + 5, time.time() - 1, "30s", "Judge Decoding and Hogwild!"
        )
        page = folder / "dashboard.html"
        page.write_text(f'<meta charset="utf-8"><body style="margin:0">{svg}', encoding="utf-8")
        photograph(page.as_uri(), out, width, height)
        print(f"\n{out}: {out.stat().st_size // 1024} KiB", file=sys.stderr)
    finally:
        if prometheus is not None:
            prometheus.stop()
        server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where the picture goes")
    parser.add_argument("--page", type=Path, help="also keep pictures of the page, light and dark")
    parser.add_argument("--requests", type=int, default=100, help="default: %(default)s")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        watch(smollm2.ensure_model(), Path(folder), args.requests, args.out, args.page)


if __name__ == "__main__":
    main()
