"""The live stream (CONTRACT 6): the upgrade and its refusals, and the way from ASGI to a `StreamSession` and back.

Must never hold a rule of the stream itself: who hears what, and in which order, is decided in `managers.events`. Who
may come in at all has been decided before, in the security layer.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

import structlog
from litestar import Request, Response, WebSocket, post, websocket
from litestar.di import NamedDependency
from litestar.exceptions import WebSocketDisconnect
from litestar.types import Send
from msgspec import Struct

from managers.clock import Clock
from managers.events.hub import Hub
from managers.events.log import EventLog
from managers.events.packets import Packet
from managers.events.session import End, SnapshotSource, StreamConfig, StreamSession, Writer
from managers.events.tickets import Ticket, Tickets
from routes.access import caller_of
from routes.problems import documented, problems

FRAME_WRITER = "management_api.frame_writer"
"""The ASGI scope extension under which a server that can take whole frames offers its `Writer`."""

_MAX_WAITING = 64

_log = structlog.get_logger(__name__)


class Streams(Struct, frozen=True, kw_only=True):
    """What the stream is made of. `origins` are those that may connect from a browser beside our own; `*`: all."""

    hub: Hub
    log: EventLog
    source: SnapshotSource
    tickets: Tickets
    clock: Clock
    config: StreamConfig = StreamConfig()
    origins: tuple[str, ...] = ()


@post(
    "/v1/comfyui/stream/ticket",
    status_code=200,
    summary="A ticket for a browser",
    description=(
        "Single use, 60 s: for WebSocket and EventSource, as `?ticket=`, where a browser can set no header. It "
        "stands for the key that asked for it."
    ),
    tags=["stream"],
    responses=problems(503),
    opt=documented(
        reply={"ticket": "pX0rZc4mB0h3v4m1Hq0wW2m3u0oJ6m8n9v7b5c3x1z0", "expiresAt": 1795363451482},
    ),
)
async def stream_ticket(request: Request[Any, Any, Any], streams: NamedDependency[Streams]) -> Response[Ticket]:
    """Answer POST /v1/comfyui/stream/ticket."""
    return Response(streams.tickets.issue(caller_of(request)), headers={"Cache-Control": "no-store"})


@websocket("/v1/comfyui/stream")
async def stream(socket: WebSocket[Any, Any, Any], streams: NamedDependency[Streams]) -> None:
    """Accept, converse, close. A close before the accept, with 4000 + a status, becomes an HTTP problem outside."""
    if not origin_allowed(socket.headers.getall("origin", []), socket.headers.get("host", ""), streams.origins):
        return await socket.close(4403, "This origin may not connect")
    try:
        since = _since(socket.scope["query_string"])
    except ValueError:
        return await socket.close(4400, "since must be the seq of an event: a whole number from 0")
    if streams.hub.closing:
        return await socket.close(4503, "The service is about to stop")
    await socket.accept(_protocol(socket.scope["subprotocols"]))
    try:
        async with asyncio.TaskGroup() as tasks:
            writer, pump = _writer(socket, streams.config.stall_seconds, tasks)

            async def say_goodbye(end: End) -> None:
                if pump is not None:
                    await pump.finish(streams.config.close_seconds)
                if end.code:
                    await _close(socket, end, streams.config.close_seconds)

            session = StreamSession(
                hub=streams.hub,
                log=streams.log,
                source=streams.source,
                clock=streams.clock,
                config=streams.config,
                writer=writer,
                since=since,
                welcome=caller_of(socket).welcome,
            )
            await session.run(_receiver(socket), say_goodbye)
    except* Exception as errors:  # noqa: BLE001 - the framework would close with 4500 and say nothing
        _log.error("stream failed", exc_info=errors)
        await _close(socket, End(1011, "Internal error"), streams.config.close_seconds)
    return None


stream_routes = [stream, stream_ticket]


def origin_allowed(origins: Collection[str], host: str, allowed: Collection[str]) -> bool:
    """Whether a page of this origin may connect: its own host, or one that is allowed. No Origin: not a browser."""
    known = {origin.lower().rstrip("/") for origin in allowed}
    return "*" in known or all(_same_host(origin, host) or origin.lower() in known for origin in origins)


def _same_host(origin: str, host: str) -> bool:
    try:
        parts = urlsplit(origin.lower())
    except ValueError:
        return False
    default = {"http": ":80", "https": ":443"}.get(parts.scheme)
    if default is None:
        return False
    return parts.netloc.removesuffix(default) == host.lower().removesuffix(default)


def _since(query: bytes) -> int | None:
    given = parse_qs(query.decode("latin-1"), keep_blank_values=True, max_num_fields=100).get("since")
    if given is None:
        return None
    if len(given) != 1 or not (given[0].isascii() and given[0].isdigit() and len(given[0]) <= 18):
        raise ValueError
    return int(given[0])


def _protocol(offered: list[str]) -> str | None:
    """The scheme of the pair `bearer, <key>` as it was offered; the key is never echoed."""
    return offered[0] if len(offered) >= 2 and offered[0].lower() == "bearer" else None


async def _close(socket: WebSocket[Any, Any, Any], end: End, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await socket.close(end.code, end.reason)
    except (OSError, TimeoutError, WebSocketDisconnect):
        pass  # it has gone by itself, or will never read what we have to say


def _receiver(socket: WebSocket[Any, Any, Any]) -> Callable[[], Any]:
    async def receive() -> str | bytes | None:
        event = cast("dict[str, Any]", await socket.receive())
        if event["type"] != "websocket.receive":
            return None
        text = event.get("text")
        return text if text is not None else cast("bytes", event.get("bytes") or b"")

    return receive


def _writer(
    socket: WebSocket[Any, Any, Any], stall_seconds: float, tasks: asyncio.TaskGroup
) -> tuple[Writer, AsgiWriter | None]:
    offered = cast("dict[str, Any]", socket.scope.get("extensions") or {}).get(FRAME_WRITER)
    if offered is not None:
        return cast("Writer", offered), None
    writer = AsgiWriter(socket.send, stall_seconds)
    writer.start(tasks)
    return writer, writer


class AsgiWriter:
    """A `Writer` over plain ASGI, for any server: a task sends what was written, one after the other."""

    def __init__(self, send: Send, stall_seconds: float) -> None:
        self._send = cast("Callable[[dict[str, Any]], Any]", send)
        self._stall_seconds = stall_seconds
        self._waiting: deque[Packet] = deque()
        self._wake = asyncio.Event()
        self._finishing = False
        self._lost = False

    @property
    def ready(self) -> bool:
        """There is room."""
        return len(self._waiting) < _MAX_WAITING and not self._lost

    def attach(self, on_ready: Callable[[], None], on_end: Callable[[int, str], None]) -> None:
        """Called when there is room again, and when there will never be."""
        self._on_ready, self._on_end = on_ready, on_end

    def write(self, packet: Packet) -> bool:
        """Send it when its turn comes; False when not `ready`."""
        if not self.ready:
            return False
        self._waiting.append(packet)
        self._wake.set()
        return True

    def start(self, tasks: asyncio.TaskGroup) -> None:
        """Begin to send."""
        self._pump = tasks.create_task(self._run())

    async def finish(self, seconds: float) -> None:
        """Send what was written, as far as the peer takes it in so many seconds, and stop."""
        self._finishing = True
        self._wake.set()
        await asyncio.wait({self._pump}, timeout=seconds)
        self._pump.cancel()

    async def _run(self) -> None:
        now = asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(None) as deadline:
                while self._waiting or not self._finishing:
                    while self._waiting:
                        deadline.reschedule(now() + self._stall_seconds)
                        await self._send(_message(self._waiting[0]))
                        self._waiting.popleft()
                        if len(self._waiting) == _MAX_WAITING - 1:
                            self._on_ready()
                    deadline.reschedule(None)
                    self._wake.clear()
                    if not self._finishing:
                        await self._wake.wait()
        except TimeoutError:
            self._end(1013, "Too slow: connect again and ask for what was missed with since")
        except (OSError, WebSocketDisconnect):
            self._end(0, "")

    def _end(self, code: int, reason: str) -> None:
        self._lost = True
        self._on_end(code, reason)


def _message(packet: Packet) -> dict[str, Any]:
    if packet.binary:
        return {"type": "websocket.send", "bytes": packet.payload}
    return {"type": "websocket.send", "text": packet.text}
