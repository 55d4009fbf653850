"""What workflows cost on disk, and the sums at /v1/usage."""

from __future__ import annotations

import asyncio
import csv
import io
import random
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from managers.errors import Conflict, InvalidRequest
from managers.events.types import Cost, WorkflowCompleted
from managers.workflows.model import Filter, Status, Workflow, added, known
from managers.workflows.sqlite_schema import FILE_NAME, MIGRATIONS
from managers.workflows.sqlite_store import SqliteStore
from managers.workflows.usage import Usage, UsageBy, UsageReport, report, total
from managers.workflows.views import view
from routes.usage import table
from tests.serving import Service, StartService
from tests.store_kit import Kit

DAY_MS = 86_400_000
GIB = 2**30
EVER = (date.min, date.max)
SOME = Cost(gpu_seconds=2.5, vram_peak_bytes=3 * GIB, energy_joules=500.25)
MORE = Cost(gpu_seconds=1.25, vram_peak_bytes=2 * GIB, energy_joules=100)


@pytest.fixture
async def kit(tmp_path: Path) -> AsyncIterator[Kit]:
    def make(clock: Any, ids: Any, aging: int) -> SqliteStore:
        return SqliteStore(tmp_path / "data", clock=clock, ids=ids, aging_seconds=aging)

    kit = Kit(make)
    await kit.open()
    yield kit
    await kit.store.close()


async def begun(kit: Kit, backend: str = "a", start: int | None = None, **new: Any) -> tuple[Workflow, str]:
    """One that runs, and its prompt_id."""
    await kit.submit(**new)
    return await begun_again(kit, backend, start)


async def begun_again(kit: Kit, backend: str = "a", start: int | None = None) -> tuple[Workflow, str]:
    prompt_id = (await kit.claim(backend=backend)).attempt.prompt_id
    workflow = await kit.store.start(prompt_id, kit.clock.now if start is None else start)
    assert workflow is not None
    return workflow, prompt_id


async def lost(kit: Kit, prompt_id: str, cost: Cost | None, *, after: int = 1000, retry: bool = True) -> Workflow:
    kit.clock.now += after
    found = await kit.store.lose(
        prompt_id, error="gone", error_type="lost", now=kit.clock.now, retry=retry, cost=cost
    )
    assert found is not None
    return found


async def by(kit: Kit, name: str) -> dict[str, Usage]:
    """The usage of all days; each row without what it is about."""
    rows = await kit.store.usage(UsageBy(name), *EVER)
    found = {getattr(row, name): msgspec.structs.replace(row, **{name: UNSET}) for row in rows}
    assert len(found) == len(rows)
    return found


# ---- the record


async def test_the_cost_of_a_run_is_in_its_record_its_event_and_the_sums_also_after_a_restart(kit: Kit) -> None:
    workflow, prompt_id = await begun(kit, submitted_by="studio")
    finished = await kit.store.finish(prompt_id, kit.outcome(cost=SOME))
    assert finished is not None
    assert finished.cost == SOME
    event = kit.heard[-1][0]
    assert isinstance(event, WorkflowCompleted)
    assert event.cost == SOME
    told = msgspec.json.decode(kit.heard[-1][1].data)["cost"]
    assert told == {"gpuSeconds": 2.5, "vramPeakBytes": 3 * GIB, "energyJoules": 500.25}

    await kit.reopen()
    assert (await kit.store.get(workflow.id)).cost == SOME
    assert (await kit.store.list(Filter())).workflows[0].cost == SOME
    assert (await kit.store.snapshot([workflow.id])).workflows[0].cost == SOME
    expected = Usage(
        workflows=1, completed=1, run_seconds=2.5, gpu_seconds=2.5, energy_joules=500.25, vram_peak_bytes=3 * GIB
    )
    assert await by(kit, "key") == {"studio": expected}
    assert await by(kit, "gpu") == {"a": expected}
    assert await by(kit, "day") == {"2023-11-14": expected}


