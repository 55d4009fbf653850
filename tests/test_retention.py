"""What is forgotten, what never is, and that nobody notices it being done (`managers.workflows.retention`)."""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from management_api.app import create_app
from management_api.settings import load
from managers.clock import SystemClock
from managers.errors import NotFound
from managers.events.session import StreamConfig
from managers.events.types import BackendConnected
from managers.workflows.model import AttemptState, Filter, IdempotencyKey, Status, Workflow
from managers.workflows.retention import DAY_MS, Retention, RetentionConfig
from managers.workflows.sqlite_schema import FILE_NAME
from managers.workflows.sqlite_store import SqliteStore
from tests.queue_kit import PATH, PATIENCE, environment, house, picture
from tests.store_kit import Kit, image
from tests.stream_house import open_house, settled


class Pauses:
    """Time that passes at once, and is remembered. `stop` after so many."""

    class Over(Exception):
        pass

    def __init__(self, stop: int = 10**9) -> None:
        self.seconds: list[float] = []
        self._stop = stop

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        if len(self.seconds) == self._stop:
            raise self.Over


@pytest.fixture
async def kit(tmp_path: Path) -> AsyncIterator[Kit]:
    kit = Kit(lambda clock, ids, aging: SqliteStore(tmp_path / "data", clock=clock, ids=ids, aging_seconds=aging))
    await kit.open()
    yield kit
    await kit.store.close()


def retention(kit: Kit, pauses: Pauses | None = None, heard: int | None = None, **config: int) -> Retention:
    assert isinstance(kit.store, SqliteStore)
    return Retention(RetentionConfig(**config), kit.store, kit.clock, heard=lambda: heard, pause=pauses or Pauses())


async def ended(kit: Kit, **outcome: Any) -> Workflow:
    """One that ran and has files."""
    workflow, prompt = await kit.running()
    outputs = (image(f"{workflow.number}.png"),)
    found = await kit.store.finish(prompt, kit.outcome(outputs=outputs, **outcome))
    assert found is not None
    return found


async def there(kit: Kit) -> list[int]:
    """The numbers of all workflows."""
    return sorted(one.number for one in (await kit.store.list(Filter(limit=1000))).workflows)


async def log(kit: Kit) -> list[int]:
    return [frame.seq for frame in await kit.store.events_after(0, 10**6)]


def rows(kit: Kit, folder: Path) -> dict[str, int]:
    """How many rows each table has."""
    tables = ("workflow", "workflow_graph", "attempt", "output", "event", "idempotency")
    with closing(sqlite3.connect(folder / "data" / FILE_NAME)) as connection:
        return {table: connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables}


# ---- what goes and what stays


async def test_what_ended_goes_with_all_that_is_its(kit: Kit, tmp_path: Path) -> None:
    for _ in range(3):
        await ended(kit)
    await kit.store.submit(kit.new(failure="no output node"), key=IdempotencyKey("alice", "k", "hash"))
    kit.clock.now += 31 * DAY_MS
    last = await ended(kit)
    kit.clock.now += 1
    assert await retention(kit).sweep()
    assert await there(kit) == [last.number]
    assert rows(kit, tmp_path) == {
        "workflow": 1, "workflow_graph": 1, "attempt": 1, "output": 1, "event": 3, "idempotency": 0,
    }  # fmt: skip


async def test_a_day_less_and_all_of_it_stays(kit: Kit, tmp_path: Path) -> None:
    for _ in range(3):
        await ended(kit)
    before = rows(kit, tmp_path)
    kit.clock.now += 29 * DAY_MS
    assert await retention(kit).sweep()
    assert rows(kit, tmp_path) == before


async def test_zero_days_are_for_ever_but_not_for_idempotency_keys(kit: Kit, tmp_path: Path) -> None:
    for n in range(5):
        await kit.store.submit(kit.new(failure="no"), key=IdempotencyKey("alice", f"k{n}", "hash"))
    before = rows(kit, tmp_path)
    kit.clock.now += 3650 * DAY_MS
    assert await retention(kit, days=0, step_rows=2).sweep()
    assert rows(kit, tmp_path) == before | {"idempotency": 0}


