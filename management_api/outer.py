"""The plain ASGI wrapper around the app: no request escapes it, not the 404, the 405, nor an upgrade (STACK §2).

In this order: request id, preflight, key, rate limit, open streams, the app; then, on every reply, the common
headers, the metrics and the access log. Must never read a body, and never put a query into a log: tickets travel
there.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any, cast

import structlog
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from management_api import logging
from management_api.cors import Cors, Header
from management_api.errors import INTERNAL, UNAUTHORIZED, Refusal, log_failure
from management_api.limits import ClientAddress, RateLimiter, Verdict
from management_api.logging import AccessLog
from management_api.open_streams import OpenStreams, TooManyStreams, is_stream
from management_api.route_names import RouteNames
from management_api.security import Authenticator, is_limited
from managers.callers import Caller
from metrics.http import HttpMetrics

SECURITY_HEADERS: list[Header] = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
]
DEFAULT_CSP: Header = (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'")
_MEDIA = (b"image/", b"video/", b"audio/")
_STREAM_RETRY_SECONDS = 10
_SANE_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_random = random.Random()  # noqa: S311 - a name for log lines, no secret
_log = structlog.get_logger(__name__)


class Outer:
    """Everything between the server and the app. One instance an app, no state of a request in it."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        authenticator: Authenticator,
        limiter: RateLimiter | None,
        addresses: ClientAddress,
        streams: OpenStreams,
        cors: Cors,
        names: RouteNames,
        metrics: HttpMetrics,
        access_log: AccessLog,
    ) -> None:
        self._app = app
        self._authenticator = authenticator
        self._limiter = limiter
        self._addresses = addresses
        self._streams = streams
        self._cors = cors
        self._names = names
        self._metrics = metrics
        self._access_log = access_log

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, send, self._cors)
        token = logging.request_id.set(exchange.request_id)
        client = self._addresses.of(scope["client"][0] if scope.get("client") else "local", scope["headers"])
        try:
            await self._answer(exchange, client, receive)
        except Exception as error:  # noqa: BLE001 -- the last place where an error can be logged and answered
            log_failure(error, exchange.method, exchange.path)
            if not exchange.status:
                await exchange.refuse(INTERNAL)
            # else the reply has begun and stays incomplete: the server breaks the connection off
        finally:
            seconds = time.perf_counter() - exchange.began
            status = exchange.status or 499  # gone before there was an answer
            route = exchange.scope.get("path_template") or self._names.of(exchange.path)
            self._metrics.observe(exchange.method, route, status, seconds, timed=not exchange.is_socket)
            self._access_log.write(
                request=exchange.request_id,
                client=client,
                method=exchange.method,
                path=exchange.path if exchange.path.isascii() else exchange.path.encode("utf-8", "replace").decode(),
                status=status,
                seconds=seconds,
                key=None if exchange.caller is None else exchange.caller.name,
            )
            logging.request_id.reset(token)

    async def _answer(self, exchange: _Exchange, client: str, receive: Receive) -> None:
        scope, path = exchange.scope, exchange.path
        if self._cors.enabled:
            preflight = self._cors.preflight(exchange.method, scope["headers"])
            if preflight is not None:
                exchange.extra = preflight
                await exchange.reply(204, [], b"")
                return
        refused = self._refuse(exchange, client)
        if refused is not None:
            await exchange.refuse(refused)
            return
        if exchange.method == "HEAD" and self._authenticator.is_open(path):
            # Service pages are cheap to make; the server sees HEAD in its own scope and leaves the body out.
            exchange.scope = scope = {**scope, "method": "GET"}
        if is_stream(scope):
            try:
                with self._streams.one(client):
                    await self._app(cast("Scope", scope), receive, exchange.send)
            except TooManyStreams as error:
                await exchange.refuse(Refusal(429, str(error), retry_after=_STREAM_RETRY_SECONDS))
        else:
            await self._app(cast("Scope", scope), receive, exchange.send)
        if not exchange.status and exchange.is_socket:
            await exchange.refuse(INTERNAL)

    def _refuse(self, exchange: _Exchange, client: str) -> Refusal | None:
        """429 or 401. What is limited counts for wrong keys too, and 429 goes first: a guess is told nothing."""
        scope, path = exchange.scope, exchange.path
        is_open = self._authenticator.is_open(path)
        if not is_open:
            scope["auth"] = exchange.caller = self._authenticator.authenticate(cast("Scope", scope))
        verdict = self._count(exchange, client, is_open=is_open)
        if verdict is not None and not verdict.allowed:
            return _too_many(verdict)
        return None if is_open or exchange.caller is not None else UNAUTHORIZED

    def _count(self, exchange: _Exchange, client: str, *, is_open: bool) -> Verdict | None:
        """Where the client stands now: the key when it has a limit of its own, else the address."""
        limiter, caller = self._limiter, exchange.caller
        if limiter is None:
            return None
        limited = is_limited(exchange.method, exchange.path)
        if caller is not None and caller.rate_limit is not None:
            verdict = limiter.hit_key(caller.name, caller.rate_limit) if limited else None
        elif limited:
            verdict = limiter.hit(client)
        elif is_open:
            return None
        else:
            verdict = limiter.too_many_failures(client)
            if caller is None and verdict is None:
                limiter.failed(client)
            return verdict
        if verdict is not None:
            exchange.limited(verdict)
        return verdict


