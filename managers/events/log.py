"""The port of the event log: durable, numbered, in commit order. The store writes it; everybody else reads it here.

Must never offer a way to write: an event exists because a transaction of the store wrote it beside its cause.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from msgspec import Struct


class StoredFrame(Struct, frozen=True):
    """A stored event as clients get it: `data` is its JSON text with `seq` inside."""

    seq: int
    type: str
    workflow_id: str | None
    data: bytes


class EventLog(Protocol):
    """What replay, server-sent events and deliveries need of the log."""

    @property
    def last_seq(self) -> int:
        """The seq of the last commit; 0 for none."""
        ...

    async def first_seq(self) -> int:
        """The oldest seq still kept; `last_seq + 1` when none is."""
        ...

    async def events_after(self, seq: int, limit: int) -> Sequence[StoredFrame]:
        """Events with a greater seq, in order."""
        ...

    async def events_of(self, workflow_id: str, after: int = 0) -> Sequence[StoredFrame]:
        """The life of one workflow, in order."""
        ...