async def test_what_waits_or_runs_is_never_touched(kit: Kit) -> None:
    running, prompt = await kit.running()
    waiting = [await kit.submit() for _ in range(3)]
    held = await kit.claim()
    cancelled = await kit.submit()
    await kit.store.claim(backend="b", pools=["local"], prompt_id="open", now=kit.clock.now)
    posted = waiting[1]
    await kit.store.cancel(posted.id, kit.clock.now)  # its prompt is still in ComfyUI
    await kit.store.cancel(cancelled.id, kit.clock.now)
    await ended_one_more(kit)
    kit.clock.now += 400 * DAY_MS
    before = {one.id: await kit.store.get(one.id) for one in (running, waiting[0], posted, waiting[2])}
    assert await retention(kit).sweep()
    left = {one.id for one in (await kit.store.list(Filter())).workflows}
    assert set(before) <= left
    assert cancelled.id not in left
    for one in before.values():
        assert await kit.store.get(one.id) == one
        assert (await kit.store.graph(one.id))[0]
        assert await kit.store.attempts(one.id) or one.attempt == 0
    assert held.workflow.id == waiting[0].id
    assert await kit.states(posted.id) == [(1, AttemptState.POSTED)]
    await kit.reopen()
    assert [kit.store.position(one.id) for one in (waiting[0], waiting[2])] == [0, 1]
    done = await kit.store.finish(prompt, kit.outcome())
    assert done is not None
    assert done.status is Status.COMPLETED
    # What was held back by its open attempt goes when that is closed.
    await kit.store.close_attempt("open", kit.clock.now)
    assert await retention(kit).sweep()
    with pytest.raises(NotFound):
        await kit.store.get(posted.id)


async def ended_one_more(kit: Kit) -> None:
    """The newest workflow and the newest event always stay: let them be nobody's."""
    await kit.store.submit(kit.new(failure="the newest"))
    await kit.store.append(BackendConnected(timestamp=kit.clock.now, backend="a"))


@pytest.mark.parametrize("year_ms", [0, 4_000_000_000_000])
async def test_the_clock_of_comfyui_decides_nothing(kit: Kit, year_ms: int) -> None:
    wrong = await ended(kit, start_time=year_ms, completion_time=year_ms + 1)
    await ended_one_more(kit)
    kit.clock.now += 29 * DAY_MS
    assert await retention(kit).sweep()
    assert wrong.number in await there(kit)
    kit.clock.now += 2 * DAY_MS
    assert await retention(kit).sweep()
    assert wrong.number not in await there(kit)


async def test_a_clock_that_starts_in_the_past_forgets_nothing(kit: Kit, tmp_path: Path) -> None:
    for _ in range(3):
        await ended(kit)
    now, kit.clock.now = kit.clock.now, 1000
    await kit.store.append(BackendConnected(timestamp=kit.clock.now, backend="a"))
    before = rows(kit, tmp_path)
    assert await retention(kit).sweep()
    kit.clock.now = now + 1000
    assert await retention(kit).sweep()
    assert rows(kit, tmp_path) == before


# ---- the log


