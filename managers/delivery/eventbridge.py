"""EventBridge as a destination: lifecycle from the durable log, in order; progress beside it, where there is room.

It also says when the service begins and stops to tell. Must never let a frame of progress decide about lifecycle:
only the outcomes of stored events are given back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

import msgspec
import structlog
from msgspec import Struct

from managers.clock import Clock
from managers.delivery.eventbridge_bus import Bus, BusConfig
from managers.delivery.eventbridge_details import (
    ENDS,
    INITIALIZED,
    MOST_ENTRIES,
    STOPPED,
    Entry,
    Naming,
    Whose,
    entry_of,
    is_told,
    own_entry,
)
from managers.delivery.eventbridge_live import LiveFeed
from managers.delivery.port import Again, Delivered, Delivery, Outcome
from managers.errors import NotFound, StoreUnavailable
from managers.events.hub import Hub
from managers.events.log import StoredFrame
from managers.workflows.model import Attempt, AttemptState

log = structlog.get_logger(__name__)

SCHEDULE = (*(2.0**n for n in range(12)), *[3600.0] * 70)
"""Seconds: from 1 s doubling to an hour, then each hour: three days."""
_LAST_WORDS = 40
"""Of what nodes had to say before the ends that are told in one go, the most that goes along: four more calls."""
_REMEMBERED = 1000
_FIRST_REST, _LONGEST_REST = 1.0, 60.0
_GOODBYE_SECONDS = 2.0


class EventBridgeConfig(Struct, frozen=True, kw_only=True):
    """Where to, in which words, and how often the same progress is told at most (seconds)."""

    bus: BusConfig
    naming: Naming = "camel"
    progress_seconds: float = 1.0


class Teller(Struct, frozen=True, kw_only=True, rename="camel"):
    """A ComfyUI that is told of, as consumers see it. A back end that submits to it under `client_id` gets all."""

    name: str
    client_id: str


class Records(Protocol):
    """What of the store is looked up (`WorkflowStore`)."""

    async def attempts(self, workflow_id: str) -> Sequence[Attempt]:
        """All of them, oldest first."""
        ...

    async def graph(self, workflow_id: str) -> tuple[bytes, bytes | None]:
        """The graph and extra_data as JSON text. Raises `NotFound`."""
        ...


Dress = Callable[[Sequence[StoredFrame]], Awaitable[Sequence[StoredFrame]]]
"""Stored events as they are told now: with links that are good at this moment. May raise `StoreUnavailable`."""


class EventBridge:
    """A `Destination`, and a task beside it (`run`). Raises `MissingExtra` when its library is not there."""

    name = "eventbridge"
    kind = "eventbridge"
    schedule: Sequence[float] = SCHEDULE
    batch = MOST_ENTRIES
    parallel = 4

    def __init__(
        self,
        config: EventBridgeConfig,
        *,
        records: Records,
        hub: Hub,
        clock: Clock,
        backends: Sequence[Teller],
        version: str,
        dress: Dress | None = None,
    ) -> None:
        self._config = config
        self._records = records
        self._clock = clock
        self._backends = backends
        self._clients = {backend.name: backend.client_id for backend in backends}
        self._version = version
        self._dress = dress
        self._bus = Bus(config.bus)
        self._queue_ids: dict[str, str | None] = {}
        self._introducing = asyncio.Lock()
        self._introduced = False
        self._live = LiveFeed(seconds=config.progress_seconds, clock=clock, told=self._entry, put=self._put_live)
        self._deaf = hub.listen(self._live.hear)

    @property
    def dropped(self) -> int:
        """How many frames of progress were left out."""
        return self._live.dropped

    # ---- the destination

    def wants(self, event: StoredFrame) -> bool:
        """See the port."""
        return is_told(event)

    async def deliver(self, deliveries: Sequence[Delivery]) -> Sequence[Outcome]:
        """See the port. What nodes had to say goes before the end of their workflow."""
        await self._introduce()
        try:
            entries, places = await self._entries(deliveries)
        except StoreUnavailable as error:
            return [Again(str(error))] * len(deliveries)
        outcomes = await self._bus.put(entries)
        told = [outcomes[place] for place in places]
        for delivery, outcome in zip(deliveries, told, strict=True):
            if delivery.event.type == "workflow:started" and isinstance(outcome, Delivered):
                self._live.started(delivery.event.workflow_id or "")
        return told

    async def _entries(self, deliveries: Sequence[Delivery]) -> tuple[list[Entry], list[int]]:
        """Theirs and what goes with them, and at which places theirs are."""
        entries: list[Entry] = []
        places: list[int] = []
        room = _LAST_WORDS
        events: Sequence[StoredFrame] = [delivery.event for delivery in deliveries]
        if self._dress is not None:
            events = await self._dress(events)
        for event in events:
            if event.type in ENDS and event.workflow_id is not None:
                words = await self._live.last_words(event.workflow_id, room)
                room -= len(words)
                entries += words
            places.append(len(entries))
            entries.append(await self._entry(msgspec.json.decode(event.data)))
        return entries, places

    # ---- beside it

    async def run(self) -> None:
        """Say that it begins, then tell what is live; until cancelled."""
        rest = _FIRST_REST
        while not await self._introduce():
            await asyncio.sleep(rest)
            rest = min(rest * 2, _LONGEST_REST)
        await self._live.run()

    async def aclose(self) -> None:
        """Say that it ends, as far as there is time, and let go. The courier has stopped before."""
        self._deaf()
        if self._introduced:
            try:
                async with asyncio.timeout(_GOODBYE_SECONDS):
                    await self._bus.put([self._own(STOPPED)])
            except TimeoutError:
                log.info("EventBridge was not told that we stop")
        await self._bus.aclose()

    async def _introduce(self) -> bool:
        """Once. Who had to wait for another's try does not try again."""
        waits = self._introducing.locked()
        async with self._introducing:
            if not self._introduced and not waits:
                (outcome,) = await self._bus.put([self._own(INITIALIZED)])
                self._introduced = isinstance(outcome, Delivered)
                if not isinstance(outcome, Delivered):
                    log.warning("EventBridge does not take events yet", reason=outcome.reason)
        return self._introduced

    def _own(self, detail_type: str) -> Entry:
        fields = {"version": self._version, "backends": msgspec.to_builtins(self._backends)}
        client_id = next(iter(self._clients.values()), None)
        now, naming = self._clock.now_ms(), self._config.naming
        return own_entry(detail_type, fields, client_id=client_id, now=now, naming=naming)

    async def _put_live(self, entries: Sequence[Entry]) -> bool:
        return any(isinstance(outcome, Delivered) for outcome in await self._bus.put(entries))

    # ---- whom it is about

    async def _entry(self, event: Mapping[str, Any]) -> Entry:
        return entry_of(event, await self._whose(event), self._config.naming)

    async def _whose(self, event: Mapping[str, Any]) -> Whose:
        """The prompt that was in hand then: its attempt is on disk before anything can be heard of it."""
        workflow_id = event.get("workflowId")
        if workflow_id is None:
            return Whose(client_id=next(iter(self._clients.values()), None))
        made = [
            attempt
            for attempt in await self._records.attempts(workflow_id)
            if attempt.state is not AttemptState.WITHDRAWN
        ]
        queue_id = await self._queue_id(workflow_id)
        if not made:
            return Whose(queue_id=queue_id)
        then = [attempt for attempt in made if attempt.created_at <= event["timestamp"]]
        attempt = (then or made[:1])[-1]  # a clock may have been set back
        return Whose(prompt_id=attempt.prompt_id, client_id=self._clients.get(attempt.backend), queue_id=queue_id)

    async def _queue_id(self, workflow_id: str) -> str | None:
        """`extra_data.queue_id`; nothing else of extra_data ever leaves the house (CONTRACT 4)."""
        if workflow_id not in self._queue_ids:
            try:
                _, extra_data = await self._records.graph(workflow_id)
            except NotFound:
                return None
            if len(self._queue_ids) >= _REMEMBERED:
                del self._queue_ids[next(iter(self._queue_ids))]
            self._queue_ids[workflow_id] = queue_id_of(extra_data)
        return self._queue_ids[workflow_id]


def queue_id_of(extra_data: bytes | None) -> str | None:
    """A text or a whole number; anything else is no id."""
    found = msgspec.json.decode(extra_data) if extra_data else None
    value = found.get("queue_id") if isinstance(found, dict) else None
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) and value != "" else None
