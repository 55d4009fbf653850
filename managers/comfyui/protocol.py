"""ComfyUI's wire, decoded: socket messages as a tagged union, binary frames, and what HTTP answers.

Must never do I/O and never raise on what a server sends: what is not understood comes out as `Unknown`, because
custom nodes send their own events and newer servers add types and keys (PROTOCOL §3, §8).
"""

from __future__ import annotations

import struct
from typing import Any, Literal

import msgspec
from msgspec import Raw, Struct

from managers.comfyui import tolerant

# ---- socket messages (PROTOCOL §3)


class ExecInfo(Struct, frozen=True):
    """How much ComfyUI has to do."""

    queue_remaining: int = 0


class StatusInfo(Struct, frozen=True):
    """The body of a `status` message."""

    exec_info: ExecInfo = ExecInfo()


class StatusMessage(Struct, frozen=True):
    """The queue changed; the first one on a connection also names the `sid`."""

    status: StatusInfo = StatusInfo()
    sid: str | None = None


class ExecutionStart(Struct, frozen=True):
    """The worker took the prompt up. `timestamp` is epoch ms."""

    prompt_id: str
    timestamp: int = 0


class ExecutionCached(Struct, frozen=True):
    """These nodes need not run."""

    prompt_id: str
    nodes: list[str] = []
    timestamp: int = 0


class Executing(Struct, frozen=True):
    """A node begins; `node` None ends the prompt; without `prompt_id` it is the greeting after a reconnect."""

    node: str | None = None
    display_node: str | None = None
    prompt_id: str | None = None


class Progress(Struct, frozen=True):
    """A step of a node (sent by nodes that count; may begin at 0 and never reach `max`)."""

    value: float
    max: float
    prompt_id: str | None = None
    node: str | None = None


class NodeState(Struct, frozen=True):
    """One node in a `progress_state`. Ids of expanded nodes are such as `2.0.0.1`."""

    value: float = 0
    max: float = 1
    state: str = "running"
    node_id: str = ""
    display_node_id: str | None = None
    parent_node_id: str | None = None
    real_node_id: str | None = None


class ProgressState(Struct, frozen=True):
    """All nodes begun so far, each time."""

    prompt_id: str
    nodes: dict[str, NodeState] = {}


class Executed(Struct, frozen=True):
    """A node with a ui output has ended, or was cached with its old output."""

    prompt_id: str
    node: str
    display_node: str | None = None
    output: dict[str, Any] | None = None


class ExecutionSuccess(Struct, frozen=True):
    """All went well; the history entry may not be there yet (PROTOCOL §1.4)."""

    prompt_id: str
    timestamp: int = 0


class ExecutionError(Struct, frozen=True):
    """A node raised. Not final by itself: a blocked branch says this too and the prompt goes on (PROTOCOL §3)."""

    prompt_id: str
    node_id: str = ""
    node_type: str = ""
    exception_message: str = ""
    exception_type: str = ""
    timestamp: int = 0


class ExecutionInterrupted(Struct, frozen=True):
    """Somebody interrupted it."""

    prompt_id: str
    node_id: str = ""
    node_type: str = ""
    timestamp: int = 0


class FeatureFlags(Struct, frozen=True):
    """The server's answer to ours."""

    supports_preview_metadata: bool = False


class Unknown(Struct, frozen=True):
    """A message of a type, or in a shape, that we do not know."""

    prompt_id: str | None = None


Body = (
    StatusMessage
    | ExecutionStart
    | ExecutionCached
    | Executing
    | Progress
    | ProgressState
    | Executed
    | ExecutionSuccess
    | ExecutionError
    | ExecutionInterrupted
    | FeatureFlags
    | Unknown
)


class Message(Struct, frozen=True):
    """A text frame: its name, its body decoded, and the body as it came."""

    type: str
    body: Body
    raw: Raw


class PreviewFrame(Struct, frozen=True):
    """A picture of a step. Without metadata (type 1) it belongs to the prompt and node that executes now."""

    image: bytes
    mime: str
    prompt_id: str | None = None
    node_id: str | None = None
    display_node_id: str | None = None