@pytest.mark.parametrize(
    "cost", [Cost(gpu_seconds=1), Cost(vram_peak_bytes=7), Cost(energy_joules=0.5), Cost(), None], ids=str
)
async def test_each_value_is_missing_on_its_own(kit: Kit, cost: Cost | None) -> None:
    workflow, prompt_id = await begun(kit)
    await kit.store.finish(prompt_id, kit.outcome(cost=cost))
    stored = (await kit.store.get(workflow.id)).cost
    assert stored == (cost or Cost())
    shown = msgspec.json.decode(msgspec.json.encode(view(await kit.store.get(workflow.id), None, None)))["cost"]
    assert shown == (msgspec.to_builtins(cost) if cost else None) or (cost == Cost() and shown is None)
    (sums,) = (await by(kit, "key")).values()
    wanted = msgspec.to_builtins(cost or Cost())
    assert (sums.gpu_seconds, sums.vram_peak_bytes, sums.energy_joules) == tuple(
        wanted.get(name) for name in ("gpuSeconds", "vramPeakBytes", "energyJoules")
    )


async def test_lost_attempts_cost_too_each_where_it_ran(kit: Kit) -> None:
    workflow, first = await begun(kit, "a", submitted_by="studio")
    again = await lost(kit, first, SOME, after=3000)
    assert (again.status, again.cost) == (Status.QUEUED, SOME)
    waiting = Usage(run_seconds=3, gpu_seconds=2.5, energy_joules=500.25, vram_peak_bytes=3 * GIB)
    assert await by(kit, "gpu") == {"a": waiting}

    kit.clock.now += DAY_MS
    _, second = await begun_again(kit, "b")
    await kit.store.finish(second, kit.outcome(cost=MORE))
    both = Cost(gpu_seconds=3.75, vram_peak_bytes=3 * GIB, energy_joules=600.25)
    assert (await kit.store.get(workflow.id)).cost == both
    event = kit.heard[-1][0]
    assert isinstance(event, WorkflowCompleted)
    assert event.cost == both
    rest = Usage(
        workflows=1, completed=1, run_seconds=2.5, gpu_seconds=1.25, energy_joules=100, vram_peak_bytes=2 * GIB
    )
    assert await by(kit, "gpu") == {"a": waiting, "b": rest}
    assert await by(kit, "day") == {"2023-11-14": waiting, "2023-11-15": rest}
    assert await by(kit, "key") == {"studio": total([waiting, rest])}
    assert total([waiting, rest]).gpu_seconds == 3.75


async def test_one_attempt_that_nobody_measured_makes_the_whole_unknown_and_the_sums_go_on(kit: Kit) -> None:
    workflow, first = await begun(kit)
    await lost(kit, first, None)
    _, second = await begun_again(kit)
    await lost(kit, second, MORE)
    _, third = await begun_again(kit)
    await kit.store.finish(third, kit.outcome(cost=SOME))
    stored = await kit.store.get(workflow.id)
    assert stored.cost == Cost()
    assert view(stored, None, None).cost is None
    (sums,) = (await by(kit, "key")).values()
    assert (sums.gpu_seconds, sums.energy_joules, sums.vram_peak_bytes) == (3.75, 600.25, 3 * GIB)


async def test_an_attempt_that_never_began_costs_nothing(kit: Kit) -> None:
    workflow = await kit.submit()
    first = (await kit.claim()).attempt.prompt_id
    again = await lost(kit, first, SOME)
    assert again.cost is None
    assert await by(kit, "key") == {}
    second = (await kit.claim()).attempt.prompt_id
    refused = kit.outcome(Status.FAILED, start_time=None, error="refused", error_type="validation", cost=SOME)
    await kit.store.finish(second, refused)
    assert (await kit.store.get(workflow.id)).cost is None
    assert await by(kit, "gpu") == {"a": Usage(workflows=1, failed=1)}


async def test_a_start_that_nobody_saw_is_a_start(kit: Kit) -> None:
    workflow = await kit.submit()
    prompt_id = (await kit.claim()).attempt.prompt_id
    await kit.store.finish(prompt_id, kit.outcome(cost=SOME))
    assert (await kit.store.get(workflow.id)).cost == SOME
    assert (await by(kit, "gpu"))["a"].run_seconds == 2.5


async def test_what_failed_for_good_is_counted_with_what_it_took(kit: Kit) -> None:
    workflow, prompt_id = await begun(kit)
    failed = await lost(kit, prompt_id, SOME, after=4000, retry=False)
    assert (failed.status, failed.cost) == (Status.FAILED, SOME)
    assert (await kit.store.get(workflow.id)).cost == SOME
    assert await by(kit, "gpu") == {
        "a": Usage(
            workflows=1, failed=1, run_seconds=4, gpu_seconds=2.5, energy_joules=500.25, vram_peak_bytes=3 * GIB
        )
    }


