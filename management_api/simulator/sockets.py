"""The WebSocket side: who is connected, who hears what, and the frames (PROTOCOL 3).

One publish loop awaits each socket in turn, so that one reader that stops blocks all of them, and the table of
clients is keyed by client id alone, so that a late close of an old socket makes the new one deaf. Both are faults of
the real server and kept on purpose. Nothing here knows what a prompt is.
"""

import asyncio
import struct
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, Final, Literal
from urllib.parse import parse_qs

import msgspec

Send = Callable[[Any], Awaitable[None]]
Receive = Callable[[], Awaitable[Any]]

_encode: Final = msgspec.json.Encoder().encode
_SEND_SECONDS: Final = 3600.0
"""A blocked peer blocks everybody (as recorded), but not for ever."""

ImageFormat = Literal["JPEG", "PNG"]


class Picture(msgspec.Struct, frozen=True):
    """An encoded preview picture."""

    format: ImageFormat
    data: bytes


class _Client:
    def __init__(self, send: Send) -> None:
        self.send = send
        self.flags: dict[str, Any] = {}


class Hub:
    """The connected clients and the queue of what is to be sent to them."""

    def __init__(self, flags: dict[str, Any]) -> None:
        self._flags = flags
        self._clients: dict[str, _Client] = {}
        self._outbox: asyncio.Queue[tuple[bytes | str, str | None]] = asyncio.Queue()
        self.silent = False
        """Fault: events are dropped instead of sent."""
        self.current_client: str | None = None
        """The client id of the last prompt that was started."""
        self.current_node: str | None = None
        """The display id of the node being executed, told to a client that reconnects."""

    def send(self, kind: str, data: object, client_id: str | None) -> None:
        """Queue a text event for one client, or with None for everybody."""
        self._outbox.put_nowait((_text(kind, data), client_id))

    def send_text(self, node_id: str, text: str, client_id: str | None) -> None:
        """Queue a binary frame of type 3."""
        node = node_id.encode()
        self._outbox.put_nowait((struct.pack(">II", 3, len(node)) + node + text.encode(), client_id))

    def send_preview(self, picture: Picture, client_id: str | None) -> None:
        """Queue a binary frame of type 1."""
        code = 1 if picture.format == "JPEG" else 2
        self._outbox.put_nowait((struct.pack(">II", 1, code) + picture.data, client_id))

    def send_preview_with_metadata(self, picture: Picture, metadata: dict[str, Any], client_id: str) -> None:
        """Queue a binary frame of type 4."""
        head = _encode(metadata | {"image_type": f"image/{picture.format.lower()}"})
        self._outbox.put_nowait((struct.pack(">II", 4, len(head)) + head + picture.data, client_id))

    def takes_metadata(self, client_id: str | None) -> bool:
        """Whether the client negotiated previews with metadata."""
        client = self._clients.get(client_id) if client_id is not None else None
        return client is not None and client.flags.get("supports_preview_metadata") is True

    async def publish(self) -> None:
        """Send what is queued, one frame after the other, for ever."""
        while True:
            frame, client_id = await self._outbox.get()
            if self.silent:
                continue
            if client_id is None:
                for client in list(self._clients.values()):
                    await _deliver(client, frame)
            elif client_id in self._clients:
                await _deliver(self._clients[client_id], frame)

    def peers(self) -> list[Send]:
        """The senders of all registered clients (for faults)."""
        return [client.send for client in self._clients.values()]

    async def serve(self, query: bytes, receive: Receive, send: Send, status: Callable[[], object]) -> None:
        """Talk to one client until it leaves. `status` gives the queue state for the greeting."""
        await receive()  # websocket.connect
        await send({"type": "websocket.accept"})
        client_id = parse_qs(query.decode()).get("clientId", [""])[0] or uuid.uuid4().hex
        client = _Client(send)
        self._clients[client_id] = client
        try:
            await _deliver(client, _text("status", {"status": status(), "sid": client_id}))
            if client_id == self.current_client and self.current_node is not None:
                await _deliver(client, _text("executing", {"node": self.current_node}))
            await self._listen(client, client_id, receive)
        finally:
            self._clients.pop(client_id, None)  # whoever is registered under this id by now: the recorded flaw

    async def _listen(self, client: _Client, client_id: str, receive: Receive) -> None:
        first = True
        while (message := await receive())["type"] != "websocket.disconnect":
            if not first or not isinstance(message.get("text"), str):
                continue
            try:
                body = msgspec.json.decode(message["text"])
            except msgspec.DecodeError:
                continue  # does not use up the chance to negotiate
            first = False
            if isinstance(body, dict) and body.get("type") == "feature_flags":
                client.flags = body.get("data") or {}
                self.send("feature_flags", self._flags, client_id)


def _text(kind: str, data: object) -> str:
    return _encode({"type": kind, "data": data}).decode()


async def _deliver(client: _Client, frame: bytes | str) -> None:
    message: dict[str, Any] = {"type": "websocket.send"}
    message["text" if isinstance(frame, str) else "bytes"] = frame
    try:
        async with asyncio.timeout(_SEND_SECONDS):
            await client.send(message)
    except (OSError, RuntimeError, TimeoutError):
        pass  # a client that has gone; its own task notices