async def test_the_log_has_never_a_hole_and_no_number_comes_twice(kit: Kit) -> None:
    chance = random.Random(7)
    prompts: list[str] = []
    for _ in range(90):
        kit.clock.now += DAY_MS // 4
        if chance.random() < 0.6:
            await kit.submit()
        if chance.random() < 0.5 and kit.store.counts().length:
            claimed = await kit.store.claim(backend="a", pools=["local"], prompt_id=kit.ids(), now=kit.clock.now)
            if claimed is not None:
                await kit.store.start(claimed.attempt.prompt_id, kit.clock.now)
                prompts.append(claimed.attempt.prompt_id)
        if prompts and chance.random() < 0.6:
            await kit.store.finish(prompts.pop(chance.randrange(len(prompts))), kit.outcome())
    last_seq, last_number = kit.store.last_seq, max(await there(kit))
    assert isinstance(kit.store, SqliteStore)
    before = kit.clock.now - 5 * DAY_MS
    steps = 0
    while await kit.store.prune(before, limit=3):
        steps += 1
        seqs = await log(kit)
        first = await kit.store.first_seq()
        assert seqs == list(range(first, last_seq + 1))
    assert steps > 20
    assert first > 60
    kit.clock.now += 1000 * DAY_MS
    assert await retention(kit, days=1).sweep()
    await kit.reopen()
    assert kit.store.last_seq == last_seq
    assert (await kit.submit()).number == last_number + 1
    assert kit.heard[-1][0].seq == last_seq + 1


async def test_it_waits_for_the_slowest_to_hear(kit: Kit) -> None:
    first, second, third = [await ended(kit) for _ in range(3)]
    await ended_one_more(kit)
    kit.clock.now += 31 * DAY_MS
    heard = (await kit.store.events_of(second.id))[1].seq  # not its end
    assert await retention(kit, heard=heard).sweep()
    assert (await log(kit))[0] == heard + 1
    assert await there(kit) == [second.number, third.number, third.number + 1]
    assert await retention(kit, heard=0).sweep()
    assert (await log(kit))[0] == heard + 1
    assert await retention(kit, heard=kit.store.last_seq).sweep()
    assert len(await log(kit)) == 1
    assert first.number not in await there(kit)
    assert third.number not in await there(kit)


async def test_pages_go_on_where_they_were(kit: Kit) -> None:
    old = [await ended(kit) for _ in range(6)]
    kit.clock.now += 31 * DAY_MS
    young = [await ended(kit) for _ in range(4)]
    page = await kit.store.list(Filter(limit=3))
    assert [one.number for one in page.workflows] == [one.number for one in young[:0:-1]]
    assert await retention(kit).sweep()
    rest = await kit.store.list(Filter(limit=3, cursor=page.next_cursor))
    assert ([one.number for one in rest.workflows], rest.next_cursor) == ([young[0].number], None)
    assert (await kit.store.owners(None, [f"{old[0].number}.png", f"{young[0].number}.png"])).keys() == {
        f"{young[0].number}.png"
    }


@pytest.mark.parametrize("fast", [True, False])
async def test_a_stream_is_told_of_the_gap(tmp_path: Path, fast: bool) -> None:
    async with open_house(tmp_path, fast=fast, config=StreamConfig()) as house:
        for _ in range(5):
            await house.submit()  # events of 1970
        clock = SystemClock()
        for _ in range(2):
            await house.store.append(BackendConnected(timestamp=clock.now_ms(), backend="a"))
        assert await Retention(RetentionConfig(), house.store, clock, pause=Pauses()).sweep()
        for since, expected in (
            (0, [("gap", 1, 5), ("seq", 6), ("seq", 7)]),
            (2, [("gap", 3, 5), ("seq", 6), ("seq", 7)]),
            (4, [("gap", 5, 5), ("seq", 6), ("seq", 7)]),
            (5, [("seq", 6), ("seq", 7)]),
            (6, [("seq", 7)]),
            (7, []),
        ):
            async with house.connect() as socket:
                await socket.send(f'{{"type":"subscribe","channels":["workflow","backend"],"since":{since}}}')
                frames = await settled(socket)
            told = [
                ("gap", frame["from"], frame["to"]) if frame["type"] == "gap" else ("seq", frame["seq"])
                for frame in frames
                if frame["type"] != "subscribed"
            ]
            assert told == expected, since


# ---- the pace


