"""An OpenAI-compatible server without a model: it answers, or fails, as it is told.

    python -m tests.support.fake_server PORT_FILE

writes its port to a file and answers every question, slowly, until it is killed.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MODEL = "fake"
Body = Mapping[str, Any]
Reply = Mapping[str, Any]


@dataclass(frozen=True)
class Failure:
    """A response that is none.

    Attributes:
        status: Of HTTP.
        headers: Beside the usual ones.
        text: The body.
        cut: Bytes of a good answer after which the connection ends; ``None`` for a whole body.
        silent: Seconds without a word before the connection ends.
        drip: Seconds over which a byte comes now and then, without an end.

    """

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    text: str = "{}"
    cut: int | None = None
    silent: float = 0.0
    drip: float = 0.0


def completion(*texts: str, tokens: int = 10, cut: bool = False, **others: Any) -> Reply:
    """Return a response with a text a choice."""
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": text},
            "finish_reason": "length" if cut else "stop",
        }
        for index, text in enumerate(texts)
    ]
    usage = {"completion_tokens": tokens * len(texts), "prompt_tokens": 5}
    return {"id": "x", "model": MODEL, "choices": choices, "usage": usage, **others}


class FakeServer:
    """Answers chat requests by a function of the body and of how often that body came before."""

    def __init__(self, answer: Callable[[Body, int], Reply | Failure]) -> None:
        self.requests: list[Body] = []
        self.in_flight = self.most_in_flight = 0
        self._answer = answer
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self._http.daemon_threads = True

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    @contextmanager
    def running(self) -> Iterator[FakeServer]:
        """Answer in a thread."""
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield self
        finally:
            self._http.shutdown()
            self._http.server_close()

    def serve(self) -> None:
        """Answer until killed."""
        self._http.serve_forever()

    def reply(self, body: Body) -> Reply | Failure:
        """Note a request, and return what it gets."""
        with self._lock:
            before = self.requests.count(body)
            self.requests.append(body)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return self._answer(body, before)
        finally:
            with self._lock:
                self.in_flight -= 1


def _handler_of(server: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            pages: dict[str, Any] = {
                "/v1/models": {"data": [{"id": MODEL}]},
                "/version": {"version": "0.0"},
            }
            found = pages.get(self.path)
            self._send(404 if found is None else 200, json.dumps(found).encode(), {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            reply = server.reply(body)
            if not isinstance(reply, Failure):
                self._send(200, json.dumps(reply).encode(), {})
            elif reply.silent:
                time.sleep(reply.silent)
                self.close_connection = True
            elif reply.drip:
                self._drip(reply.drip)
            elif reply.cut is not None:
                whole = json.dumps(completion("never read")).encode()
                self._send(200, whole, {}, whole[: reply.cut])
                self.close_connection = True
            else:
                self._send(reply.status, reply.text.encode(), reply.headers)

        def _drip(self, seconds: float) -> None:
            self._send(200, b" " * 1000, {}, b"")
            self.close_connection = True
            until = time.monotonic() + seconds
            try:
                while time.monotonic() < until:
                    self.wfile.write(b" ")
                    time.sleep(0.02)
            except OSError:
                return

        def _send(
            self, status: int, whole: bytes, headers: Mapping[str, str], sent: bytes | None = None
        ) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(whole)))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(whole if sent is None else sent)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    return Handler


def slowly(body: Body, before: int) -> Reply:
    """Answer after a moment, every time the same."""
    time.sleep(0.03)
    return completion("\\boxed{1}")


def main(port_file: Path) -> None:
    """Answer until killed."""
    server = FakeServer(slowly)
    port_file.write_text(server.url)
    server.serve()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
