"""All couriers, each a task of its own, and what people ask of deliveries: look, replay.

Must never know a protocol, nor who a destination is.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from msgspec import Raw, Struct

from managers.clock import Clock, IdMaker
from managers.delivery.courier import Courier
from managers.delivery.port import Destination
from managers.delivery.store import DeliveryStore, Filter, Record, State
from managers.events.log import EventLog
from managers.events.types import LiveEvent, StoredEvent

RESULTS = ("delivered", "failed", "dead")
_STEP = 200
"""Deliveries that a bulk replay moves in one transaction."""
_GATHER_SECONDS = 0.02
"""Events that are stored so shortly one after the other are read together: each reading takes time from others."""


class DeliveryView(Struct, frozen=True, kw_only=True, rename="camel"):
    """A delivery as clients see it. `nextAttemptAt` is null when it has ended, or waits for one before it."""

    id: str
    destination: str
    kind: str
    type: str
    workflow_id: str | None
    seq: int
    state: State
    attempts: int
    next_attempt_at: int | None
    last_error: str | None
    last_status: int | None
    created_at: int
    delivered_at: int | None


class DeliveryDetail(DeliveryView, frozen=True, kw_only=True, rename="camel"):
    """The same with the event that it carries."""

    body: Raw


class DeliveryPage(Struct, frozen=True, kw_only=True, rename="camel"):
    """A page of deliveries, newest first."""

    deliveries: tuple[DeliveryView, ...]
    next_cursor: str | None


class Deliveries:
    """The post office. Destinations may come and go while it runs."""

    def __init__(
        self,
        *,
        store: DeliveryStore,
        log: EventLog,
        clock: Clock,
        new_id: IdMaker,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._store = store
        self._log = log
        self._clock = clock
        self._new_id = new_id
        self._chance = chance
        self._couriers: dict[str, Courier] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._counts: Counter[tuple[str, str]] = Counter()  # of those that have gone
        self._gathering: asyncio.TimerHandle | None = None
        self._stopped = False

    # ---- destinations

    async def add(self, destination: Destination, *, start: int | None = None) -> None:
        """Bring it what it wants from now on. It goes on where it was; a new one begins behind the seq `start`, or
        with what is stored from now on. Raises `StoreUnavailable`.
        """
        courier = Courier(
            destination,
            store=self._store,
            log=self._log,
            clock=self._clock,
            new_id=self._new_id,
            chance=self._chance,
        )
        await courier.open(start)
        name = destination.name
        self._couriers[name] = courier
        if not self._stopped:
            self._tasks[name] = asyncio.create_task(courier.run(), name=f"courier {name}")

    async def remove(self, name: str, reason: str) -> None:
        """It gets nothing more, what is pending is dead; what it got stays in the delivery log."""
        courier = self._couriers.pop(name, None)
        if courier is not None:
            await _end(courier, self._tasks.pop(name, None), 0)
            for result, count in courier.counts.items():
                self._counts[courier.destination.kind, result] += count
        await self._store.detach(name, reason, self._clock.now_ms())

    def hear(self, event: LiveEvent | StoredEvent) -> None:
        """The hub's listener: something was committed."""
        if self._gathering is None and isinstance(event, StoredEvent):
            self._gathering = asyncio.get_running_loop().call_later(_GATHER_SECONDS, self._committed)

    def _committed(self) -> None:
        self._gathering = None
        for courier in self._couriers.values():
            courier.committed()

    async def mark(self, name: str) -> None:
        """What it wants is about to change: what it has looked at is settled. Raises `StoreUnavailable`."""
        await self._couriers[name].mark()

    def wake(self) -> None:
        """The clock or a delivery was changed: there may be something to do for everybody."""
        for courier in self._couriers.values():
            courier.wake()

    def heard(self) -> int | None:
        """The seq up to which nobody needs the log any more; None: there is nobody."""
        return min((courier.heard for courier in self._couriers.values()), default=None)

    def stop(self) -> None:
        """Begin no more tries."""
        self._stopped = True
        if self._gathering is not None:
            self._gathering.cancel()
        for courier in self._couriers.values():
            courier.stop()

    async def aclose(self, seconds: float = 2.0) -> None:
        """Let tries under way end, for so long."""
        self.stop()
        await asyncio.gather(
            *(_end(courier, self._tasks.get(name), seconds) for name, courier in self._couriers.items())
        )

    # ---- what is measured, from memory

    def counts(self) -> Mapping[tuple[str, str], int]:
        """Tries since the start, by kind and result; a kind that there is has all results."""
        counts = Counter(self._counts)
        for courier in self._couriers.values():
            for result in RESULTS:
                counts[courier.destination.kind, result] += courier.counts[result]
        return counts

    def ages(self) -> Mapping[str, float]:
        """How long the oldest that is pending waits, by kind, in seconds; 0: nothing does."""
        now, ages = self._clock.now_ms(), dict[str, float]()
        for courier in self._couriers.values():
            age = 0.0 if courier.oldest_at is None else max(0, now - courier.oldest_at) / 1000
            kind = courier.destination.kind
            ages[kind] = max(ages.get(kind, 0.0), age)
        return ages

    # ---- what people ask

    async def list(self, wanted: Filter) -> DeliveryPage:
        """Newest first. Raises `InvalidRequest` for a cursor that is none."""
        page = await self._store.list(wanted)
        return DeliveryPage(deliveries=tuple(map(view, page.records)), next_cursor=page.next_cursor)

    async def get(self, delivery_id: str) -> DeliveryDetail:
        """One with its event. Raises `NotFound`."""
        record, data = await self._store.get(delivery_id)
        return DeliveryDetail(**_fields(record), body=Raw(data))

    async def retry(self, delivery_id: str) -> DeliveryView:
        """Try it (again) now, with all its tries. Raises `NotFound`, and `Conflict` when its destination is gone."""
        record = await self._store.retry(delivery_id, self._couriers, self._clock.now_ms())
        self._couriers[record.destination].wake()
        return view(record)

    async def retry_dead(self, destination: str | None = None, workflow_id: str | None = None) -> int:
        """The same with all that are dead, and whose destination is there: how many there were."""
        names = [name for name in self._couriers if destination is None or name == destination]
        count = after = 0
        while numbers := await self._store.retry_dead(
            names, self._clock.now_ms(), after=after, limit=_STEP, workflow_id=workflow_id
        ):
            count, after = count + len(numbers), numbers[-1]
            self.wake()
        return count


async def _end(courier: Courier, task: asyncio.Task[None] | None, seconds: float) -> None:
    await courier.aclose(seconds)
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def view(record: Record) -> DeliveryView:
    """The record as clients see it."""
    return DeliveryView(**_fields(record))


def _fields(record: Record) -> dict[str, Any]:
    return {
        "id": record.id,
        "destination": record.destination,
        "kind": record.kind,
        "type": record.type,
        "workflow_id": record.workflow_id,
        "seq": record.seq,
        "state": record.state,
        "attempts": record.attempts,
        "next_attempt_at": record.next_at,
        "last_error": record.last_error,
        "last_status": record.last_status,
        "created_at": record.created_at,
        "delivered_at": record.ended_at if record.state is State.DELIVERED else None,
    }
