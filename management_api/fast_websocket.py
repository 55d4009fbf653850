"""uvicorn's WebSocket protocol, with a door for whole frames (STACK §3).

For `uvicorn.run(ws="management_api.fast_websocket:FastWebSocketProtocol", ws_per_message_deflate=False)`. It offers
the app a `Writer` in the ASGI scope: a frame that was built once is written to the transport as it is, and a paused
transport is the sign of a slow peer. It leans on uvicorn's inside (0.54), so the app must work without it too.

Must never write when uvicorn would not: between the accept and the close, on an open transport, without extensions.
Frames are whole, and so are uvicorn's own (pongs, pings, close), so the two may take turns on one transport.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ClassVar, cast

from uvicorn._types import ASGISendEvent
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.http11 import Request
from websockets.protocol import State

from managers.events.packets import Packet
from routes.stream import FRAME_WRITER


class FrameWriter:
    """The way to one peer, straight onto its transport."""

    __slots__ = ("_conn", "_is_closing", "_on_end", "_on_ready", "_write", "paused")

    def __init__(self, protocol: WebSocketsSansIOProtocol) -> None:
        self.paused = False
        self._conn = protocol.conn
        self._is_closing = protocol.transport.is_closing
        self._write = protocol.transport.write
        self._on_ready: Callable[[], None] | None = None
        self._on_end: Callable[[int, str], None] | None = None

    @property
    def ready(self) -> bool:
        """The peer reads, and neither side has begun to close."""
        return not self.paused and self._conn.state is State.OPEN and not self._is_closing()

    def write(self, packet: Packet) -> bool:
        """Into the transport, at once; False when not `ready`."""
        if self.paused or self._conn.state is not State.OPEN or self._is_closing():
            return False
        self._write(packet.frame)
        return True

    def attach(self, on_ready: Callable[[], None], on_end: Callable[[int, str], None]) -> None:
        """Called when the peer reads again, and when it is gone."""
        self._on_ready, self._on_end = on_ready, on_end

    def resumed(self) -> None:
        """The transport has room again."""
        self.paused = False
        if self._on_ready is not None:
            self._on_ready()

    def lost(self) -> None:
        """The connection is gone."""
        if self._on_end is not None:
            self._on_end(0, "")


class FastWebSocketProtocol(WebSocketsSansIOProtocol):
    """uvicorn's own, which also never waits for ever for a peer that has stopped reading."""

    abort_seconds: ClassVar[float] = 5.0
    writer: FrameWriter | None = None
    abort_timer: asyncio.TimerHandle | None = None

    def handle_connect(self, event: Request) -> None:
        """The app starts in a task of its own, so the scope can still be added to."""
        super().handle_connect(event)
        if not self.close_sent and not self.conn.extensions:
            self.writer = FrameWriter(self)
            cast("dict[str, object]", self.scope["extensions"])[FRAME_WRITER] = self.writer

    def pause_writing(self) -> None:
        """The transport holds more than its high-water mark: the peer is slow."""
        super().pause_writing()
        if self.writer is not None:
            self.writer.paused = True

    def resume_writing(self) -> None:
        """It has drained."""
        super().resume_writing()
        if self.writer is not None:
            self.writer.resumed()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the session, which may be waiting for room rather than for a message."""
        super().connection_lost(exc)
        if self.abort_timer is not None:
            self.abort_timer.cancel()
        if self.writer is not None:
            self.writer.lost()

    async def send(self, message: ASGISendEvent) -> None:
        """A close does not wait for room: it goes behind what is in the buffer, and has a deadline."""
        if message["type"] == "websocket.close" and self.handshake_complete and not self.writable.is_set():
            self.writable.set()
            self._abort_later()
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and self.close_sent:
            self.handshake_complete = True  # it was refused, and that is an answer: uvicorn would call it an error

    def keepalive_timeout(self) -> None:
        """The peer does not answer pings; it may not read either, and a transport with a full buffer never closes."""
        super().keepalive_timeout()
        self._abort_later()

    def shutdown(self) -> None:
        """The server stops."""
        super().shutdown()
        self._abort_later()

    def _abort_later(self) -> None:
        if self.abort_timer is None and not self.disconnected:
            self.abort_timer = self.loop.call_later(self.abort_seconds, self.transport.abort)
