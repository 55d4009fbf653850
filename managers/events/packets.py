"""One event on its way to many sockets: encoded once, when the first of them wants it, and shared by all.

Must never know who listens. A packet says what may be done with it on the way: `must` ones arrive, of the others a
newer one with the same `key` takes the place of an older one (CONTRACT 6).
"""

from __future__ import annotations

import struct
from collections.abc import Hashable

import msgspec
from msgspec import UNSET, Struct

from managers.events.log import StoredFrame
from managers.events.types import (
    Channel,
    ComfyUIMessage,
    Event,
    GpuSample,
    LiveEvent,
    NodeEvent,
    Preview,
    QueueStatus,
    WorkflowProgress,
)

_ENCODER = msgspec.json.Encoder()
_TEXT, _BINARY = 0x81, 0x82  # FIN and the opcode (RFC 6455 §5.2)
_PREVIEW_WITH_METADATA = 4  # PROTOCOL §3, "Binary frames"
_REPEATING = {"comfyui:progress_state", "comfyui:progress", "comfyui:status"}
_ENDS = {"workflow:completed", "workflow:cancelled", "workflow:error"}
_UPLOADED, _OLD_NAME = "upload:completed", "upload_complete"


class _PreviewMetadata(Struct, frozen=True):
    """The JSON inside ComfyUI's format 4, and which workflow it is for."""

    node_id: str | None
    prompt_id: str
    display_node_id: str | None
    parent_node_id: str | None
    real_node_id: str | None
    image_type: str
    workflow_id: str


class PreviewText(Struct, frozen=True, tag_field="type", tag="preview", rename="camel"):
    """A preview for clients that take no binary frames; `image` goes out in base64."""

    workflow_id: str
    timestamp: int
    prompt_id: str
    node_id: str | None
    display_node_id: str | None
    mime: str
    image: bytes


class Packet:
    """What a socket is handed. `seq` is 0 for everything that is not stored, `workflow_id` None for what has none."""

    __slots__ = (
        "_content",
        "_frame",
        "_json_form",
        "_old_form",
        "_payload",
        "_text",
        "binary",
        "channel",
        "ends",
        "has_old_name",
        "key",
        "must",
        "seq",
        "workflow_id",
    )

    def __init__(
        self,
        content: Struct | None,
        *,
        payload: bytes | None = None,
        channel: Channel = "workflow",
        workflow_id: str | None = None,
        seq: int = 0,
        key: Hashable = None,
        must: bool = False,
        ends: bool = False,
        has_old_name: bool = False,
    ) -> None:
        self.channel = channel
        self.workflow_id = workflow_id
        self.seq = seq
        self.key = key
        self.must = must
        self.ends = ends
        self.has_old_name = has_old_name
        self.binary = isinstance(content, Preview)
        self._content = content
        self._payload = payload
        self._text: str | None = None
        self._frame: bytes | None = None
        self._json_form: Packet | None = None
        self._old_form: Packet | None = None

    @property
    def payload(self) -> bytes:
        """The message itself: JSON text, or a binary preview."""
        if self._payload is None:
            content = self._content
            self._payload = _preview(content) if isinstance(content, Preview) else _ENCODER.encode(content)
        return self._payload

    @property
    def text(self) -> str:
        """The payload of a packet that is not binary, for writers that want `str`."""
        if self._text is None:
            self._text = self.payload.decode()
        return self._text

    @property
    def frame(self) -> bytes:
        """The whole WebSocket frame as a server sends it, unmasked and uncompressed (RFC 6455 §5.2)."""
        if self._frame is None:
            self._frame = _frame(_BINARY if self.binary else _TEXT, self.payload)
        return self._frame

    def as_json(self) -> Packet:
        """The same for a client that takes no binary frames."""
        preview = self._content
        if not isinstance(preview, Preview):
            return self
        if self._json_form is None:
            text = PreviewText(
                workflow_id=preview.workflow_id,
                timestamp=preview.timestamp,
                prompt_id=preview.prompt_id,
                node_id=preview.node_id,
                display_node_id=preview.display_node_id,
                mime=preview.mime,
                image=preview.image,
            )
            self._json_form = Packet(text, channel=self.channel, workflow_id=self.workflow_id, key=self.key)
        return self._json_form

    def as_old(self) -> Packet:
        """The same under the name that it had before this service."""
        if self._old_form is None:
            self._old_form = _renamed(self) if self.has_old_name else self
        return self._old_form


def _renamed(packet: Packet) -> Packet:
    payload = packet.payload.replace(_UPLOADED.encode(), _OLD_NAME.encode(), 1)
    return Packet(
        None, payload=payload, channel=packet.channel, workflow_id=packet.workflow_id, seq=packet.seq, must=True
    )


def live(event: LiveEvent) -> Packet:
    """A packet that may be merged with a later one, or dropped, on the way to a slow peer."""
    workflow_id = None if event.workflow_id is UNSET else event.workflow_id
    return Packet(event, channel=event.channel, workflow_id=workflow_id, key=_key(event, workflow_id))


def stored(frame: StoredFrame) -> Packet:
    """A packet that arrives; its bytes are those on disk."""
    return Packet(
        None,
        payload=frame.data,
        channel=channel_of(frame.type),
        workflow_id=frame.workflow_id,
        seq=frame.seq,
        must=True,
        ends=frame.type in _ENDS,
        has_old_name=frame.type == _UPLOADED,
    )


def reply(answer: Struct, *, key: Hashable = None) -> Packet:
    """An answer to one client. With a `key` it is no more than a sign of life, and a newer one replaces it."""
    return Packet(answer, key=key, must=key is None)


def channel_of(stored_type: str) -> Channel:
    """The channel of a stored event, by its type (CONTRACT 6)."""
    return "backend" if stored_type.startswith("backend:") else "workflow"


def _key(event: LiveEvent, workflow_id: str | None) -> Hashable:
    match event:
        case WorkflowProgress():
            return ("progress", workflow_id)
        case NodeEvent():
            return ("node", workflow_id, event.node_id)
        case Preview():
            return ("preview", workflow_id)
        case QueueStatus() | GpuSample():
            return event.channel
        case ComfyUIMessage() if event.type in _REPEATING:
            return (event.type, event.backend, workflow_id)
        case Event() | ComfyUIMessage():
            return None


def _preview(preview: Preview) -> bytes:
    """ComfyUI's binary format 4, big endian: u32 4, u32 n, n bytes JSON, image (PROTOCOL §3)."""
    metadata = _ENCODER.encode(
        _PreviewMetadata(
            node_id=preview.node_id,
            prompt_id=preview.prompt_id,
            display_node_id=preview.display_node_id,
            parent_node_id=None,
            real_node_id=preview.node_id,
            image_type=preview.mime,
            workflow_id=preview.workflow_id,
        )
    )
    return struct.pack(">II", _PREVIEW_WITH_METADATA, len(metadata)) + metadata + preview.image


def _frame(first_byte: int, payload: bytes) -> bytes:
    size = len(payload)
    if size < 126:
        return bytes((first_byte, size)) + payload
    if size < 65536:
        return struct.pack("!BBH", first_byte, 126, size) + payload
    return struct.pack("!BBQ", first_byte, 127, size) + payload
