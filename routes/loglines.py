"""Lines of a log as server-sent events, for tasks and for ComfyUI."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any

import msgspec
from litestar import Request
from msgspec import Struct

from managers.processes.following import Gap
from managers.processes.logs import Line
from routes.sse import SseEvent

_encode = msgspec.json.Encoder().encode


class LogLine(Struct, frozen=True):
    """One line. `timestamp` (epoch ms) is when it was read: as it was written, or when it was asked for later."""

    line: str
    timestamp: int


class _Several(SseEvent, frozen=True, kw_only=True):
    """Events that go out together: a long log is read much faster so."""

    parts: tuple[SseEvent, ...]

    def encode(self) -> bytes:
        """One after the other."""
        return b"".join(part.encode() for part in self.parts)


def line_events(lines: Sequence[Line]) -> SseEvent:
    """An event for each line; its id is where to go on."""
    now = time.time_ns() // 1_000_000
    parts = tuple(SseEvent(data=_encode(LogLine(line.text, now)), id=line.end) for line in lines)
    return _Several(data=b"", parts=parts)


def gap_event(gap: Gap) -> SseEvent:
    """Lines that are kept no more."""
    return SseEvent(data=_encode({"from": gap.start, "to": gap.end}), id=gap.end, event="log-gap")


def offset_in(request: Request[Any, Any, Any]) -> int | None:
    """Where the client was: `Last-Event-ID`. None when it says nothing that can be one."""
    value = request.headers.get("last-event-id", "")
    return int(value) if re.fullmatch(r"[0-9]{1,18}", value) else None
