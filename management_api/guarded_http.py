"""uvicorn's HTTP protocol, with an end to what a client may send before anybody knows who it is (CONTRACT 1, 2).

For `uvicorn.run(http="management_api.guarded_http:GuardedHttpProtocol")`. uvicorn limits neither the size of a head
nor the time a client takes for it: one without a key could fill the memory, and some hundred that send a byte now and
then could hold every file handle. It leans on uvicorn's inside (0.54), so the app must work without it too.

Must never look into a request that is whole, nor limit a body that is still waited for: both are the app's.
"""

from __future__ import annotations

import asyncio
import secrets
from typing import ClassVar

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from management_api import logging
from management_api.errors import Refusal

_INVALID = Refusal(400, "This is no HTTP request")
_NO_HOST = Refusal(400, "A request names one Host, and no other")


class GuardedHttpProtocol(HttpToolsProtocol):
    """uvicorn's own, for clients that mean no good."""

    head_bytes: ClassVar[int] = 64 * 1024
    """Of a request line with its headers."""
    late_bytes: ClassVar[int] = 16 * 1024 * 1024
    """Of a body that was answered before it was there, as with a wrong key."""
    head_seconds: ClassVar[float] = 30.0
    """From the connection, or the first byte of the next request, to the end of the headers; and for a late body."""

    _deadline: asyncio.TimerHandle | None = None
    _in_head = False
    _upgraded = False
    _size = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client; it has to say something now."""
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        """It has gone."""
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes: whether they go on with a head, and come too late or are too many."""
        in_head = self._in_head
        super().data_received(data)
        if self._upgraded or self.transport.is_closing():
            return
        late = self.cycle is not None and self.cycle.response_complete and not self._in_head
        if late or (in_head and self._in_head):
            self._size += len(data)
            if late and self._size > self.late_bytes:
                self.transport.abort()
            elif not late and self._size > self.head_bytes:
                self._refuse(self._too_large())
        if self._deadline is None and (late or self._in_head):
            self._arm()

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._in_head, self._size = True, 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; behind a body nobody asks for any."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is whole, however few pieces it came in."""
        self._in_head, self._size = False, 0
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > self.head_bytes:
            self._refuse(self._too_large())
            raise httptools.HttpParserError("the head is too large")
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts > 1 or (not hosts and self.parser.get_http_version() == "1.1"):
            # RFC 9112 3.2: two could mean one to a proxy before us and the other to us.
            self._refuse(_NO_HOST)
            raise httptools.HttpParserError("not one Host")
        self._disarm()
        super().on_headers_complete()

    def handle_websocket_upgrade(self) -> None:
        """From here on it is another protocol's."""
        self._upgraded = True
        super().handle_websocket_upgrade()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 -- the same for everything
        """What the parser did not understand."""
        self._refuse(_INVALID)

    def _too_large(self) -> Refusal:
        return Refusal(431, f"The request line and the headers are larger than {self.head_bytes} bytes")

    def _refuse(self, refused: Refusal) -> None:
        if self.transport.is_closing():
            return
        request_id = secrets.token_hex(16)
        token = logging.request_id.set(request_id)
        body = refused.body("")
        logging.request_id.reset(token)
        headers = {
            **refused.all_headers(),
            "content-length": str(len(body)),
            "connection": "close",
            "x-content-type-options": "nosniff",
            "x-request-id": request_id,
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.transport.write(STATUS_LINE[refused.status] + head.encode() + b"\r\n" + body)
        self.transport.close()

    def _arm(self) -> None:
        self._deadline = self.loop.call_later(self.head_seconds, self._too_late)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_late(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()  # who does not read would not see a close
        else:
            self.transport.close()