async def test_a_round_has_an_end_and_steps_are_small(kit: Kit) -> None:
    for _ in range(10):
        await ended(kit)
    await ended_one_more(kit)
    kit.clock.now += 31 * DAY_MS
    events = len(await log(kit))
    pauses = Pauses()
    sweeper = retention(kit, pauses, step_rows=2, round_steps=3)
    assert not await sweeper.sweep()
    assert events - len(await log(kit)) == 6
    assert pauses.seconds == [0.05] * 3
    rounds = 1
    while not await sweeper.sweep():
        rounds += 1
    assert rounds == 7  # 31 events and 10 workflows by twos: 16 + 5 steps


async def test_it_runs_on_whatever_happens(kit: Kit) -> None:
    await ended(kit)
    await ended_one_more(kit)
    kit.clock.now += 31 * DAY_MS
    store = kit.store
    assert isinstance(store, SqliteStore)
    await store.close()  # as good as a disk that is gone

    class Opening(Pauses):
        async def __call__(self, seconds: float) -> None:
            if not self.seconds:
                await kit.open()
            await super().__call__(seconds)

    pauses = Opening(stop=6)
    with pytest.raises(Pauses.Over):
        await retention(kit, pauses, step_rows=100).run()
    # Nothing could be done; then a step of events and one of workflows; then nothing was left, twice.
    assert pauses.seconds == [300, 0.05, 0.05, 300, 300, 300]
    assert await there(kit) == [2]


async def test_those_who_hand_work_in_do_not_wait_for_it(kit: Kit, tmp_path: Path) -> None:
    """In every commit of a sweep there is room for everybody else."""
    await asyncio.gather(*(kit.store.submit(kit.new(failure="no")) for _ in range(1000)))
    kit.clock.now += 31 * DAY_MS
    sweep = asyncio.create_task(retention(kit, step_rows=20).sweep())
    handed_in = 0
    while not sweep.done():
        await kit.submit()
        handed_in += 1
    assert await sweep
    assert handed_in > 20
    assert kit.store.counts().length == handed_in


# ---- room


async def test_the_file_does_not_grow_without_end_and_gives_room_back(kit: Kit, tmp_path: Path) -> None:
    path = tmp_path / "data" / FILE_NAME

    async def size_after(count: int) -> int:
        graphs = [b'{"1":"%s"}' % os.urandom(50_000).hex().encode() for _ in range(20)]
        for _ in range(count // 20):
            new = [kit.new(failure="no", graph=graph) for graph in graphs]
            await asyncio.gather(*map(kit.store.submit, new))
        kit.clock.now += 31 * DAY_MS
        await kit.reopen()
        return path.stat().st_size

    first = await size_after(400)
    assert await retention(kit, round_steps=10**6).sweep()
    await kit.reopen()
    small = path.stat().st_size
    assert first > 2**24
    assert small < first * 0.75
    second = await size_after(400)
    assert second < first * 1.05


# ---- in the service


class Later:
    """The system's clock, some days ahead."""

    def __init__(self, days: int) -> None:
        self._days = days

    def now_ms(self) -> int:
        return SystemClock().now_ms() + self._days * DAY_MS

    def monotonic(self) -> float:
        return SystemClock().monotonic()


async def test_the_service_forgets_by_itself(tmp_path: Path) -> None:
    settings = load(environment(tmp_path, MANAGEMENT_API_RETENTION="7"), None)
    async with house(create_app(settings)) as queue:
        ended = await queue.submit(picture())
        await queue.cancel(ended)
        waiting = await queue.submit(picture())
    async with house(create_app(settings, clock=Later(6))) as queue:
        assert (await queue.get(ended))["status"] == "cancelled"
    async with house(create_app(settings, clock=Later(8))) as queue:
        async with asyncio.timeout(PATIENCE):
            while (await queue.client.get(f"{PATH}/{ended}")).status_code != 404:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.02)
        assert [one["workflowId"] for one in (await queue.list())["workflows"]] == [waiting]
        assert (await queue.get(waiting))["queuePosition"] == 0
        async with queue.stream("workflow", since=0) as stream:
            gap = await stream.until("gap")
        assert gap["from"] == 1
