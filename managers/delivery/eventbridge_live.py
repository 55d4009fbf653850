"""What EventBridge hears beside the record: progress, nodes, the length of the queue. Told where there is room.

Must never delay lifecycle, and never grow: of the same thing only the latest is kept, and when the bus is slow or
away the rest is dropped. A frame comes neither before its `Job Started` nor after the end of its workflow.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
from msgspec import UNSET

from managers.clock import Clock
from managers.delivery.eventbridge_details import ENDS, LIVE, MOST_ENTRIES, Entry
from managers.errors import StoreUnavailable
from managers.events.types import (
    Event,
    LiveEvent,
    NodeEvent,
    NodeExecuted,
    NodeProgressed,
    QueueStatus,
    StoredEvent,
    WorkflowError,
    WorkflowProgress,
    WorkflowStarted,
)

MOST_WAITING = 1000
MOST_ENDED = 100
"""Workflows whose last frames are kept until their end is told."""
_FIRST_REST, _LONGEST_REST = 1.0, 30.0

_Key = tuple[str, str | None, str | None]
Told = Callable[[dict[str, Any]], Awaitable[Entry]]
Put = Callable[[Sequence[Entry]], Awaitable[bool]]


class LiveFeed:
    """Between the hub and the bus. `dropped` counts what was left out for want of room or of a bus."""

    def __init__(self, *, seconds: float, clock: Clock, told: Told, put: Put) -> None:
        """At most one frame in so many `seconds` of the same progress. `put` says whether the bus took them."""
        self.dropped = 0
        self._seconds = seconds
        self._clock = clock
        self._told = told
        self._put = put
        self._waiting: dict[_Key, Event] = {}
        self._put_at: dict[_Key, float] = {}
        self._unstarted: set[str] = set()  # of which the start is on record, and not told yet
        self._ended: dict[str, list[Event]] = {}
        self._news = asyncio.Event()

    # ---- from the hub, and from who tells lifecycle

    def hear(self, event: LiveEvent | StoredEvent) -> None:
        """The hub's listener."""
        kind = str(type(event).__struct_config__.tag)
        if isinstance(event, WorkflowStarted):
            self._unstarted.add(_of(event) or "")
        elif isinstance(event, WorkflowError) and event.will_retry:
            self._take(_of(event) or "")
        elif kind in ENDS and isinstance(event, Event):
            self._end(_of(event) or "")
        elif kind in LIVE and isinstance(event, Event):
            self._keep(kind, event)

    def started(self, workflow_id: str) -> None:
        """Its `Job Started` is told: its frames may follow."""
        self._unstarted.discard(workflow_id)
        self._news.set()

    async def last_words(self, workflow_id: str, room: int) -> list[Entry]:
        """What its nodes had to say before the end that is told now; the last `room` of it."""
        self._unstarted.discard(workflow_id)
        events = self._ended.pop(workflow_id, [])
        self.dropped += max(0, len(events) - room)
        return [await self._told(msgspec.to_builtins(event)) for event in events[-room:]] if room else []

    # ---- to the bus

    async def run(self) -> None:
        """Until cancelled."""
        rest = _FIRST_REST
        while True:
            events, wait = self._due()
            if events:
                if await self._send(events):
                    rest = _FIRST_REST
                else:
                    self.dropped += len(events)
                    await asyncio.sleep(rest)
                    rest = min(rest * 2, _LONGEST_REST)
                continue
            try:
                async with asyncio.timeout(wait):
                    await self._news.wait()
            except TimeoutError:
                pass
            self._news.clear()

    async def _send(self, events: Sequence[Event]) -> bool:
        try:
            return await self._put([await self._told(msgspec.to_builtins(event)) for event in events])
        except StoreUnavailable:  # nobody can tell whose they are
            return False

    def _due(self) -> tuple[list[Event], float | None]:
        """What may go now, taken out; when there is none, the seconds until there is (None: only news can tell)."""
        now = self._clock.monotonic()
        due: list[_Key] = []
        wait: float | None = None
        for key, event in self._waiting.items():
            if key[1] in self._unstarted:
                continue
            left = 0.0
            if isinstance(event, WorkflowProgress | NodeProgressed | QueueStatus):
                left = self._put_at.get(key, now - self._seconds) + self._seconds - now
            if left > 0:
                wait = left if wait is None else min(wait, left)
                continue
            due.append(key)
            if len(due) == MOST_ENTRIES:
                break
        for key in due:
            self._put_at[key] = now
        return [self._waiting.pop(key) for key in due], wait

    def _keep(self, kind: str, event: Event) -> None:
        workflow_id = _of(event)
        node_id = event.node_id if isinstance(event, NodeEvent) else None
        if isinstance(event, NodeExecuted):
            self._waiting.pop(("node:progress", workflow_id, node_id), None)
        key = (kind, workflow_id, node_id)
        if key not in self._waiting and len(self._waiting) >= MOST_WAITING:
            self._waiting.pop(next(iter(self._waiting)))
            self.dropped += 1
        self._waiting[key] = event
        self._news.set()

    def _end(self, workflow_id: str) -> None:
        """No more progress of it; what its nodes have done goes out with the end."""
        self._ended[workflow_id] = [
            event
            for event in self._take(workflow_id)
            if isinstance(event, NodeEvent) and not isinstance(event, NodeProgressed)
        ]
        if len(self._ended) > MOST_ENDED:
            self.dropped += len(self._ended.pop(next(iter(self._ended))))

    def _take(self, workflow_id: str) -> list[Event]:
        """Its frames, which wait no more."""
        for key in [key for key in self._put_at if key[1] == workflow_id]:
            del self._put_at[key]
        own = [key for key in self._waiting if key[1] == workflow_id]
        return [self._waiting.pop(key) for key in own]


def _of(event: Event) -> str | None:
    return None if event.workflow_id is UNSET else event.workflow_id
