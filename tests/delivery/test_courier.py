"""Couriers over the real store, with destinations that do as the test says, and a clock that it owns."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest

from managers.delivery.office import Deliveries
from managers.delivery.port import Again, Delivered, Delivery, Outcome, Refused
from managers.delivery.sqlite_deliveries import SqliteDeliveries
from managers.delivery.store import Filter, Record, State
from managers.errors import Conflict, InvalidRequest, NotFound
from managers.events.log import StoredFrame
from managers.events.types import BackendConnected, StoredEvent
from managers.workflows.retention import DAY_MS, Retention, RetentionConfig
from managers.workflows.sqlite_store import SqliteStore
from tests.delivery.receiver import PATIENCE
from tests.store_kit import Kit, ManualClock, numbered_ids

SCHEDULE = (5.0, 300.0, 86400.0)


class Sink:
    """A destination; `answer` says what becomes of each delivery, and may wait."""

    def __init__(self, name: str, *, batch: int = 1, parallel: int = 4, schedule: Sequence[float] = SCHEDULE) -> None:
        self.name = name
        self.kind = name.partition(":")[0]
        self.schedule = schedule
        self.batch = batch
        self.parallel = parallel
        self.tried: list[Delivery] = []
        self.batches: list[int] = []
        self.open = asyncio.Event()
        self.open.set()
        self.answer: Callable[[Delivery], Outcome] = lambda _: Delivered()
        self._changed = asyncio.Condition()

    def wants(self, event: StoredFrame) -> bool:
        return event.type.startswith("workflow:")

    async def deliver(self, deliveries: Sequence[Delivery]) -> Sequence[Outcome]:
        async with self._changed:
            self.tried += deliveries
            self.batches.append(len(deliveries))
            self._changed.notify_all()
        await self.open.wait()
        return [self.answer(one) for one in deliveries]

    async def until(self, count: int) -> list[Delivery]:
        """What was tried, when it is so much."""
        async with asyncio.timeout(PATIENCE), self._changed:
            await self._changed.wait_for(lambda: len(self.tried) >= count)
        return self.tried

    def seqs(self, workflow_id: str | None = None) -> list[int]:
        return [one.event.seq for one in self.tried if workflow_id in (None, one.event.workflow_id)]


class Office:
    """A store with its couriers; `jump` is time that passes, `chance` what the dice say."""

    def __init__(self, folder: Path) -> None:
        self.chance = 0.5
        self.kit = Kit(lambda clock, ids, aging: SqliteStore(folder, clock=clock, ids=ids, aging_seconds=aging))
        self._ids = numbered_ids()

    @property
    def clock(self) -> ManualClock:
        return self.kit.clock

    async def start(self, *sinks: Sink) -> None:
        def hear(pairs: Sequence[tuple[StoredEvent, StoredFrame]]) -> None:
            for event, _ in pairs:
                self.deliveries.hear(event)

        await self.kit.store.open(hear)
        store = self.kit.store
        assert isinstance(store, SqliteStore)
        self.store = SqliteDeliveries(store)
        self.deliveries = Deliveries(
            store=self.store,
            log=store,
            clock=self.clock,
            new_id=lambda: "d" + self._ids()[1:],
            chance=lambda: self.chance,
        )
        for sink in sinks:
            await self.deliveries.add(sink)

    async def stop(self) -> None:
        await self.deliveries.aclose(0)
        await self.kit.store.close()

    async def restart(self, *sinks: Sink) -> None:
        await self.stop()
        self.kit.store = self.kit._make(self.clock, self.kit.ids, 600)
        await self.start(*sinks)

    async def submit(self, count: int = 1) -> list[str]:
        """So many workflows, an event each."""
        return [(await self.kit.submit()).id for _ in range(count)]

    async def run(self) -> str:
        """One with three events: queued, started, completed."""
        workflow, prompt = await self.kit.running()
        await self.kit.store.finish(prompt, self.kit.outcome())
        return workflow.id

    def jump(self, seconds: float) -> None:
        self.clock.now += round(seconds * 1000)
        self.deliveries.wake()

    async def records(self, **wanted: str) -> list[Record]:
        """Oldest first."""
        page = await self.store.list(Filter(limit=1000, **wanted))  # type: ignore[arg-type]
        return list(reversed(page.records))

    async def until(self, right: Callable[[list[Record]], bool]) -> list[Record]:
        """The log, when it is right: nobody tells of its changes."""
        found: list[Record] = []
        for _ in range(PATIENCE * 100):
            found = await self.records()
            if right(found):
                return found
            await asyncio.sleep(0.01)
        raise AssertionError(f"the log stayed {found}")

    async def ended(self, count: int) -> list[Record]:
        return await self.until(lambda log: len(log) >= count and all(one.state is not State.PENDING for one in log))

    async def idle(self) -> None:
        """Everybody has looked at everything as it is now: of two rounds the second began after this."""
        async with asyncio.timeout(PATIENCE):
            for courier in self.deliveries._couriers.values():
                for _ in range(2):
                    seen = courier._outlook
                    courier.wake()
                    while courier._outlook is seen:  # noqa: ASYNC110 - nobody tells
                        await asyncio.sleep(0.001)


@pytest.fixture
async def office(tmp_path: Path) -> AsyncIterator[Office]:
    found = Office(tmp_path / "data")
    try:
        yield found
    finally:
        with contextlib.suppress(AttributeError):
            await found.stop()


async def test_each_hears_what_it_wants_once_and_in_order(office: Office) -> None:
    one, other = Sink("a"), Sink("b")
    await office.start(one, other)
    workflows = [await office.run() for _ in range(5)]
    await office.kit.store.append(BackendConnected(timestamp=1, backend="x"))
    await office.ended(30)
    for sink in (one, other):
        for workflow_id in workflows:
            kinds = [item.event.type for item in sink.tried if item.event.workflow_id == workflow_id]
            assert kinds == ["workflow:queued", "workflow:started", "workflow:completed"]
        assert len(sink.tried) == 15
    assert {item.id for item in one.tried}.isdisjoint(item.id for item in other.tried)


async def test_a_new_one_begins_at_the_end_of_the_log_or_where_it_is_told(office: Office) -> None:
    late, all_of_it = Sink("late"), Sink("all")
    await office.start()
    await office.submit(3)
    await office.deliveries.add(late)
    await office.deliveries.add(all_of_it, start=0)
    await office.submit()
    await all_of_it.until(4)
    assert all_of_it.seqs() == [1, 2, 3, 4]
    assert (await late.until(1))[0].event.seq == 4
    await office.ended(5)
    assert late.seqs() == [4]


async def test_the_cursor_and_what_is_pending_survive_a_restart(office: Office) -> None:
    before = Sink("a", parallel=2)
    before.open.clear()
    await office.start(before)
    await office.submit(5)
    await before.until(2)  # two are on their way, nobody knows whether they arrived
    await office.stop()
    office.kit.store = office.kit._make(office.clock, office.kit.ids, 600)
    await office.kit.open()
    await office.submit(2)  # while nobody listens
    await office.kit.store.close()
    office.kit.store = office.kit._make(office.clock, office.kit.ids, 600)
    after = Sink("a")
    await office.start(after)
    log = await office.ended(7)
    assert sorted(after.seqs()) == list(range(1, 8))
    again = {one.event.seq: one.id for one in before.tried}
    assert len(again) == 2
    assert again.items() <= {one.event.seq: one.id for one in after.tried}.items(), "at least once, by the same id"
    assert [one.attempts for one in log] == [1] * 7, "what was not recorded was no attempt"


async def test_a_failure_holds_back_its_own_workflow_only(office: Office) -> None:
    sink = Sink("a")
    await office.start(sink)
    bad, good = await office.submit(2)
    await office.ended(2)
    sink.answer = lambda one: Again("not now") if one.event.workflow_id == bad else Delivered()
    for workflow_id in (bad, good):
        claimed = await office.kit.claim()
        assert claimed.workflow.id == workflow_id
        await office.kit.store.start(claimed.attempt.prompt_id, office.clock.now)
        await office.kit.store.finish(claimed.attempt.prompt_id, office.kit.outcome())
    log = await office.until(lambda log: sum(one.state is State.PENDING for one in log) == 2 and len(log) == 6 and
                             any(one.attempts for one in log if one.state is State.PENDING))  # fmt: skip
    assert [one.state for one in log if one.workflow_id == good] == [State.DELIVERED] * 3
    waits = [one for one in log if one.state is State.PENDING]
    assert [(one.workflow_id, one.attempts, one.next_at is None) for one in waits] == [
        (bad, 1, False),
        (bad, 0, True),
    ]
    sink.answer = lambda _: Delivered()
    office.jump(6)
    await office.ended(6)
    assert sink.seqs(bad) == [1, 3, 3, 4], "its end is not told before its start"


async def test_the_schedule_with_its_jitter_and_then_dead(office: Office) -> None:
    sink = Sink("a")
    sink.answer = lambda _: Again("no", status=500)
    office.chance = 0.0
    await office.start(sink)
    await office.submit()
    chances = (0.0, 0.5, 1.0)
    for n, (seconds, chance) in enumerate(zip(SCHEDULE, chances, strict=True), 1):
        (waiting,) = await office.until(lambda log, n=n: bool(log) and log[0].attempts == n)  # type: ignore[misc]
        assert (waiting.state, waiting.last_error, waiting.last_status) == (State.PENDING, "no", 500)
        wait = round(seconds * (0.9 + 0.2 * chance) * 1000)
        assert waiting.next_at == office.clock.now + wait
        office.chance = (*chances, 0.5)[n]
        office.jump((wait - 1) / 1000)
        await office.idle()
        assert len(sink.tried) == n, "not a millisecond too early"
        office.jump(0.001)
        await sink.until(n + 1)
    (dead,) = await office.ended(1)
    assert (dead.state, dead.attempts, dead.next_at, dead.ended_at) == (State.DEAD, 4, None, office.clock.now)
    assert office.deliveries.counts()["a", "dead"] == 1
    assert office.deliveries.counts()["a", "failed"] == 3
    office.jump(10**6)
    await office.idle()
    assert len(sink.tried) == 4


async def test_again_may_say_when(office: Office) -> None:
    sink = Sink("a")
    sink.answer = lambda _: Again("busy", after=77.0)
    await office.start(sink)
    await office.submit()
    (waiting,) = await office.until(lambda log: bool(log) and log[0].attempts == 1)
    assert waiting.next_at == office.clock.now + 77_000


async def test_refused_is_dead_at_once_and_the_next_goes_on(office: Office) -> None:
    sink = Sink("a")
    sink.answer = lambda one: Refused("never", 410) if one.event.type == "workflow:queued" else Delivered()
    await office.start(sink)
    await office.run()
    log = await office.ended(3)
    assert [one.state for one in log] == [State.DEAD, State.DELIVERED, State.DELIVERED]
    assert (log[0].last_error, log[0].last_status, log[0].attempts) == ("never", 410, 1)


async def test_one_that_hangs_holds_up_nobody_else(office: Office) -> None:
    stuck, well = Sink("stuck"), Sink("well")
    stuck.open.clear()
    await office.start(stuck, well)
    await office.submit(10)
    await well.until(10)
    await office.until(lambda log: sum(one.state is State.DELIVERED for one in log) == 10)
    assert len(stuck.tried) == stuck.parallel
    assert office.deliveries.heard() == 0, "what it has not heard is kept"
    office.clock.now += 3_600_000
    assert office.deliveries.ages()["stuck"] == pytest.approx(3600, abs=1)
    stuck.open.set()
    await office.ended(20)
    await office.idle()
    assert office.deliveries.heard() == 10
    assert office.deliveries.ages() == {"stuck": 0.0, "well": 0.0}


async def test_batches_are_of_different_workflows(office: Office) -> None:
    sink = Sink("a", batch=10, parallel=1)
    sink.open.clear()
    await office.start(sink)
    for _ in range(6):
        await office.kit.running()  # two events each
    await sink.until(1)
    await office.until(lambda log: len(log) == 12)
    sink.open.set()
    await office.ended(12)
    assert max(sink.batches) > 1
    for batch_start, size in zip(_starts(sink.batches), sink.batches, strict=True):
        names = [one.event.workflow_id for one in sink.tried[batch_start : batch_start + size]]
        assert len(set(names)) == size
    for name in {one.event.workflow_id for one in sink.tried}:
        assert sink.seqs(name) == sorted(sink.seqs(name))


def _starts(sizes: list[int]) -> list[int]:
    return [sum(sizes[:n]) for n in range(len(sizes))]


async def test_a_destination_that_breaks_is_tried_again(office: Office) -> None:
    sink = Sink("a")

    def broken(_: Delivery) -> Outcome:
        raise KeyError("oops")

    sink.answer = broken
    await office.start(sink)
    await office.submit()
    (waiting,) = await office.until(lambda log: bool(log) and log[0].attempts == 1)
    assert (waiting.state, waiting.last_error) == (State.PENDING, "a failed: KeyError")


# ---- replay


async def test_replay_of_one_and_of_all(office: Office) -> None:
    sink, other = Sink("a", schedule=()), Sink("b", schedule=())
    sink.answer = other.answer = lambda _: Again("down")
    await office.start(sink, other)
    await office.submit(3)
    dead = [one for one in await office.ended(6) if one.destination == "a"]
    assert all(one.state is State.DEAD for one in dead)
    sink.answer = other.answer = lambda _: Delivered()
    again = await office.deliveries.retry(dead[0].id)
    assert (again.state, again.attempts, again.next_attempt_at) == (State.PENDING, 0, office.clock.now)
    await office.until(lambda log: [one.id for one in log if one.state is State.DELIVERED] == [dead[0].id])
    assert sink.tried[-1].id == dead[0].id
    assert await office.deliveries.retry_dead("a") == 2
    await office.ended(6)
    log = await office.records()
    assert [one.state for one in log if one.destination == "a"] == [State.DELIVERED] * 3
    assert [one.state for one in log if one.destination == "b"] == [State.DEAD] * 3
    workflow = dead[0].workflow_id
    assert await office.deliveries.retry_dead(None, workflow) == 1
    assert await office.deliveries.retry_dead() == 2
    assert await office.deliveries.retry_dead() == 0
    await office.ended(6)
    assert (await office.deliveries.retry(dead[0].id)).state is State.PENDING, "what arrived can be sent again too"
    with pytest.raises(NotFound):
        await office.deliveries.retry("no such")


async def test_a_bulk_replay_ends_where_everything_dies_again(office: Office) -> None:
    sink = Sink("a", schedule=(), parallel=64)
    sink.answer = lambda _: Refused("no")
    await office.start(sink)
    await office.submit(450)
    await office.ended(450)
    assert await office.deliveries.retry_dead() == 450


async def test_what_is_replayed_goes_before_later_events_of_its_workflow(office: Office) -> None:
    sink = Sink("a", schedule=(60.0,))
    sink.answer = lambda one: Refused("no") if one.event.type == "workflow:queued" else Again("later")
    await office.start(sink)
    workflow, prompt = await office.kit.running()
    log = await office.until(lambda log: len(log) == 2 and log[1].attempts == 1)
    assert log[1].next_at is not None
    sink.open.clear()
    sink.answer = lambda _: Again("later")
    await office.deliveries.retry(log[0].id)
    await sink.until(3)
    office.jump(30)
    await office.idle()
    assert len(sink.tried) == 3, "the later one waits"
    sink.open.set()
    log = await office.until(lambda log: log[0].attempts == 1)
    assert [one.next_at is None for one in log] == [False, True]
    sink.answer = lambda _: Delivered()
    office.jump(70)  # both have had their time
    await office.ended(2)
    assert sink.seqs(workflow.id) == [1, 2, 1, 1, 2]
    assert prompt


async def test_what_is_pending_can_be_hurried(office: Office) -> None:
    sink = Sink("a")
    sink.answer = lambda _: Again("no")
    await office.start(sink)
    await office.submit()
    (waiting,) = await office.until(lambda log: bool(log) and log[0].attempts == 1)
    sink.answer = lambda _: Delivered()
    assert (await office.deliveries.retry(waiting.id)).attempts == 1
    (done,) = await office.ended(1)
    assert done.attempts == 2


async def test_removed_ones_are_told_no_more(office: Office) -> None:
    sink = Sink("a")
    sink.answer = lambda _: Again("no")
    await office.start(sink)
    await office.submit()
    await office.until(lambda log: bool(log) and log[0].attempts == 1)
    await office.deliveries.remove("a", "gone")
    await office.submit()
    (dead,) = await office.records()
    assert (dead.state, dead.last_error) == (State.DEAD, "gone")
    assert office.deliveries.heard() is None
    assert office.deliveries.counts()["a", "failed"] == 1
    with pytest.raises(Conflict, match="no destination a"):
        await office.deliveries.retry(dead.id)
    assert await office.deliveries.retry_dead() == 0


# ---- lists and forgetting


async def test_pages_and_filters(office: Office) -> None:
    one, other = Sink("a"), Sink("b", schedule=())
    other.answer = lambda _: Again("no")
    await office.start(one, other)
    workflows = await office.submit(5)
    await office.ended(10)
    first = await office.deliveries.list(Filter(destination="a", limit=2))
    assert [item.workflow_id for item in first.deliveries] == workflows[:2:-1]
    await office.submit()
    second = await office.deliveries.list(Filter(destination="a", limit=3, cursor=first.next_cursor))
    assert [item.workflow_id for item in second.deliveries] == workflows[2::-1]
    assert second.next_cursor is None
    assert {item.destination for item in (await office.deliveries.list(Filter(state=State.DEAD))).deliveries} == {"b"}
    of_one = await office.deliveries.list(Filter(workflow_id=workflows[0]))
    assert sorted(item.destination for item in of_one.deliveries) == ["a", "b"]
    with pytest.raises(InvalidRequest):
        await office.deliveries.list(Filter(cursor="x"))
    found = await office.deliveries.get(first.deliveries[0].id)
    assert found.type == "workflow:queued"
    assert bytes(found.body).startswith(b'{"type":"workflow:queued"')


async def pass_at_once(_: float) -> None:
    await asyncio.sleep(0)


async def test_the_log_of_deliveries_is_kept_for_days_and_dead_ones_as_long_as_their_events(office: Office) -> None:
    sink = Sink("a", schedule=())
    await office.start(sink)
    await office.submit(30)
    await office.ended(30)
    sink.answer = lambda _: Again("no")
    await office.submit(2)
    await office.ended(32)
    forgetting = Retention(RetentionConfig(days=7, step_rows=4), office.store, office.clock, pause=pass_at_once)
    office.clock.now += 7 * DAY_MS - 1000
    assert await forgetting.sweep()
    assert len(await office.records()) == 32
    office.clock.now += 2000
    assert await forgetting.sweep()
    assert [one.state for one in await office.records()] == [State.DEAD] * 2
    store = office.kit.store
    assert isinstance(store, SqliteStore)
    office.clock.now += 30 * DAY_MS
    await office.submit(2)  # the newest event always stays
    while await store.prune(office.clock.now - 30 * DAY_MS, limit=100, heard=office.deliveries.heard()):
        pass
    await office.until(lambda log: len(log) == 4 and log[-1].state is State.DEAD)
    assert await forgetting.sweep()
    assert [one.seq for one in await office.records()] == [33, 34]


async def test_events_are_kept_until_the_slowest_has_them(office: Office) -> None:
    sink = Sink("a")
    await office.start(sink)
    await office.submit(3)
    await office.ended(3)
    sink.answer = lambda _: Again("down", after=10**7)
    await office.submit(2)
    await office.until(lambda log: len(log) == 5 and all(one.attempts for one in log))
    await office.submit(1)
    await office.until(lambda log: len(log) == 6 and all(one.attempts for one in log))
    await office.idle()
    store = office.kit.store
    assert isinstance(store, SqliteStore)
    retention = Retention(
        RetentionConfig(days=1), store, office.clock, heard=office.deliveries.heard, pause=pass_at_once
    )
    office.clock.now += 3 * DAY_MS
    assert await retention.sweep()
    assert await store.first_seq() == 4
    sink.answer = lambda _: Delivered()
    office.jump(10**8)
    await office.ended(6)
    await office.idle()
    assert await retention.sweep()
    assert await store.first_seq() == 6


async def test_what_was_not_wanted_is_never_looked_at_again(office: Office) -> None:
    sink = Sink("a")
    sink.wants = lambda event: False  # type: ignore[method-assign]
    await office.start(sink)
    await office.submit(5)
    async with asyncio.timeout(PATIENCE):
        while office.deliveries.heard() != 5:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.005)
    await office.deliveries.mark("a")
    await office.kit.store.close()  # as a crash: nothing more is written
    await office.deliveries.aclose(0)
    office.kit.store = office.kit._make(office.clock, office.kit.ids, 600)
    after = Sink("a")
    await office.start(after)
    await office.submit()
    await office.ended(1)
    assert after.seqs() == [6]
