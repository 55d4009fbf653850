"""What happened as EventBridge is told it: detail types, the names in a detail, and what fits into one call.

Pure. Must never put anything of `extra_data` into a detail but the `queue_id`, which consumers find their job by.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec
from msgspec import Struct

from managers.events.log import StoredFrame

Naming = Literal["camel", "snake"]

SOURCE = "comfyui.monitor"
INITIALIZED = "Monitor Initialized"
STOPPED = "Monitor Stopped"
LIFECYCLE: Mapping[str, str] = {
    "workflow:started": "Job Started",
    "images:generated": "Images Generated",
    "upload:completed": "Upload Complete",
    "workflow:completed": "Job Completed",
    "workflow:error": "Job Failed",
    "workflow:cancelled": "Job Cancelled",
}
"""Stored events. `Job Failed` is the end: an attempt that is made again is not told."""
LIVE: Mapping[str, str] = {
    "queue:status": "Queue Status Updated",
    "workflow:progress": "Progress Update",
    "node:progress": "Node Progress Update",
    "node:executing": "Node Executing",
    "node:executed": "Node Executed",
}
"""Events that are told where there is room, and forgotten otherwise."""
ENDS = frozenset({"workflow:completed", "workflow:error", "workflow:cancelled"})

MOST_ENTRIES = 10
MOST_BYTES = 255 * 1024
"""Of an entry, and of all entries of a call. The limit is 256 KB; the rest is for those who count otherwise."""

_OF_EVENT = frozenset({"type", "timestamp", "workflowId", "seq"})
_KEPT = frozenset(
    {"promptId", "workflowId", "queueId", "clientId", "prompt_id", "workflow_id", "queue_id", "client_id"}
    | {"timestamp", "truncated"}
)
_OPAQUE = frozenset({"extra", "allowed"})
"""What holds other people's names, which stay as they are; so does the `output` of a node."""
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


class Whose(Struct, frozen=True, kw_only=True):
    """Whom an event is about: the prompt, who hears ComfyUI's events of it, and its consumer's own number for it."""

    prompt_id: str | None = None
    client_id: str | None = None
    queue_id: str | None = None


class Entry(Struct, frozen=True):
    """One event on its way: its detail is JSON text, its time epoch ms."""

    detail_type: str
    detail: str
    time: int
    size: int
    """In bytes, as EventBridge counts them."""


class _Retried(Struct, rename="camel"):
    will_retry: bool = False


_retried = msgspec.json.Decoder(_Retried)


def is_told(frame: StoredFrame) -> bool:
    """Whether EventBridge hears of it."""
    if frame.type == "workflow:error":
        return not _retried.decode(frame.data).will_retry
    return frame.type in LIFECYCLE


def entry_of(event: Mapping[str, Any], whose: Whose, naming: Naming) -> Entry:
    """The entry of an event as clients get it: JSON names, as plain values."""
    workflow_id = event.get("workflowId")
    kind = event["type"]
    own = {name: value for name, value in event.items() if name not in _OF_EVENT}
    detail = {
        "promptId": whose.prompt_id,
        "workflowId": workflow_id,
        "queueId": whose.queue_id or workflow_id,
        "clientId": whose.client_id,
        "timestamp": iso(event["timestamp"]),
        **own,
    }
    if naming == "snake":
        detail = snake(detail, _OPAQUE | {"output"} if kind.startswith("node:") else _OPAQUE)
    return fitted(LIFECYCLE.get(kind) or LIVE[kind], detail, event["timestamp"])


def own_entry(
    detail_type: str, fields: Mapping[str, Any], *, client_id: str | None, now: int, naming: Naming
) -> Entry:
    """The entry of what is about no workflow: our own start and end."""
    head = {"promptId": None, "workflowId": None, "queueId": None, "clientId": client_id, "timestamp": iso(now)}
    detail = {**head, **fields}
    return fitted(detail_type, snake(detail, frozenset()) if naming == "snake" else detail, now)


def fitted(detail_type: str, detail: Mapping[str, Any], time: int) -> Entry:
    """The entry. Where it would be too large its largest fields are left out, and named in `truncated`."""
    left = dict(detail)
    dropped: list[str] = []
    while True:
        text = msgspec.json.encode(left)
        # https://docs.aws.amazon.com/eventbridge/latest/userguide/eb-putevents.html: time counts 14 bytes
        size = 14 + len(SOURCE) + len(detail_type) + len(text)
        droppable = [name for name in left if name not in _KEPT]
        if size <= MOST_BYTES or not droppable:
            return Entry(detail_type, text.decode(), time, size)
        largest = max(droppable, key=lambda name: len(msgspec.json.encode(left[name])))
        del left[largest]
        dropped.append(largest)
        left["truncated"] = dropped


def calls(entries: Sequence[Entry]) -> Iterator[Sequence[Entry]]:
    """The entries in order, in as many calls as they need."""
    start = total = 0
    for number, entry in enumerate(entries):
        if number > start and (number - start == MOST_ENTRIES or total + entry.size > MOST_BYTES):
            yield entries[start:number]
            start, total = number, 0
        total += entry.size
    if entries:
        yield entries[start:]


def snake(value: Any, opaque: frozenset[str]) -> Any:
    """The same with `snake_case` names."""
    match value:
        case dict():
            return {
                _HUMP.sub("_", name).lower(): inner if name in opaque else snake(inner, opaque)
                for name, inner in value.items()
            }
        case list() | tuple():
            return [snake(inner, opaque) for inner in value]
        case _:
            return value


def iso(epoch_ms: int) -> str:
    """UTC with milliseconds and `Z`."""
    text = datetime.fromtimestamp(epoch_ms / 1000, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")
