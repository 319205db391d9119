"""What a server without the plugin exports, beside one with it."""

from __future__ import annotations

from pathlib import Path

from tests.deploy.watched import Watched
from tests.support.scrape import Scrape
from tests.support.server import Server


def test_none_of_vllms_metrics_is_lost_and_none_of_ours_is_there(
    model: Path, watched: Watched, tmp_path: Path
) -> None:
    """INV-1 for ``/metrics``: the plugin is installed, but not asked for."""
    plain = Server(model, tmp_path / "plain.log", None)
    try:
        plain.wait_ready()
        scrape = Scrape(plain.http.get("/metrics").text)
        page = plain.http.get("/parallel-think").status_code
    finally:
        plain.stop()
    theirs = {name for name in scrape.names("") if not name.startswith("vllm_pt_")}
    assert len([name for name in theirs if name.startswith("vllm:")]) > 50
    assert theirs <= watched.before.names("")
    assert not scrape.names("vllm_pt_")
    assert page == 404
