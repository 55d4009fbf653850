"""A receiver of webhooks: a real HTTP server on 127.0.0.1 that verifies what it gets with `standardwebhooks`.

It runs on threads of its own: it hears what a service in this process sends, and its answers can be held back.
"""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from msgspec import Struct
from standardwebhooks import Webhook

PATIENCE = 20
"""Seconds that nothing waited for here should need."""


class Call(Struct, frozen=True):
    """One request as it came."""

    path: str
    headers: dict[str, str]
    raw: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def body(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.raw)
        return found

    @property
    def type(self) -> str:
        found: str = self.body["type"]
        return found

    @property
    def workflow_id(self) -> str:
        found: str = self.body["data"]["workflowId"]
        return found

    def verify(self, secret: str) -> Any:
        """Raises unless this secret has signed it, now."""
        return Webhook(secret).verify(self.raw, self.headers)


class Answer(Struct, frozen=True):
    """What it says. `hold`: only when that is set."""

    status: int = 204
    headers: dict[str, str] = {}
    hold: threading.Event | None = None


Answers = Callable[[Call], Answer]


class Receiver:
    """`answer` decides about each call, in the order they come; `calls` are all of them."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.answer: Answers = lambda _: Answer()
        self.heard = threading.Condition()
        self.hold = threading.Event()
        self._server: ThreadingHTTPServer | None = None
        self._thread: threading.Thread | None = None
        self.port = 0
        self.scheme = "http"

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}/hook"

    def start(self, context: ssl.SSLContext | None = None) -> None:
        """Listen; on the same port when it did before."""
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["content-length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                call = Call(self.path, headers, raw)
                with receiver.heard:
                    receiver.calls.append(call)
                    answer = receiver.answer(call)
                    receiver.heard.notify_all()
                if answer.hold is not None:
                    answer.hold.wait(PATIENCE)
                with contextlib.suppress(OSError):  # nobody waits any more
                    self.send_response(answer.status)
                    for name, value in answer.headers.items():
                        self.send_header(name, value)
                    self.send_header("content-length", "0")
                    self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        if context is not None:
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            self.scheme = "https"
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Nobody listens any more."""
        self.hold.set()
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join(PATIENCE)
            self._server = self._thread = None

    def wait(self, right: Callable[[list[Call]], bool]) -> list[Call]:
        """All calls, when they are right. Blocks: from a loop by `asyncio.to_thread`."""
        with self.heard:
            assert self.heard.wait_for(lambda: right(self.calls), PATIENCE), [
                (call.type, call.id) for call in self.calls
            ]
            return list(self.calls)


@contextlib.contextmanager
def receiving() -> Iterator[Receiver]:
    """One that listens, gone afterwards."""
    receiver = Receiver()
    receiver.start()
    try:
        yield receiver
    finally:
        receiver.stop()
