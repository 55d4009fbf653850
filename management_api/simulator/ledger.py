"""What a simulator really did, line by line in a file that outlives it: the witness of tests that kill processes.

Each line is one write with O_APPEND, in the file before the thing is told to anybody; so a death shows as a `start`
that follows a `begun` without an `ended`. (`told` alone comes after the fact: these bytes have left.) Must never
change what the simulator does, and knows nothing of who reads it. Without a file nothing is written.
"""

import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import parse_qs

import msgspec

Send = Callable[[Any], Awaitable[None]]
Happening = Literal["start", "socket", "taken", "begun", "ended", "told", "deleted", "interrupted"]
"""start: the process accepts prompts. socket: a client connected. taken: a prompt is queued. begun: it is the running
one. ended: with `verdict`. told: the end has left the process, through `socket` or, without it, by GET /history.
deleted: it waits no more. interrupted: the flag is up for it."""

_ENDS: Final = ("execution_success", "execution_error", "execution_interrupted")
_FIRST_BYTES: Final = 40


class Line(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line. `at` is epoch seconds; `marker` the prompt's `extra_data.queue_id`; `socket` counts connections."""

    at: float
    pid: int
    event: Happening
    prompt_id: str | None = None
    client_id: str | None = None
    marker: str | None = None
    verdict: str | None = None
    socket: int | None = None


class Ledger:
    """Writes the file. Raises OSError when it cannot: a witness that is silent is worse than none."""

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._sockets = 0
        self._write("start")

    def note(self, event: Happening, prompt_id: str, extra_data: dict[str, Any], verdict: str | None = None) -> None:
        """This is about to happen to a prompt."""
        client_id, marker = _text(extra_data.get("client_id")), _text(extra_data.get("queue_id"))
        self._write(event, prompt_id=prompt_id, client_id=client_id, marker=marker, verdict=verdict)

    def message(self, kind: str, prompt_id: str, extra_data: dict[str, Any]) -> None:
        """An execution message is about to be sent: the end is noted."""
        if kind in _ENDS:
            self.note("ended", prompt_id, extra_data, kind)

    def answered(self, path: str, body: bytes) -> None:
        """An answer has left: of a prompt's history when it has ended."""
        prompt_id = path.removeprefix("/api").partition("/history/")[2]
        if prompt_id and body != b"{}":
            self._write("told", prompt_id=prompt_id)

    def witnessed(self, send: Send, query: bytes) -> Send:
        """The sender of a WebSocket, watched for ends that leave through it."""
        if self._file is None:
            return send
        self._sockets += 1
        number = self._sockets
        client_id = parse_qs(query.decode("latin-1")).get("clientId", [None])[0]

        async def watched(message: Any) -> None:
            await send(message)
            if message["type"] == "websocket.accept":
                self._write("socket", client_id=client_id, socket=number)
            elif (text := message.get("text")) and any(kind in text[:_FIRST_BYTES] for kind in _ENDS):
                self._write("told", prompt_id=msgspec.json.decode(text)["data"]["prompt_id"], socket=number)

        if (owner := getattr(send, "__self__", None)) is not None:
            watched.__self__ = owner  # type: ignore[attr-defined]  # faults cut the connection through it
        return watched

    def _write(self, event: Happening, **fields: Any) -> None:
        if self._file is not None:
            line = Line(at=time.time(), pid=os.getpid(), event=event, **fields)
            os.write(self._file, msgspec.json.encode(line) + b"\n")


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
