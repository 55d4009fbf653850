"""Brings one destination what the log has for it: reads behind its cursor, makes deliveries of what it wants, tries
them until they have ended.

One task owns it. It sleeps until something was committed, a try has ended, or one is due; it asks nobody again and
again. Must never hold up anybody else: a destination that hangs holds up only its own courier, a workflow whose
delivery fails only its own deliveries. What was delivered and not recorded (we died between the two) is delivered
again under the same id.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

import structlog

from managers.clock import Clock, IdMaker
from managers.delivery.port import Again, Chooser, Delivered, Delivery, Destination, Outcome, Refused
from managers.delivery.store import DeliveryStore, Outlook, Result, State
from managers.errors import StoreUnavailable
from managers.events.log import EventLog, StoredFrame

log = structlog.get_logger(__name__)

CHUNK = 500
"""Events that are looked at in one step."""
JITTER = 0.1
"""A wait is up to so much of it longer or shorter, so that what failed together does not come back together."""
_LAZY_EVENTS = 1000
"""Events without anything wanted, after which the cursor is written down all the same."""
_TROUBLE_SECONDS = 1.0
_MAX_SLEEP_SECONDS = 600.0  # the wall clock, which names the time of the next try, may be set
_MAX_ERROR = 500


class Courier:
    """`run` it once, as a task. `counts` are of this process, by result: delivered, failed (not for good), dead."""

    def __init__(
        self,
        destination: Destination,
        *,
        store: DeliveryStore,
        log: EventLog,
        clock: Clock,
        new_id: IdMaker,
        chance: Callable[[], float],
        pause: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        """`chance` gives numbers from 0 to 1."""
        self.destination = destination
        self.counts: Counter[str] = Counter()
        self._store = store
        self._log = log
        self._clock = clock
        self._new_id = new_id
        self._chance = chance
        self._pause = pause
        self._cursor = 0
        self._written = 0
        self._outlook = Outlook(None, None, None)
        self._wake = asyncio.Event()
        self._reading = asyncio.Lock()
        self._look = True  # whether deliveries may be due, and not only events to be read
        self._calls: dict[asyncio.Task[None], Sequence[Delivery]] = {}
        self._stopping = False

    async def open(self, start: int | None = None) -> None:
        """Find the place in the log. Raises `StoreUnavailable`."""
        name, kind = self.destination.name, self.destination.kind
        self._cursor = self._written = await self._store.attach(name, kind, start)
        self._outlook = await self._store.outlook(name, self._clock.now_ms())

    @property
    def heard(self) -> int:
        """The seq up to which the log is needed no more: all behind it was delivered, is dead, or is not wanted."""
        oldest = self._outlook.oldest_seq
        return self._cursor if oldest is None else min(self._cursor, oldest - 1)

    @property
    def oldest_at(self) -> int | None:
        """Since when the oldest that is pending waits (epoch ms); from memory."""
        return self._outlook.oldest_at

    def committed(self) -> None:
        """There are events to read."""
        self._wake.set()

    def wake(self) -> None:
        """There may be something to do: a delivery was changed, or the clock."""
        self._look = True
        self._wake.set()

    async def mark(self) -> None:
        """Read to the end, and write down how far that is: what it does not want now will never be looked at again.

        Raises `StoreUnavailable`.
        """
        await self._fan_out()
        if self._look:
            self.wake()
        cursor = self._cursor
        if cursor > self._written:
            await self._store.fan_out(self.destination.name, cursor, (), self.destination.kind)
            self._written = max(self._written, cursor)

    async def run(self) -> None:
        """Work until cancelled or stopped. What goes wrong is told, and tried again."""
        while not self._stopping:
            try:
                await self._work()
            except StoreUnavailable as error:
                log.warning("cannot deliver, trying again", destination=self.destination.name, reason=str(error))
            except Exception:
                log.exception("delivering failed, trying again", destination=self.destination.name)
            if not self._stopping:
                await self._pause(_TROUBLE_SECONDS)

    def stop(self) -> None:
        """Begin no more tries."""
        self._stopping = True
        self._wake.set()

    async def aclose(self, seconds: float = 2.0) -> None:
        """Let tries under way end and be recorded, for so long; those cut off are made again after the next start."""
        self.stop()
        if self._calls:
            await asyncio.wait(self._calls, timeout=seconds)
        calls = list(self._calls)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        try:
            await self.mark()
        except StoreUnavailable as error:  # it is read again, that is all
            log.info("a place in the log is not written down", destination=self.destination.name, reason=str(error))

    # ---- the loop

    async def _work(self) -> None:
        while not self._stopping:
            self._wake.clear()
            await self._fan_out()
            if self._look:
                self._look = False
                await self._begin()
            try:
                async with asyncio.timeout(self._sleep()):
                    await self._wake.wait()
            except TimeoutError:
                self._look = True

    def _sleep(self) -> float | None:
        """Seconds until the next is due; what is due already is under way, or waits for an end of what is."""
        next_at = self._outlook.next_at
        if next_at is None:
            return None
        return min(max((next_at - self._clock.now_ms()) / 1000, 0.001), _MAX_SLEEP_SECONDS)

    async def _fan_out(self) -> None:
        """Turn what was stored since into deliveries."""
        async with self._reading:
            await self._read()

    async def _read(self) -> None:
        destination = self.destination
        while self._cursor < self._log.last_seq and not self._stopping:
            frames = await self._log.events_after(self._cursor, CHUNK)
            if not frames:
                return
            wanted: Sequence[StoredFrame] = [frame for frame in frames if destination.wants(frame)]
            if wanted and isinstance(destination, Chooser):
                wanted = await destination.choose(wanted)
            cursor, now = frames[-1].seq, self._clock.now_ms()
            if wanted or cursor - self._written >= _LAZY_EVENTS:
                made = [
                    Delivery(id=self._new_id(), destination=destination.name, event=frame, created_at=now)
                    for frame in wanted
                ]
                await self._store.fan_out(destination.name, cursor, made, destination.kind)
                self._written = cursor
            self._look = self._look or bool(wanted)
            if wanted and self._outlook.oldest_seq is None:
                self._outlook = Outlook(None, wanted[0].seq, now)
            self._cursor = cursor

    async def _begin(self) -> None:
        """Begin what is due, and look when there will be more. What fails here is tried again as a whole."""
        now = self._clock.now_ms()
        try:
            await self._call(now)
            self._outlook = await self._store.outlook(self.destination.name, now)
        except BaseException:
            self._look = True
            raise

    async def _call(self, now: int) -> None:
        """Begin what is due, as far as there is room."""
        destination, busy = self.destination, self._busy()
        room = destination.parallel - len(self._calls)
        if room <= 0 or self._stopping:
            return
        limit = room * destination.batch + len(busy)
        due = await self._store.due(destination.name, now, limit)
        free = [one for one in due if one.event.workflow_id not in busy][: room * destination.batch]
        for start in range(0, len(free), destination.batch):
            batch = free[start : start + destination.batch]
            call = asyncio.create_task(self._try(batch), name=f"delivery to {destination.name}")
            self._calls[call] = batch
            call.add_done_callback(self._ended)

    def _busy(self) -> set[str | None]:
        """The workflows of which something is under way."""
        return {one.event.workflow_id for batch in self._calls.values() for one in batch}

    def _ended(self, call: asyncio.Task[None]) -> None:
        del self._calls[call]
        self.wake()

    # ---- one call

    async def _try(self, batch: Sequence[Delivery]) -> None:
        destination = self.destination
        outcomes: Sequence[Outcome]
        try:
            outcomes = await destination.deliver(batch)
            if len(outcomes) != len(batch):
                raise ValueError(f"{len(outcomes)} outcomes of {len(batch)} deliveries")
        except Exception as error:
            log.exception("a destination failed", destination=destination.name)
            outcomes = [Again(f"{destination.kind} failed: {type(error).__name__}")] * len(batch)
        now = self._clock.now_ms()
        results = [self._judge(one, outcome, now) for one, outcome in zip(batch, outcomes, strict=True)]
        try:
            await self._store.record(results, now)
        except StoreUnavailable as error:
            log.warning("a delivery cannot be recorded", destination=destination.name, reason=str(error))
            await self._pause(_TROUBLE_SECONDS)
            return
        for result in results:
            self.counts["failed" if result.state is State.PENDING else result.state.value] += 1
            if result.state is State.DEAD:
                log.warning("a delivery is dead", destination=destination.name, id=result.id, reason=result.error)

    def _judge(self, delivery: Delivery, outcome: Outcome, now: int) -> Result:
        attempts = delivery.attempts + 1
        state, at, error = State.PENDING, now, None
        match outcome:
            case Delivered():
                state = State.DELIVERED
            case Refused(reason):
                state, error = State.DEAD, reason
            case Again(reason, after):
                error = reason
                if attempts > len(self.destination.schedule):
                    state = State.DEAD
                else:
                    seconds = self.destination.schedule[attempts - 1]
                    seconds *= 1 + JITTER * (2 * self._chance() - 1)
                    at = now + round((seconds if after is None else max(0.0, after)) * 1000)
        return Result(
            id=delivery.id,
            state=state,
            attempts=attempts,
            at=at,
            error=None if error is None else error[:_MAX_ERROR],
            status=outcome.status,
        )