class TextFrame(Struct, frozen=True):
    """Progress text of a node (type 3)."""

    node_id: str
    text: str


class _Envelope(Struct):
    type: str
    data: Raw = Raw(b"null")


class _PreviewMetadata(Struct):
    prompt_id: str | None = None
    node_id: str | None = None
    display_node_id: str | None = None
    image_type: str = "image/jpeg"


_BODIES: dict[str, type[Any]] = {
    "status": StatusMessage,
    "execution_start": ExecutionStart,
    "execution_cached": ExecutionCached,
    "executing": Executing,
    "progress": Progress,
    "progress_state": ProgressState,
    "executed": Executed,
    "execution_success": ExecutionSuccess,
    "execution_error": ExecutionError,
    "execution_interrupted": ExecutionInterrupted,
    "feature_flags": FeatureFlags,
}
_envelope = msgspec.json.Decoder(_Envelope)
_bodies = {name: msgspec.json.Decoder(body, strict=False) for name, body in _BODIES.items()}
_metadata = msgspec.json.Decoder(_PreviewMetadata)
_anything: msgspec.json.Decoder[Any] = msgspec.json.Decoder()
_IDS = frozenset(
    {"prompt_id", "node", "node_id", "display_node", "display_node_id", "parent_node_id", "real_node_id"}
)


def decode_text(frame: str | bytes) -> Message | None:
    """Decode a text frame; None when it is not even an envelope.

    `raw` is JSON, whatever the server wrote, and has no paths of that machine that call themselves so.
    """
    try:
        envelope = tolerant.decode(tolerant.without_paths(frame), _envelope)
        return Message(envelope.type, _body(envelope.type, envelope.data), envelope.data)
    except (msgspec.DecodeError, UnicodeError):
        return None


def _body(name: str, data: Raw) -> Body:
    try:
        body: Body = _bodies[name].decode(data)
    except (KeyError, msgspec.DecodeError):
        return _odd_body(_BODIES.get(name, Unknown), data)
    return body


def _odd_body(kind: type[Any], data: Raw) -> Body:
    """It is not as it should be: perhaps only that a custom node gives ids as numbers."""
    found = _text_ids(tolerant.decode(bytes(data), _anything))
    try:
        body: Body = msgspec.convert(found, kind, strict=False)
    except msgspec.ValidationError:
        return Unknown() if kind is Unknown else _odd_body(Unknown, data)
    return body


def _text_ids(data: Any) -> Any:
    if not isinstance(data, dict):
        return data
    told = {key: str(value) if key in _IDS and type(value) is int else value for key, value in data.items()}
    match told.get("nodes"):
        case list(nodes):
            told["nodes"] = [str(node) if type(node) is int else node for node in nodes]
        case dict(nodes):
            told["nodes"] = {node_id: _text_ids(state) for node_id, state in nodes.items()}
    return told


def decode_binary(frame: bytes) -> PreviewFrame | TextFrame | None:
    """Decode a binary frame (PROTOCOL §3 "Binary frames"); None for unknown types and broken ones."""
    try:
        kind, size = struct.unpack_from(">II", frame)
        if kind == 1:
            return PreviewFrame(frame[8:], "image/png" if size == 2 else "image/jpeg")
        head, rest = frame[8 : 8 + size], frame[8 + size :]
        if len(head) < size:
            return None
        if kind == 3:
            return TextFrame(head.decode(), rest.decode())
        if kind == 4:
            meta = tolerant.decode(head, _metadata)
            return PreviewFrame(rest, meta.image_type, meta.prompt_id, meta.node_id, meta.display_node_id)
    except (struct.error, msgspec.DecodeError, UnicodeError):
        return None
    return None


FIRST_FRAME = msgspec.json.encode({"type": "feature_flags", "data": {"supports_preview_metadata": True}}).decode()
"""Must be the first text frame we send; as second it is ignored (PROTOCOL §3 "Handshake")."""