async def test_a_lost_attempt_ran_no_longer_than_its_time_limit(kit: Kit) -> None:
    """It may be found lost long after: the service was away."""
    _, prompt_id = await begun(kit, timeout_seconds=60.0)
    await lost(kit, prompt_id, None, after=10 * 3_600_000)
    assert (await by(kit, "key"))[""].run_seconds == 60


async def test_a_cancelled_run_costs_what_it_took_until_then_and_once(kit: Kit) -> None:
    workflow, prompt_id = await begun(kit)
    kit.clock.now += 1500
    cancelled = await kit.store.cancel(workflow.id, kit.clock.now, SOME)
    assert cancelled.cost == SOME
    assert await kit.store.cancel(workflow.id, kit.clock.now + 1, MORE) == cancelled
    assert await kit.store.finish(prompt_id, kit.outcome(cost=MORE)) is None
    assert (await kit.store.get(workflow.id)).cost == SOME
    sums = Usage(
        workflows=1, cancelled=1, run_seconds=1.5, gpu_seconds=2.5, energy_joules=500.25, vram_peak_bytes=3 * GIB
    )
    assert await by(kit, "gpu") == {"a": sums}


async def test_what_never_ran_is_counted_and_costs_nothing(kit: Kit) -> None:
    waits = await kit.submit()
    assert (await kit.store.cancel(waits.id, kit.clock.now, SOME)).cost is None
    assert await by(kit, "gpu") == {"": Usage(workflows=1, cancelled=1)}
    await kit.submit(failure="no such class")
    assert (await by(kit, "gpu"))[""].workflows == 1, "it never waited"


async def test_of_two_ends_at_once_one_is_counted(kit: Kit) -> None:
    for _ in range(5):
        workflow, prompt_id = await begun(kit)
        ends = kit.store.cancel(workflow.id, kit.clock.now, SOME), kit.store.finish(prompt_id, kit.outcome(cost=SOME))
        await asyncio.gather(*ends, return_exceptions=True)
        again, prompt_id = await begun(kit)
        other = kit.store.finish(prompt_id, kit.outcome(cost=SOME)), kit.store.cancel(again.id, kit.clock.now, SOME)
        results = await asyncio.gather(*other, return_exceptions=True)
        assert isinstance(results[1], Conflict)
    (sums,) = (await by(kit, "key")).values()
    assert (sums.workflows, sums.cancelled, sums.completed) == (10, 5, 5)
    assert sums.gpu_seconds == 25


