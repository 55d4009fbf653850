"""The little HTTP that the simulator needs on bare ASGI: a request that can be read, replies that can be sent."""

from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs

import msgspec

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]

_encode = msgspec.json.Encoder().encode


class TooLarge(Exception):
    """The body is over the limit; it was read to its end and dropped."""


class Reply(msgspec.Struct, frozen=True):
    """One answer. An empty `content_type` sends no such header."""

    status: int = 200
    body: bytes = b""
    content_type: str = ""
    headers: tuple[tuple[bytes, bytes], ...] = ()


def as_json(value: object, status: int = 200) -> Reply:
    """A JSON answer."""
    return Reply(status, _encode(value), "application/json; charset=utf-8")


def as_text(text: str, status: int) -> Reply:
    """A plain text answer."""
    return Reply(status, text.encode(), "text/plain; charset=utf-8")


INTERNAL_ERROR = as_text("500 Internal Server Error\n\nServer got itself in trouble", 500)


class Request:
    """One HTTP request on ASGI."""

    def __init__(self, scope: Scope, receive: Receive, body_limit: int) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.query = {
            key: values[0]
            for key, values in parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True).items()
        }
        self._receive = receive
        self._body_limit = body_limit
        self._body: bytes | None = None

    async def body(self) -> bytes:
        """The whole body. TooLarge when it is over the limit."""
        if self._body is None:
            chunks, size, more = [], 0, True
            while more:
                message = await self._receive()
                chunk = message.get("body", b"")
                size += len(chunk)
                if size <= self._body_limit:
                    chunks.append(chunk)
                more = message["type"] == "http.request" and message.get("more_body", False)
            if size > self._body_limit:
                raise TooLarge
            self._body = b"".join(chunks)
        return self._body

    async def json(self) -> Any:
        """The body as JSON. msgspec.DecodeError when it is none."""
        return msgspec.json.decode(await self.body())


async def respond(send: Send, reply: Reply, *, head: bool = False) -> None:
    """Send an answer; with `head` without its body."""
    headers = [(b"content-length", str(len(reply.body)).encode()), *reply.headers]
    if reply.content_type:
        headers.append((b"content-type", reply.content_type.encode()))
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if head else reply.body})