# ---- HTTP (PROTOCOL §2)


class PromptAccepted(Struct, frozen=True):
    """200 of POST /prompt. Non-empty `node_errors`: only part of the outputs would run."""

    prompt_id: str
    node_errors: dict[str, Any] = {}


class QueueItem(Struct, frozen=True, array_like=True):
    """An entry of GET /queue, of anybody's: so number and data may be anything. The elements behind are left out."""

    number: Any
    prompt_id: str
    prompt: Raw
    extra_data: Any = None

    @property
    def client_id(self) -> str | None:
        """The address its events go to."""
        value = self.extra_data.get("client_id") if isinstance(self.extra_data, dict) else None
        return value if isinstance(value, str) else None


class Queue(Struct, frozen=True):
    """GET /queue; what is pending is a raw heap, not sorted."""

    queue_running: list[QueueItem] = []
    queue_pending: list[QueueItem] = []


class HistoryMessage(Struct, frozen=True, array_like=True):
    """What the socket said, kept."""

    type: str
    data: Raw


class HistoryStatus(Struct, frozen=True):
    """The end of a prompt; the verdict is in the last of `messages`, never in `status_str` (PROTOCOL §1.5)."""

    status_str: str = ""
    messages: list[HistoryMessage] = []


class HistoryEntry(Struct, frozen=True):
    """An ended prompt; `status` may be null on old servers. `unreadable`: why nothing else is known of it."""

    outputs: dict[str, Any] = {}
    status: HistoryStatus | None = None
    prompt: Raw = Raw(b"null")
    unreadable: str | None = None

    @property
    def taken(self) -> frozenset[str] | None:
        """The output nodes that ComfyUI took of the graph: not all, where it refused some. None: it does not say."""
        item = tolerant.decode(bytes(self.prompt), _anything)
        ids = item[4] if isinstance(item, list) and len(item) > 4 else None
        return frozenset(map(str, ids)) if isinstance(ids, list) else None


class SystemInfo(Struct, frozen=True):
    """The part of GET /system_stats that we read."""

    comfyui_version: str = "unknown"


class SystemStats(Struct, frozen=True):
    """GET /system_stats."""

    system: SystemInfo = SystemInfo()
    devices: list[dict[str, Any]] = []


_history = msgspec.json.Decoder(HistoryEntry, strict=False)


def read_history(entry: Raw) -> HistoryEntry:
    """An entry of GET /history/{id}, in whatever shape it is."""
    try:
        return tolerant.decode(tolerant.without_paths(bytes(entry)), _history)
    except msgspec.DecodeError as error:
        return HistoryEntry(unreadable=str(error))


class End(Struct, frozen=True):
    """How ComfyUI says that a prompt ended. Times are epoch ms, None where it did not say."""

    verdict: Literal["success", "error", "interrupted", "unreadable"]
    start_time: int | None
    end_time: int | None
    cached: tuple[str, ...] = ()
    error: ExecutionError | None = None


def end_of(entry: HistoryEntry) -> End:
    """Read the verdict from the messages of a history entry; `status_str` only where there are none."""
    if entry.unreadable is not None:
        return End("unreadable", None, None)
    start: int | None = None
    cached: tuple[str, ...] = ()
    status = entry.status or HistoryStatus(status_str="success")
    end: End | None = None
    for message in status.messages:
        match _body(message.type, message.data):
            case ExecutionStart() as body:
                start = body.timestamp or None
            case ExecutionCached() as body:
                cached = tuple(body.nodes)
            case ExecutionSuccess() as body:
                end = End("success", start, body.timestamp or None, cached)
            case ExecutionError() as body:
                end = End("error", start, body.timestamp or None, cached, body)
            case ExecutionInterrupted() as body:
                end = End("interrupted", start, body.timestamp or None, cached)
            case _:
                pass
    if end is not None:
        return end
    return End("success" if status.status_str == "success" else "error", start, None, cached)