async def test_sums_are_those_of_the_records_and_stay_when_these_are_forgotten(kit: Kit) -> None:
    chance = random.Random(4)
    for _ in range(60):
        kit.clock.now += chance.randrange(DAY_MS // 4)
        workflow, prompt_id = await begun(kit, chance.choice("ab"), submitted_by=chance.choice(["x", "y", None]))
        cost = Cost(
            gpu_seconds=round(chance.uniform(0, 9), 3),
            vram_peak_bytes=chance.randrange(GIB),
            energy_joules=round(chance.uniform(0, 999), 3),
        )
        match chance.randrange(4):
            case 0:
                await kit.store.cancel(workflow.id, kit.clock.now, cost)
                await kit.store.close_attempt(prompt_id, kit.clock.now)
            case 1:
                await lost(kit, prompt_id, cost)
                _, prompt_id = await begun_again(kit, chance.choice("ab"))
                await kit.store.finish(prompt_id, kit.outcome(Status.FAILED, cost=cost))
            case _:
                await kit.store.finish(prompt_id, kit.outcome(cost=cost))
    workflows = (await kit.store.list(Filter(limit=100))).workflows
    costs = [workflow.cost for workflow in workflows]
    assert len(costs) == 60
    before = [await kit.store.usage(kind, *EVER) for kind in UsageBy]
    sums = [total(rows) for rows in before]
    assert sums[0] == sums[1] == sums[2]
    assert sums[0].workflows == sums[0].completed + sums[0].failed + sums[0].cancelled == 60
    assert sums[0].gpu_seconds == pytest.approx(sum(cost.gpu_seconds for cost in costs if cost))  # type: ignore[misc]
    assert sums[0].energy_joules == pytest.approx(sum(cost.energy_joules for cost in costs if cost))  # type: ignore[misc]
    assert sums[0].vram_peak_bytes == max(cost.vram_peak_bytes for cost in costs if cost)  # type: ignore[type-var]

    store = kit.store
    assert isinstance(store, SqliteStore)
    while await store.prune(kit.clock.now + DAY_MS):
        pass
    assert len((await store.list(Filter(limit=100))).workflows) == 1
    assert [await store.usage(kind, *EVER) for kind in UsageBy] == before


async def test_a_day_is_that_of_utc_and_both_ends_are_in(kit: Kit) -> None:
    midnight = 1_700_006_400_000  # 2023-11-15
    for now in (midnight - 1, midnight, midnight + DAY_MS - 1, midnight + DAY_MS):
        _, prompt_id = await begun(kit)
        kit.clock.now = now
        await kit.store.finish(prompt_id, kit.outcome())
    rows = await kit.store.usage(UsageBy.DAY, *EVER)
    assert [(row.day, row.workflows) for row in rows] == [("2023-11-14", 1), ("2023-11-15", 2), ("2023-11-16", 1)]
    first, last = date(2023, 11, 15), date(2023, 11, 16)
    assert [row.workflows for row in await kit.store.usage(UsageBy.DAY, first, last)] == [2, 1]
    assert [row.workflows for row in await kit.store.usage(UsageBy.GPU, first, first)] == [2]
    assert await kit.store.usage(UsageBy.KEY, date(2024, 1, 1), date(2024, 1, 2)) == []


# ---- a file from before


OLD = """
INSERT INTO workflow (number, id, status, priority, gpu, rank, created_at, max_attempts, timeout_seconds, attempt,
                      backend, start_time, completion_time, submitted_by) VALUES
    (1, 'done',  'completed', 'normal', 'local', 1, 1, 3, 60, 1, 'a', 5, 9, 'studio'),
    (2, 'lost',  'queued',    'normal', 'local', 2, 2, 3, 60, 1, NULL, NULL, NULL, 'studio'),
    (3, 'fresh', 'queued',    'normal', 'local', 3, 3, 3, 60, 0, NULL, NULL, NULL, 'studio');
INSERT INTO workflow_graph (workflow, graph) VALUES (1, '{}'), (2, '{}'), (3, '{}');
INSERT INTO attempt (prompt_id, workflow, number, backend, state, created_at, start_time) VALUES
    ('p1', 1, 1, 'a', 'ended', 1, 5), ('p2', 2, 1, 'a', 'lost', 2, 6), ('p3', 3, 1, 'a', 'withdrawn', 3, NULL);
INSERT INTO event (seq, type, workflow, workflow_id, created_at, data) VALUES
    (1, 'workflow:queued', 1, 'done', 1, '{}');
"""


async def test_a_file_from_before_costs_were_kept(tmp_path: Path, kit: Kit) -> None:
    await kit.store.close()
    folder = tmp_path / "data"
    for file in folder.glob(f"{FILE_NAME}*"):
        file.unlink()
    with closing(sqlite3.connect(folder / FILE_NAME)) as old:
        old.executescript("".join(MIGRATIONS[:2]) + OLD + "PRAGMA user_version = 2; PRAGMA journal_mode = WAL;")
    await kit.open()
    assert [workflow.cost for workflow in (await kit.store.list(Filter())).workflows] == [None, Cost(), None]
    assert await by(kit, "key") == {}
    for _ in range(2):
        _, prompt_id = await begun_again(kit)
        await kit.store.finish(prompt_id, kit.outcome(cost=SOME))
    # An attempt of it ran when nobody wrote down what it took.
    assert (await kit.store.get("lost")).cost == Cost()
    assert (await kit.store.get("fresh")).cost == SOME
    (sums,) = (await by(kit, "key")).values()
    assert (sums.workflows, sums.gpu_seconds) == (2, 5)


# ---- the pure parts

known_costs = st.builds(
    Cost,
    gpu_seconds=st.floats(0, 1e6).map(lambda value: round(value, 3)),
    vram_peak_bytes=st.integers(0, 2**40),
    energy_joules=st.floats(0, 1e9).map(lambda value: round(value, 3)),
)


@given(st.lists(known_costs, min_size=1, max_size=5))
def test_attempts_add_up(costs: list[Cost]) -> None:
    cost: Cost | None = None
    for one in costs:
        cost = added(cost, one)
    assert cost is not None
    assert cost.gpu_seconds == pytest.approx(sum(one.gpu_seconds for one in costs), abs=0.01)  # type: ignore[misc]
    assert cost.energy_joules == pytest.approx(sum(one.energy_joules for one in costs), abs=0.01)  # type: ignore[misc]
    assert cost.vram_peak_bytes == max(one.vram_peak_bytes for one in costs)  # type: ignore[type-var]


def test_a_value_that_one_attempt_lacks_is_lacking() -> None:
    assert added(SOME, Cost(gpu_seconds=1)) == Cost(gpu_seconds=3.5)
    assert added(Cost(energy_joules=1), MORE) == Cost(energy_joules=101)
    assert added(SOME, None) == Cost()
    assert added(None, None) == Cost()
    assert (known(None), known(Cost()), known(SOME)) == (None, None, SOME)


async def test_a_running_one_costs_what_its_attempts_took_so_far(kit: Kit) -> None:
    workflow, first = await begun(kit)
    assert view(workflow, None, None, SOME).cost == SOME
    assert view(workflow, None, None, None).cost is None
    waits = await lost(kit, first, SOME)
    assert view(waits, 0, None, MORE).cost == SOME, "what memory says is of the attempt that is in the record"
    again, _ = await begun_again(kit)
    shown = view(again, None, None, MORE).cost
    assert shown is not None
    assert shown.gpu_seconds == 3.75
    assert view(again, None, None, None).cost is None


class Books:
    """Asked for these days."""

    def __init__(self) -> None:
        self.asked: list[tuple[date, date]] = []

    async def usage(self, by: UsageBy, first: date, last: date) -> list[Usage]:
        assert by is UsageBy.KEY
        self.asked.append((first, last))
        return []


@pytest.mark.parametrize(
    ("first", "last", "asked"),
    [
        (None, None, ("2026-10-24", "2026-11-22")),
        ("2026-11-01", None, ("2026-11-01", "2026-11-22")),
        ("2027-01-01", None, ("2027-01-01", "2027-01-01")),
        (None, "2026-03-01", ("2026-01-31", "2026-03-01")),
        (None, "0001-01-05", ("0001-01-01", "0001-01-05")),
        ("2026-11-22", "2026-11-22", ("2026-11-22", "2026-11-22")),
    ],
)
async def test_days_that_are_not_named(first: str | None, last: str | None, asked: tuple[str, str]) -> None:
    books = Books()
    days = [None if day is None else date.fromisoformat(day) for day in (first, last)]
    found = await report(books, UsageBy.KEY, first=days[0], last=days[1], today=date(2026, 11, 22))
    assert (found.first, found.last) == asked
    assert books.asked == [(date.fromisoformat(asked[0]), date.fromisoformat(asked[1]))]
    assert found.total == Usage()


async def test_the_first_day_is_not_after_the_last() -> None:
    days = {"first": date(2026, 11, 22), "last": date(2026, 11, 21), "today": date(2026, 11, 22)}
    with pytest.raises(InvalidRequest, match="2026-11-22"):
        await report(Books(), UsageBy.KEY, **days)


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", 'a,"b"', "two\nlines", "plain", ""])
def test_no_cell_is_a_formula(name: str) -> None:
    row = Usage(key=name, workflows=3, run_seconds=1.5, gpu_seconds=0.25)
    found = UsageReport(by=UsageBy.KEY, first="2026-11-01", last="2026-11-02", usage=(row,), total=Usage())
    head, cells = csv.reader(io.StringIO(table(found), newline=""))
    assert head == [
        *("key", "workflows", "completed", "failed", "cancelled", "runSeconds", "gpuSeconds", "energyJoules"),
        "vramPeakBytes",
    ]
    assert cells[0].removeprefix("'") == name
    assert cells[0].startswith("'") == (name[:1] in {"=", "+", "-", "@", "\t", "\r"} - {""})
    assert cells[1:] == ["3", "0", "0", "0", "1.5", "0.25", "", ""]


# ---- over HTTP


async def filled(service: Service) -> None:
    """A run of `studio`, and one of nobody's that never ran."""
    store = service.app.running[0].workflows.store
    now = service.app.base.clock.now_ms()
    kit = Kit(lambda *_: store)
    for name in ("studio", None):
        workflow = await kit.submit(submitted_by=name, created_at=now)
        if name is None:
            await store.cancel(workflow.id, now)
            continue
        await store.claim(backend="local", pools=["local"], prompt_id="p", now=now)
        await store.start("p", now - 2000)
        await store.cancel(workflow.id, now, SOME)


ZERO = {"gpuSeconds": None, "energyJoules": None, "vramPeakBytes": None}
TOOK = {"gpuSeconds": 2.5, "energyJoules": 500.25, "vramPeakBytes": 3 * GIB}
COUNTED = {"workflows": 1, "completed": 0, "failed": 0, "cancelled": 1}


async def test_usage_as_json_and_as_a_table(start_service: StartService) -> None:
    service = await start_service()
    empty = (await service.client.get("/v1/usage")).json()
    assert empty["by"] == "day"
    assert empty["usage"] == []
    assert empty["total"] == dict.fromkeys(COUNTED, 0) | {"runSeconds": 0.0} | ZERO
    first, last = date.fromisoformat(empty["from"]), date.fromisoformat(empty["to"])
    assert (last - first).days == 29

    await filled(service)
    reply = await service.client.get("/v1/usage", params={"by": "key"})
    assert reply.status_code == 200
    assert reply.headers["vary"] == "Accept"
    assert reply.json() == {
        "by": "key",
        "from": empty["from"],
        "to": empty["to"],
        "usage": [
            {"key": "", **COUNTED, "runSeconds": 0.0, **ZERO},
            {"key": "studio", **COUNTED, "runSeconds": 2.0, **TOOK},
        ],
        "total": {**COUNTED, "workflows": 2, "cancelled": 2, "runSeconds": 2.0, **TOOK},
    }
    assert next(iter(reply.json()["usage"][0])) == "key"
    by_gpu = (await service.client.get("/v1/usage", params={"by": "gpu"})).json()
    assert [row["gpu"] for row in by_gpu["usage"]] == ["", "local"]
    by_day = (await service.client.get("/v1/usage", params={"by": "day"})).json()
    assert [row["day"] for row in by_day["usage"]] == [empty["to"]]
    assert by_day["total"] == by_gpu["total"] == reply.json()["total"]
    other = (await service.client.get("/v1/usage?from=2020-01-01&to=2020-12-31")).json()
    assert (other["from"], other["to"], other["usage"]) == ("2020-01-01", "2020-12-31", [])

    for query, accept in (("&format=csv", "*/*"), ("", "text/csv"), ("&format=csv", "application/json")):
        sheet = await service.client.get(f"/v1/usage?by=key{query}", headers={"accept": accept})
        assert sheet.headers["content-type"] == "text/csv; charset=utf-8"
        name = f'filename="usage-by-key-{empty["from"]}-{empty["to"]}.csv"'
        assert sheet.headers["content-disposition"] == f"attachment; {name}"
        rows = list(csv.DictReader(io.StringIO(sheet.text, newline="")))
        assert rows[1] == {
            name: "" if value is None else str(value) for name, value in reply.json()["usage"][1].items()
        }
        assert [row["key"] for row in rows] == ["", "studio"]
    as_json = await service.client.get("/v1/usage?by=key&format=json", headers={"accept": "text/csv"})
    assert as_json.json() == reply.json()


@pytest.mark.parametrize(
    "query",
    [
        "by=workflow",
        "from=yesterday",
        "to=2026-02-30",
        "from=2026-11-22&to=2026-11-21",
        "format=xml",
        "from=",
        "to=17",
    ],
)
async def test_what_cannot_be_understood_is_400(start_service: StartService, query: str) -> None:
    service = await start_service()
    reply = await service.client.get(f"/v1/usage?{query}")
    assert reply.status_code == 400, reply.text
    assert reply.headers["content-type"] == "application/problem+json"


def test_unset_is_not_zero() -> None:
    assert Cost().gpu_seconds is UNSET
    assert msgspec.json.encode(Cost(gpu_seconds=0.0)) == b'{"gpuSeconds":0.0}'