class _Exchange:
    """One request: its names, and its reply on the way out."""

    def __init__(self, scope: Any, send: Send, cors: Cors) -> None:
        self.began = time.perf_counter()
        self.scope: dict[str, Any] = scope
        self.is_socket = scope["type"] == "websocket"
        self.method = "GET" if self.is_socket else scope["method"]
        self.path: str = scope["path"]
        self.status = 0
        self.caller: Caller | None = None
        self.extra = cors.headers(scope["headers"]) if cors.enabled else []
        self._send = send
        self.request_id = _request_id(scope["headers"])

    def limited(self, verdict: Verdict) -> None:
        """Tell the client where it stands."""
        self.extra += [
            (b"x-ratelimit-limit", b"%d" % verdict.limit),
            (b"x-ratelimit-remaining", b"%d" % verdict.remaining),
            (b"x-ratelimit-reset", b"%d" % verdict.reset_seconds),
        ]

    async def send(self, message: Message) -> None:
        """ASGI send for the app: adds the common headers, turns a close before the accept into an HTTP reply."""
        kind = message["type"]
        if kind in {"http.response.start", "websocket.http.response.start"}:
            started = cast("dict[str, Any]", message)
            self.status = started["status"]
            started["headers"] = self._headers(started.get("headers", ()))
        elif self.is_socket and not self.status:
            if kind == "websocket.accept":
                accepted = cast("dict[str, Any]", message)
                self.status = 101
                accepted["headers"] = [
                    *accepted.get("headers", ()),
                    (b"x-request-id", self.request_id.encode()),
                    *self.extra,
                ]
            elif kind == "websocket.close":
                await self.refuse(_of_close(self.scope, cast("Mapping[str, Any]", message)))
                return
        await self._send(message)

    async def refuse(self, refused: Refusal) -> None:
        """Answer with a problem."""
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in refused.all_headers().items()]
        await self.reply(refused.status, headers, refused.body(self.path))

    async def reply(self, status: int, headers: list[Header], body: bytes) -> None:
        """A whole HTTP reply, also before an upgrade (ASGI extension websocket.http.response)."""
        self.status = status
        kind = "http.response"
        if self.is_socket:
            kind = "websocket.http.response"
            if kind not in (self.scope.get("extensions") or {}):
                await self._send({"type": "websocket.close", "code": 1008, "reason": str(status)})
                return
        length = (b"content-length", b"%d" % len(body))
        headers = self._headers([*headers, length] if status != 204 else headers)
        await self._send(cast("Message", {"type": f"{kind}.start", "status": status, "headers": headers}))
        await self._send(cast("Message", {"type": f"{kind}.body", "body": body, "more_body": False}))

    def _headers(self, headers: Iterable[Header]) -> list[Header]:
        out = list(headers)
        wants_policy = True
        for name, value in out:
            if name == b"content-security-policy" or (name == b"content-type" and value.startswith(_MEDIA)):
                wants_policy = False
        out += SECURITY_HEADERS
        if wants_policy:
            out.append(DEFAULT_CSP)
        out.append((b"x-request-id", self.request_id.encode()))
        out += self.extra
        return out


def _request_id(headers: Iterable[Header]) -> str:
    for name, value in headers:
        if name == b"x-request-id":
            if _SANE_ID.fullmatch(value):
                return value.decode()
            break
    return f"{_random.getrandbits(128):032x}"


def _too_many(verdict: Verdict) -> Refusal:
    seconds = verdict.reset_seconds
    return Refusal(429, f"Rate limit of {verdict.rate} is used up, try again in {seconds} s", retry_after=seconds)


def _of_close(scope: Mapping[str, Any], message: Mapping[str, Any]) -> Refusal:
    """A close before the accept, as the HTTP reply a client understands: 4000 + status, and no route is 404."""
    if "path_template" not in scope:
        return Refusal(404, "There is no stream at this path")
    status = int(message.get("code") or 0) - 4000
    if not (400 <= status < 500 or status == 503):
        return INTERNAL
    retry_after = 5 if status == 503 else None
    return Refusal(status, str(message.get("reason") or "The stream was refused"), retry_after=retry_after)
