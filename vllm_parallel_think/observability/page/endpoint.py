"""vLLM's endpoint plugin that serves the page: ``GET /parallel-think``.

vLLM loads it only where ``VLLM_PLUGINS`` names it, and guards ``/v1`` alone with ``--api-key``:
whoever reaches the port reads the page.
"""

from __future__ import annotations

import base64
import hashlib
import re
from argparse import Namespace
from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse

from ..metrics import export
from . import PLUGIN, timelines

PATH = "/parallel-think"


class PageEndpoint:
    """Serves the page and its data; keeps no state and asks nothing of the engine."""

    name = PLUGIN
    required_tasks: tuple[str, ...] | None = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the two routes."""
        page = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
        headers = {
            "Content-Security-Policy": policy(page),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }

        def show() -> HTMLResponse:
            return HTMLResponse(page, headers=headers)

        def data() -> JSONResponse:
            found = timelines.read(export.directory())
            return JSONResponse(found, headers={"Cache-Control": "no-store"})

        app.add_api_route(PATH, show, methods=["GET"], include_in_schema=False)
        app.add_api_route(f"{PATH}/requests.json", data, methods=["GET"], include_in_schema=False)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Do nothing: the routes read files."""


def policy(page: str) -> str:
    """Return a policy under which the page runs its own script and style, and nothing else."""

    def own(tag: str) -> str:
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = hashlib.sha256(text.encode()).digest()
        return f"{tag}-src 'sha256-{base64.b64encode(digest).decode()}'"

    return (
        f"default-src 'none'; connect-src 'self'; {own('script')}; {own('style')}; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )
