"""Kept-alive HTTP to one server, for short questions and short answers: what runs twice for every workflow.

Must never retry and never reuse a connection whose last exchange did not end well. httpx does all else (/view, large
answers); here it would cost more than everything the queue does for a workflow.
"""

from __future__ import annotations

import asyncio
import base64
import ssl
from typing import cast
from urllib.parse import quote, unquote, urlsplit

import httptools
from msgspec import Struct

_CONNECT_SECONDS = 5.0
_IDLE_SECONDS = 30.0
_MOST_IDLE = 8


class Answer(Struct, frozen=True):
    """A reply, whole."""

    status: int
    content: bytes


class NotSent(Exception):
    """No connection: the request has certainly not arrived."""


class NoAnswer(Exception):
    """The request may have arrived; no whole answer came back."""


class Channel:
    """The connections to `url`. Follows no redirect, asks for no compression, knows no proxy, sends no Origin."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._path = quote(parts.path.rstrip("/"), safe="/%~+=:@,;")
        head = f"Host: {parts.netloc.rpartition('@')[2]}\r\nAccept: application/json\r\n"
        if parts.username is not None:
            user = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
            head += f"Authorization: Basic {base64.b64encode(user).decode()}\r\n"
        self._head = head
        self._idle: list[_Connection] = []

    async def ask(self, method: str, path: str, body: bytes | None = None, *, seconds: float = 10.0) -> Answer:
        """One exchange; a body is JSON. Raises `NotSent`, or `NoAnswer` (also after `seconds`)."""
        connection = await self._connection()
        head = f"{method} {self._path}{path} HTTP/1.1\r\n{self._head}"
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        try:
            async with asyncio.timeout(seconds):
                answer = await connection.exchange(head.encode() + b"\r\n" + (body or b""))
        except TimeoutError:
            raise NoAnswer(f"no answer within {seconds:g} s") from None
        finally:
            if connection.reusable and len(self._idle) < _MOST_IDLE:
                self._idle.append(connection)
            else:
                connection.close()
        return answer

    def close(self) -> None:
        """Close what is idle."""
        while self._idle:
            self._idle.pop().close()

    async def _connection(self) -> _Connection:
        loop = asyncio.get_running_loop()
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable and loop.time() - connection.idle_since < _IDLE_SECONDS:
                return connection
            connection.close()
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._tls)
        except TimeoutError:
            raise NotSent(f"no connection within {_CONNECT_SECONDS:g} s") from None
        except OSError as error:
            raise NotSent(error.strerror or str(error)) from error
        return connection


class _Connection(asyncio.Protocol):
    """One connection, one exchange at a time."""

    def __init__(self) -> None:
        self.reusable = True
        self.idle_since = 0.0
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Answer] | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._body: list[bytes] = []
        self._status = 0
        self._ends_with_connection = False

    async def exchange(self, request: bytes) -> Answer:
        """Send, and wait for the whole answer. Raises `NoAnswer`."""
        assert self._transport is not None  # noqa: S101  # connected
        self.reusable = False
        self._answer = self._loop.create_future()
        self._begin()
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        """Close it now."""
        self.reusable = False
        if self._transport is not None:
            self._transport.abort()

    def _begin(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._body.clear()
        self._status = 0
        self._ends_with_connection = True

    # ---- asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Some of the answer, or what nobody asked for."""
        if self._parser is None or self._answer is None or self._answer.done():
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"the answer is no HTTP: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        """The end of the connection; of the answer too, where it gave no length."""
        self.reusable = False
        if exc is None and self._status and self._ends_with_connection:
            self._finish()
        else:
            self._fail(str(exc or "the connection was closed"))

    # ---- httptools

    def on_header(self, name: bytes, _value: bytes) -> None:
        """Only what tells the length."""
        if name.lower() in {b"content-length", b"transfer-encoding"}:
            self._ends_with_connection = False

    def on_headers_complete(self) -> None:
        """The status is known."""
        assert self._parser is not None  # noqa: S101  # it calls
        self._status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        """A piece."""
        self._body.append(body)

    def on_message_complete(self) -> None:
        """All of it; 1xx only announce another."""
        assert self._parser is not None  # noqa: S101  # it calls
        if 100 <= self._status < 200:
            self._status, self._ends_with_connection = 0, True
            return
        self.reusable = self._parser.should_keep_alive()
        self._finish()

    def _finish(self) -> None:
        self.idle_since = self._loop.time()
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(Answer(self._status, b"".join(self._body)))

    def _fail(self, reason: str) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(NoAnswer(reason))
        self.close()
