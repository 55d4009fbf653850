"""What the monitor reads of ComfyUI, and what that means for the record.

Must never write anything, here or there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from msgspec import Raw

from managers.comfyui import tolerant
from managers.comfyui.client import ComfyUIClient
from managers.comfyui.protocol import End, HistoryEntry, end_of, read_history
from managers.comfyui.tracker import Tracker
from managers.comfyui.verdicts import Result, Verdict
from managers.events.types import Output

_histories = msgspec.json.Decoder(dict[str, Raw])
_anything: msgspec.json.Decoder[Any] = msgspec.json.Decoder()


class RecentClient(ComfyUIClient):
    """ComfyUI over HTTP, with the newest of its history. `outputs` is its folder where it is on this machine."""

    def __init__(self, url: str, outputs: Path | None) -> None:
        super().__init__(url)
        self.outputs = outputs

    async def recent(self, count: int) -> dict[str, Raw]:
        """The last prompts that ended, oldest first, by prompt id (PROTOCOL §2). Raises `BackendUnavailable`."""
        return await self._get(f"/history?max_items={count}", _histories)


class Ended:
    """An entry of the history, and what was run."""

    def __init__(self, prompt_id: str, entry: HistoryEntry) -> None:
        self.prompt_id = prompt_id
        self.entry = entry
        item = tolerant.decode(bytes(entry.prompt), _anything)
        item = item if isinstance(item, list) else []
        self.graph = Raw(msgspec.json.encode(item[2] if len(item) > 2 else {}))
        self.extra_data: object = item[3] if len(item) > 3 else None
        self.client_id = self.extra_data.get("client_id") if isinstance(self.extra_data, dict) else None
        end = end_of(entry)
        self.end_time = end.end_time or end.start_time
        """When it ended, as ComfyUI says (epoch ms); None: it does not say."""

    @classmethod
    def read(cls, prompt_id: str, entry: Raw) -> Ended:
        """One as it came, in whatever shape."""
        return cls(prompt_id, read_history(entry))


def graph_of(prompt: Raw) -> bytes:
    """The graph of a queue item as plain JSON text; an empty one where it is none."""
    found = tolerant.decode(bytes(prompt), _anything)
    return msgspec.json.encode(found if isinstance(found, dict) else {})


def evidence(tracker: Tracker) -> tuple[End, list[Output]] | None:
    """The end that the socket has shown, of a prompt that ComfyUI has forgotten since."""
    seen = tracker.evidence
    if seen.verdict is None:
        return None
    outputs = [output for of_node in seen.outputs.values() for output in of_node]
    return End(seen.verdict, seen.started, seen.ended, (), seen.error), outputs


def vanished(*, started: bool, same: bool, now: int) -> Verdict:
    """The verdict of a prompt that is nowhere any more. `same`: ComfyUI was not away since it was seen."""
    if same and not started:
        return Verdict(result=Result.CANCELLED, end_time=now, error="It was taken out of ComfyUI's queue")
    words = "ComfyUI no longer knows the prompt: it was restarted, or its queue or history was cleared"
    return Verdict(result=Result.LOST, end_time=now, error=words, error_type="lost")
