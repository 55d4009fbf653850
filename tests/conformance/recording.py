"""The recorded conversations of tests/data/transcripts as typed events (their README says what the fields mean)."""

import re
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

FOLDER = Path(__file__).parent.parent / "data" / "transcripts"
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")

Direction = Literal["note", "http-request", "http-response", "ws-open", "ws-in", "ws-out", "ws-close"]


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a transcript."""

    t: float
    dir: Direction
    conn: str = ""
    id: int = 0
    method: str = ""
    path: str = ""
    headers: dict[str, str] = {}
    multipart: dict[str, str] | None = None
    body: Any = UNSET
    body_text: str | None = None
    body_base64: str | None = None
    content_type: str = ""
    content_disposition: str = ""
    status: int = 0
    error: str = ""
    frame: str = ""
    message: Any = UNSET
    event_type: int = 0
    decoded: dict[str, Any] = {}
    text: str = ""
    code: int | None = None


class Frame(msgspec.Struct, frozen=True):
    """One WebSocket frame from the server: a text message, or a binary frame taken apart."""

    message: dict[str, Any] | UnsetType = UNSET
    event_type: int = 0
    decoded: dict[str, Any] = {}

    @property
    def kind(self) -> str:
        return f"binary {self.event_type}" if self.message is UNSET else str(self.message["type"])

    @property
    def data(self) -> dict[str, Any]:
        return {} if self.message is UNSET else dict(self.message["data"])

    @property
    def prompt(self) -> str | None:
        found = self.data.get("prompt_id") or self.decoded.get("metadata", {}).get("prompt_id")
        return None if found is None else str(found)

    @property
    def ends_node_run(self) -> bool:
        """Whether it is the verdict of a prompt."""
        if self.kind == "execution_error":
            return bool(self.data["exception_type"] != "ExecutionBlocked")
        return self.kind in ("execution_success", "execution_interrupted")

    @property
    def ends_prompt(self) -> bool:
        return self.kind == "executing" and self.data.get("node", "") is None


def names() -> list[str]:
    """All recorded cases."""
    return sorted(path.stem for path in FOLDER.glob("*.jsonl"))


def load(name: str) -> list[Event]:
    """The events of one case, in order."""
    lines = (FOLDER / f"{name}.jsonl").read_bytes().splitlines()
    events = [msgspec.json.decode(line, type=Event) for line in lines if line]
    if name == "cache_partial":  # the recorder kept the first request by reference and shows the second one's seed
        first = next(event for event in events if event.dir == "http-request" and event.id == 1)
        first.body["prompt"]["5"]["inputs"]["seed"] = 3
    return events


def frame_of(event: Event) -> Frame:
    """The frame of a `ws-in` event."""
    return Frame(event.message, event.event_type, event.decoded)


def frames(events: list[Event], conn: str) -> list[Frame]:
    """What one recorded socket heard."""
    return [frame_of(event) for event in events if event.dir == "ws-in" and event.conn == conn]


def submissions(events: list[Event]) -> dict[str, dict[str, Any]]:
    """The accepted request bodies by recorded prompt id."""
    bodies = {event.id: event.body for event in events if event.dir == "http-request" and event.path == "/prompt"}
    return {
        event.body["prompt_id"]: bodies[event.id]
        for event in events
        if event.dir == "http-response" and event.id in bodies and event.method == "POST" and event.status == 200
    }
