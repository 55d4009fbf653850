"""What one socket wants to hear, and the frames in which it says so (CONTRACT 6). Pure: values in, values out.

Must never do I/O. A frame that cannot be understood is `BadFrame`, whatever is wrong with it.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

from managers.errors import ManagerError
from managers.events.types import Channel

PreviewFormat = Literal["binary", "json"]
Names = Literal["new", "old"]
Seq = Annotated[int, Meta(ge=0, le=2**63 - 1)]

MAX_IDS = 1000
"""Of workflows that one socket names. Who wants more hears all: that is no less to send, and less to look up."""

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE | re.ASCII)


class BadFrame(ManagerError):
    """A client frame that says nothing we understand; `code` is for programs."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Ping(Struct, frozen=True, tag_field="type", tag="ping"):
    """A client's own sign of life."""


class Selection(Struct, frozen=True, kw_only=True, rename="camel"):
    """The part of a frame that names workflows and channels. None: not mentioned."""

    workflow_id: str | list[str] | None = None
    channels: list[Channel] | None = None

    @property
    def ids(self) -> frozenset[str]:
        """The workflows named, canonical."""
        named = self.workflow_id
        return frozenset(map(str.lower, [named] if isinstance(named, str) else named or ()))


class Subscribe(Selection, frozen=True, kw_only=True, tag_field="type", tag="subscribe"):
    """Hear these workflows; `channels` replaces the channels; `since` asks for what was missed after that seq.

    `preview_format` chooses between ComfyUI's binary frames and base64 in JSON for the `preview` channel. With
    `names` old, `upload:completed` comes as `upload_complete`, as clients of older services know it.
    """

    since: Seq | None = None
    preview_format: PreviewFormat | None = None
    names: Names | None = None


class Unsubscribe(Selection, frozen=True, kw_only=True, tag_field="type", tag="unsubscribe"):
    """Hear these no more; naming neither workflows nor channels means all of them."""


ClientFrame = Ping | Subscribe | Unsubscribe

_DECODER: msgspec.json.Decoder[ClientFrame] = msgspec.json.Decoder(ClientFrame)


def parse(data: str | bytes, max_bytes: int) -> ClientFrame:
    """Understand a frame (`bytes`: a binary one, which no client has reason to send). Raises `BadFrame`."""
    if isinstance(data, bytes):
        raise BadFrame("binary_frame", "Send JSON in text frames")
    if len(data) > max_bytes or (len(data) * 4 > max_bytes and len(data.encode()) > max_bytes):
        raise BadFrame("frame_too_large", f"A frame may have {max_bytes} bytes")
    try:
        frame = _DECODER.decode(data)
    except msgspec.ValidationError as error:
        raise BadFrame("invalid_frame", str(error)[:300]) from None
    except msgspec.DecodeError as error:
        raise BadFrame("invalid_json", str(error)[:300]) from None
    except RecursionError:
        raise BadFrame("invalid_json", "The frame is nested too deeply") from None
    if isinstance(frame, Selection):
        for workflow_id in frame.ids:
            if not _UUID.fullmatch(workflow_id):
                raise BadFrame("invalid_id", f"workflowId is no UUID: {workflow_id[:60]!r}")
    return frame


class Subscription(Struct, frozen=True, kw_only=True):
    """What a socket hears. `ids` None: all workflows, as a new socket does; empty: nothing at all."""

    ids: frozenset[str] | None = None
    channels: frozenset[Channel] = frozenset({"workflow"})
    preview_format: PreviewFormat = "binary"
    names: Names = "new"

    def wants(self, channel: Channel, workflow_id: str | None) -> bool:
        """Whether an event is for this socket; what belongs to no workflow goes by its channel alone."""
        if channel not in self.channels:
            return False
        ids = self.ids
        return ids is None or (workflow_id in ids if workflow_id is not None else bool(ids))

    def add(self, frame: Subscribe) -> Subscription:
        """The first ids narrow a socket that heard all; channels replace the channels. Raises `BadFrame`."""
        ids = self.ids
        if frame.ids:
            ids = frame.ids | (ids or frozenset())
            if len(ids) > MAX_IDS:
                raise BadFrame("too_many_ids", f"A socket may name {MAX_IDS} workflows; without names it hears all")
        return Subscription(
            ids=ids,
            channels=self.channels if frame.channels is None else frozenset(frame.channels),
            preview_format=frame.preview_format or self.preview_format,
            names=frame.names or self.names,
        )

    def remove(self, frame: Unsubscribe) -> Subscription:
        """Ids are taken from those named before: a socket that hears all cannot leave out one."""
        if not frame.ids and frame.channels is None:
            return replace(self, ids=frozenset())
        return replace(
            self,
            ids=None if self.ids is None else self.ids - frame.ids,
            channels=self.channels - frozenset(frame.channels or ()),
        )
