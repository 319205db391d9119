"""Asks an OpenAI-compatible server, again where that may help, and says what came of it."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx

from ..core.errors import shortened
from .errors import ExamError

TRY_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
LONGEST_WAIT = 60.0
CONNECT_SECONDS = 10.0
SHOWN_CHARACTERS = 300


class RequestFailed(Exception):
    """No answer came, for a reason that says nothing of the method."""


@dataclass(frozen=True)
class Retries:
    """How often and how soon a request is sent again.

    Attributes:
        most: Further attempts after the first.
        first_wait: Seconds before the second attempt; they double from one to the next, half as
            much again or less at random. A server's ``Retry-After`` counts where it is longer.

    """

    most: int = 4
    first_wait: float = 1.0

    def wait(self, attempt: int, asked: float = 0.0) -> float:
        """Return the seconds before the next attempt; the first attempt is 0."""
        spread = 0.5 + random.random()
        return min(LONGEST_WAIT, max(asked, self.first_wait * 2.0**attempt * spread))


@dataclass(frozen=True)
class Reply:
    """A complete response.

    Attributes:
        body: The JSON object.
        seconds: From sending to the last byte, of the attempt that succeeded.
        attempts: How many were made.

    """

    body: Mapping[str, Any]
    seconds: float
    attempts: int


class ExamClient:
    """A connection pool to one server.

    Args:
        base_url: Where the server is, with or without ``/v1``.
        timeout: Seconds that one attempt may take as a whole.
        retries: How often and how soon to ask again.
        api_key: Key for servers that want one.

    """

    def __init__(
        self, base_url: str, timeout: float, retries: Retries, api_key: str | None = None
    ) -> None:
        self._root = base_url.rstrip("/").removesuffix("/v1")
        self._timeout, self._retries = timeout, retries
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(timeout, connect=min(CONNECT_SECONDS, timeout), pool=None),
            limits=httpx.Limits(max_connections=None),
        )

    async def __aenter__(self) -> ExamClient:
        """Return itself."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def chat(self, body: Mapping[str, Any]) -> Reply:
        """Return the response to a chat request.

        Raises:
            RequestFailed: The server refuses it, or does not answer it however often it is asked.

        """
        attempt = 0
        while True:
            start = time.perf_counter()
            try:
                found = await self._once(body)
                return Reply(found, time.perf_counter() - start, attempt + 1)
            except _NotNow as reason:
                if attempt >= self._retries.most:
                    raise RequestFailed(f"{reason} ({attempt + 1} attempts)") from None
                await asyncio.sleep(self._retries.wait(attempt, reason.asked))
            attempt += 1

    async def _once(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            # The client's own limits are between bytes; one that sends a byte now and then never
            # reaches them.
            async with asyncio.timeout(self._timeout):
                response = await self._http.post(f"{self._root}/v1/chat/completions", json=body)
        except TimeoutError:
            raise _NotNow(f"no answer in {self._timeout:g} s") from None
        except httpx.HTTPError as error:
            raise _NotNow(f"{type(error).__name__}: {shortened(str(error), 120)}") from None
        if response.status_code in TRY_AGAIN:
            asked = _seconds(response.headers.get("Retry-After"))
            raise _NotNow(f"HTTP {response.status_code}", asked)
        if response.status_code != 200:
            said = shortened(response.text, SHOWN_CHARACTERS)
            raise RequestFailed(f"HTTP {response.status_code}: {said}")
        return _complete(response)

    async def model(self) -> str:
        """Return the name of the server's model.

        Raises:
            ExamError: The server does not answer, or has no model.

        """
        url = f"{self._root}/v1/models"
        try:
            response = await self._http.get(url)
            response.raise_for_status()
            return str(response.json()["data"][0]["id"])
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            raise ExamError(f"--base-url: {url} names no model ({error})") from None

    async def version(self) -> str | None:
        """Return the server's version, where it tells."""
        try:
            response = await self._http.get(f"{self._root}/version")
            return str(response.json()["version"]) if response.status_code == 200 else None
        except (httpx.HTTPError, ValueError, LookupError, TypeError):
            return None


class _NotNow(Exception):
    """An attempt failed, and another one may not."""

    def __init__(self, reason: str, asked: float = 0.0) -> None:
        super().__init__(reason)
        self.asked = asked


def _complete(response: httpx.Response) -> Mapping[str, Any]:
    """Return the body of a response that has everything an answer needs."""
    try:
        body = response.json()
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise _NotNow("the response is no JSON") from None
    choices = body.get("choices") if isinstance(body, dict) else None
    if not choices or not all(isinstance(each.get("message"), dict) for each in choices):
        raise _NotNow("the response has no choices")
    return dict(body)


def _seconds(text: str | None) -> float:
    """Return a ``Retry-After`` in seconds; its form as a date is left to our own waits."""
    try:
        return max(0.0, float(text or 0))
    except ValueError:
        return 0.0
