"""One representation over HTTP, in whole or in part: conditions, ranges, streaming (RFC 9110 §13, §14).

`plan` is arithmetic on headers and knows no file; `RangedResponse` streams whatever gives bytes for (start, length):
a local file, or a backend's `/view`. Must never hold a whole body in memory, and never end a short body as if whole.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from datetime import UTC
from email.utils import formatdate, parsedate_to_datetime
from typing import NoReturn
from urllib.parse import quote

import structlog
from litestar.exceptions import HTTPException
from litestar.response.base import ASGIResponse
from litestar.types import HTTPScope, Receive, Scope, Send
from msgspec import Struct

from managers.errors import ManagerError

Body = Callable[[int, int], AsyncGenerator[bytes, None]]
"""Gives `length` bytes from `start`. May raise `ManagerError` or OSError."""

_SEND_TIMEOUT = 60.0  # for one chunk; who takes nothing that long is gone
_RANGE = re.compile(r"\s*(\d*)-(\d*)\s*", re.ASCII)
_ETAG = re.compile(r'(?:W/)?"[^"]*"')

log = structlog.get_logger(__name__)


class Plan(Struct, frozen=True):
    """What to answer: the status, which bytes, and the headers that follow from both.

    200 and 206 send `length` bytes from `start`; 304, 412 and 416 send none.
    """

    status: int
    start: int
    length: int
    headers: dict[str, str]


def plan(headers: Mapping[str, str], *, method: str, size: int, etag: str, modified_at: int) -> Plan:
    """Judge the request `headers` (lower-case names) against a representation, in the order of RFC 9110 §13.2.2.

    `size` in bytes, `etag` with its quotes, `modified_at` in epoch seconds. Several ranges at once are answered with
    the whole (allowed by §14.2); a range that cannot be understood is ignored.
    """
    last_modified = formatdate(max(0, modified_at), usegmt=True)
    facts = {"etag": etag, "last-modified": last_modified, "accept-ranges": "bytes"}

    if (if_match := headers.get("if-match")) is not None:
        if not _lists(if_match, etag, weak=False):
            return Plan(412, 0, 0, facts)
    elif (since := _epoch(headers.get("if-unmodified-since"))) is not None and modified_at > since:
        return Plan(412, 0, 0, facts)

    if (if_none_match := headers.get("if-none-match")) is not None:
        if _lists(if_none_match, etag, weak=True):
            return Plan(304, 0, 0, facts)
    elif (since := _epoch(headers.get("if-modified-since"))) is not None and modified_at <= since:
        return Plan(304, 0, 0, facts)

    whole = Plan(200, 0, size, {**facts, "content-length": str(size)})
    asked = headers.get("range")
    if asked is None or method != "GET" or headers.get("if-range", etag) not in (etag, last_modified):
        return whole
    part = _part(asked, size)
    if part is None:
        return whole
    start, length = part
    if length <= 0:
        return Plan(416, 0, 0, {**facts, "content-range": f"bytes */{size}"})
    return Plan(
        206,
        start,
        length,
        {**facts, "content-length": str(length), "content-range": f"bytes {start}-{start + length - 1}/{size}"},
    )


def content_disposition(filename: str, *, inline: bool) -> str:
    """The header of RFC 6266: a plain name for all, the true one in `filename*` where they differ."""
    kind = "inline" if inline else "attachment"
    plain = re.sub(r"[^ !#$&+\-.0-9A-Z^_`a-z{}~()\[\]@,;=]", "_", filename)
    value = f'{kind}; filename="{plain}"'
    return value if plain == filename else f"{value}; filename*=UTF-8''{quote(filename, safe='')}"


class RangedResponse(ASGIResponse):
    """Sends what a plan of status 200, 206 or 304 says. The first bytes are fetched before the first header is sent,
    so that what is gone by then still gets a proper error; later the connection breaks.
    """

    _should_set_content_length = False

    def __init__(self, decided: Plan, body: Body, *, headers: Mapping[str, str], head: bool) -> None:
        super().__init__(status_code=decided.status, headers={**headers, **decided.headers})
        self._plan = decided
        self._body = body
        self._silent = head or decided.length == 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 -- ASGI
        """Send it (ASGI). Reads no further once the client is gone."""
        if self._silent:
            await self.start_response(send)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        async with aclosing(self._body(self._plan.start, self._plan.length)) as chunks:
            first = await anext(chunks, b"")
            await self.start_response(send)
            async with asyncio.TaskGroup() as tasks:
                gone = tasks.create_task(_disconnect(receive))
                try:
                    await self._stream(first, chunks, send, gone)
                except (ManagerError, OSError) as error:
                    # Returning without an end makes the server close: the client sees a broken body, not a short one.
                    log.warning("body cut short", reason=str(error) or type(error).__name__)
                finally:
                    gone.cancel()

    async def _stream(
        self, chunk: bytes | None, chunks: AsyncGenerator[bytes, None], send: Send, gone: asyncio.Task[None]
    ) -> None:
        left = self._plan.length
        while chunk is not None and not gone.done():
            left -= len(chunk)
            async with asyncio.timeout(_SEND_TIMEOUT):
                await send({"type": "http.response.body", "body": chunk, "more_body": left > 0})
            chunk = await anext(chunks, None) if left > 0 else None
        if left > 0 and not gone.done():
            raise OSError("the source ended too early")


def ranged_response(
    scope: HTTPScope,
    headers: Mapping[str, str],
    body: Body,
    *,
    size: int,
    etag: str,
    modified_at: int,
    content: Mapping[str, str],
) -> RangedResponse:
    """The answer to a GET or HEAD; `content` are the headers that go with the bytes (type, disposition, caching).

    Raises `HTTPException` 412 and 416: their handler has to pass on the exception's headers.
    """
    method = scope["method"]
    decided = plan(headers, method=method, size=size, etag=etag, modified_at=modified_at)
    if decided.status == 412:
        _refuse(decided, "The file is not the one the condition names")
    if decided.status == 416:
        _refuse(decided, f"The file has {size} bytes")
    told = {name: value for name, value in content.items() if decided.status != 304 or name == "cache-control"}
    return RangedResponse(decided, body, headers=told, head=method == "HEAD")


def _refuse(decided: Plan, detail: str) -> NoReturn:
    raise HTTPException(status_code=decided.status, detail=detail, headers=decided.headers)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _part(header: str, size: int) -> tuple[int, int] | None:
    """(start, length) of the one range asked for; None: send the whole; a length of 0 or less: outside."""
    unit, _, ranges = header.partition("=")
    match = _RANGE.fullmatch(ranges)
    if unit.strip().lower() != "bytes" or match is None or len(header) > 100:
        return None
    first, last = match.groups()
    if not first:
        if not last or (size == 0 and int(last) > 0):
            return None
        length = min(int(last), size)
        return size - length, length
    if last and int(last) < int(first):
        return None
    end = min(int(last), size - 1) if last else size - 1
    return int(first), end - int(first) + 1


def _lists(header: str, etag: str, *, weak: bool) -> bool:
    """Whether If-Match or If-None-Match names our strong etag, or anything with `*`."""
    if header.strip() == "*":
        return True
    return any((tag.removeprefix("W/") if weak else tag) == etag for tag in _ETAG.findall(header))


def _epoch(date: str | None) -> float | None:
    """Seconds of an HTTP date; None for none, or for one that cannot be understood."""
    if date is None:
        return None
    try:
        moment = parsedate_to_datetime(date)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
