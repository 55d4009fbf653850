"""The embedded store: the contract of all stores, and what a file on a disk can do to it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from managers.clock import Clock, IdMaker
from managers.errors import Conflict, NotFound, StoreUnavailable
from managers.events.types import BackendConnected
from managers.workflows.model import Filter, Status
from managers.workflows.sqlite_house import backup
from managers.workflows.sqlite_schema import FILE_NAME, MIGRATIONS
from managers.workflows.sqlite_store import SqliteStore
from managers.workflows.store import WorkflowStore
from tests.store_contract import StoreContract
from tests.store_kit import Kit, ManualClock, numbered_ids

ROOT = Path(__file__).parent.parent


class TestSqliteStore(StoreContract):
    def make(self, folder: Path, clock: Clock, ids: IdMaker, aging_seconds: int) -> WorkflowStore:
        return SqliteStore(folder, clock=clock, ids=ids, aging_seconds=aging_seconds)


def make(folder: Path) -> SqliteStore:
    return SqliteStore(folder, clock=ManualClock(), ids=numbered_ids(), aging_seconds=600)


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    return Kit(lambda clock, ids, aging: SqliteStore(tmp_path / "data", clock=clock, ids=ids, aging_seconds=aging))


async def test_many_at_once_share_few_commits(tmp_path: Path, kit: Kit) -> None:
    await kit.open()
    store = kit.store
    assert isinstance(store, SqliteStore)
    before = store.commits
    await asyncio.gather(*(store.submit(kit.new()) for _ in range(200)))
    assert 1 <= store.commits - before <= 20
    await store.close()


async def test_a_start_waits_for_company_and_keeps_its_place(kit: Kit) -> None:
    """The end of a short run shares its commit with the start; alone, the start goes by itself."""
    await kit.open()
    store = kit.store
    assert isinstance(store, SqliteStore)
    await kit.submit()
    prompt_id = (await kit.claim()).attempt.prompt_id
    before = store.commits
    started, ended = await asyncio.gather(store.start(prompt_id, 7), store.finish(prompt_id, kit.outcome()))
    assert started is not None
    assert ended is not None
    assert store.commits - before == 1
    assert kit.told()[-2:] == ["workflow:started", "workflow:completed"]
    workflow, _ = await kit.running()
    assert workflow.status is Status.RUNNING


async def test_a_refused_operation_sinks_no_neighbour(kit: Kit) -> None:
    await kit.open()
    workflow = await kit.submit()
    results = await asyncio.gather(
        kit.store.cancel("unknown", 1),
        kit.store.submit(kit.new(metadata={"lone surrogate": "\ud800"})),
        kit.store.cancel(workflow.id, 1),
        kit.store.submit(kit.new()),
        return_exceptions=True,
    )
    assert isinstance(results[0], NotFound)
    assert isinstance(results[1], UnicodeEncodeError)
    assert (await kit.store.get(workflow.id)).status is Status.CANCELLED
    assert kit.told() == ["workflow:queued", "workflow:cancelled", "workflow:queued"]
    assert [event.seq for event, _ in kit.heard] == [1, 2, 3]
    assert kit.store.counts().length == 1
    await kit.store.close()


async def test_a_listener_that_fails_holds_nobody_up(tmp_path: Path, kit: Kit) -> None:
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["exception"]))
    error = RuntimeError("a listener broke")

    def listener(_: object) -> None:
        raise error

    await kit.store.open(listener)
    workflow = await kit.submit()
    assert kit.store.position(workflow.id) == 0
    assert complaints == [error]
    await kit.store.close()


# ---- the folder


async def test_a_second_service_on_the_folder_is_refused_by_name(tmp_path: Path) -> None:
    first, second = make(tmp_path), make(tmp_path)
    await first.open(lambda _: None)
    with pytest.raises(StoreUnavailable, match=f"{os.getpid()}@{socket.gethostname()}"):
        await second.open(lambda _: None)
    await first.close()
    await second.open(lambda _: None)
    await second.close()


async def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    store = make(tmp_path)
    await store.open(lambda _: None)
    await store.close()
    with sqlite3.connect(tmp_path / FILE_NAME) as connection:
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    connection.close()
    before = (tmp_path / FILE_NAME).read_bytes()
    with pytest.raises(StoreUnavailable, match="newer version"):
        await make(tmp_path).open(lambda _: None)
    assert (tmp_path / FILE_NAME).read_bytes() == before


async def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"not a database " * 1000)
    with pytest.raises(StoreUnavailable, match=r"damaged.*backup"):
        await make(tmp_path).open(lambda _: None)
    assert (tmp_path / FILE_NAME).read_bytes() == b"not a database " * 1000


async def test_a_torn_file_is_refused(tmp_path: Path, kit: Kit) -> None:
    await kit.open()
    await asyncio.gather(*(kit.store.submit(kit.new()) for _ in range(300)))
    await kit.store.close()
    path = tmp_path / "data" / FILE_NAME
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(path.stat().st_size - 8192))
    with pytest.raises(StoreUnavailable, match="damaged"):
        await kit.open()


async def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnavailable, match="cannot be used"):
        await make(tmp_path / "file" / "data").open(lambda _: None)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
async def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o500)  # noqa: PTH101 - the linter takes the short way for a blocking one
    with pytest.raises(StoreUnavailable, match="cannot be used"):
        await make(tmp_path).open(lambda _: None)


# ---- a copy, and keeping it small


async def test_a_backup_is_whole_while_everything_goes_on(tmp_path: Path, kit: Kit) -> None:
    await kit.open()
    for _ in range(50):
        await kit.submit()
    copies = tmp_path / "copies"
    copies.mkdir()
    await asyncio.gather(kit.store.backup(copies / FILE_NAME), *(kit.store.submit(kit.new()) for _ in range(200)))
    with pytest.raises(Conflict):
        await kit.store.backup(copies / FILE_NAME)
    backup(tmp_path / "data" / FILE_NAME, copies / "by another process")
    with pytest.raises(StoreUnavailable):
        await kit.store.backup(tmp_path / "nowhere" / "copy")
    await kit.store.close()
    assert {path.name for path in copies.iterdir()} == {FILE_NAME, "by another process"}
    copy = make(copies)
    await copy.open(lambda _: None)
    assert copy.counts().length >= 50
    assert copy.last_seq == copy.counts().length
    await copy.close()


async def test_prune_forgets_in_small_steps_and_never_counts_back(kit: Kit) -> None:
    await kit.open()
    store = kit.store
    assert isinstance(store, SqliteStore)
    waiting = await kit.submit()
    cancelled_open = await kit.submit()
    await store.claim(backend="a", pools=["local"], prompt_id="x", now=1)
    await store.claim(backend="a", pools=["local"], prompt_id="open", now=1)
    await store.cancel(cancelled_open.id, kit.clock.now)
    old = [await kit.submit() for _ in range(5)]
    for one in old:
        await store.cancel(one.id, kit.clock.now)
    edge = kit.clock.now + 1
    kit.clock.now += 1000
    young = await kit.submit()
    await store.cancel(young.id, kit.clock.now)
    last_seq = store.last_seq
    rounds = 0
    while await store.prune(edge, limit=2):
        rounds += 1
    assert rounds >= 3
    left = {one.id for one in (await store.list(Filter())).workflows}
    assert left == {waiting.id, cancelled_open.id, young.id}
    assert [frame.workflow_id for frame in await store.events_after(0, 99)] == [young.id, young.id]
    assert await store.events_of(old[0].id) == []
    while await store.prune(kit.clock.now + 1):
        pass
    assert {one.id for one in (await store.list(Filter())).workflows} == left
    await kit.reopen()
    assert kit.store.last_seq == last_seq
    await kit.store.append(BackendConnected(timestamp=1, backend="a"))
    assert kit.heard[-1][0].seq == last_seq + 1
    assert (await kit.submit()).number == young.number + 1
    await kit.store.close()


# ---- what a process or a disk can do

SUBMITTING = """
import asyncio, sys
from pathlib import Path
from managers.workflows.sqlite_store import SqliteStore
from tests.store_kit import Kit

async def main():
    kit = Kit(lambda clock, ids, aging: SqliteStore(Path(sys.argv[1]), clock=clock, ids=ids, aging_seconds=aging))
    await kit.open()
    async def client():
        while True:
            workflow = await kit.submit()
            sys.stdout.write(workflow.id + "\\n")
            sys.stdout.flush()
    await asyncio.gather(*(client() for _ in range(16)))

asyncio.run(main())
"""


@pytest.fixture
def acknowledged(tmp_path: Path) -> set[str]:
    """The ids that a service told its clients before it was killed in the middle of its work."""
    child = subprocess.Popen([sys.executable, "-c", SUBMITTING, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    assert child.stdout is not None
    lines = [child.stdout.readline() for _ in range(300)]
    child.send_signal(signal.SIGKILL)
    lines += child.stdout.readlines()
    child.stdout.close()
    assert child.wait(10) == -signal.SIGKILL
    return {line.decode().strip() for line in lines if line.endswith(b"\n")}


async def test_what_was_acknowledged_survives_a_kill(tmp_path: Path, acknowledged: set[str]) -> None:
    assert len(acknowledged) >= 300
    store = make(tmp_path)
    await store.open(lambda _: None)
    there = {frame.workflow_id for frame in await store.events_after(0, 10**6)}
    assert acknowledged <= there
    assert all(store.position(workflow_id) is not None for workflow_id in acknowledged)
    assert store.counts().length == len(there)
    await store.close()


FULL_DISK = """
import asyncio, resource, sys
from pathlib import Path
from managers.errors import StoreUnavailable
from managers.workflows.sqlite_store import SqliteStore
from tests.store_kit import Kit

async def main():
    kit = Kit(lambda clock, ids, aging: SqliteStore(Path(sys.argv[1]), clock=clock, ids=ids, aging_seconds=aging))
    await kit.open()
    ids = [(await kit.submit()).id for _ in range(3)]
    claimed = await kit.claim("p")
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
    failed = 0
    while not failed:
        new = [kit.new() for _ in range(20)]
        results = await asyncio.gather(*map(kit.store.submit, new), return_exceptions=True)
        failed = sum(isinstance(result, StoreUnavailable) for result in results)
        ids += [result.workflow.id for result in results if not isinstance(result, BaseException)]
    calls = (kit.store.cancel(ids[1], 1), kit.store.start("p", 1), kit.store.withdraw("p", 1),
             kit.store.claim(backend="a", pools=["local"], prompt_id="q", now=1), kit.store.set_paused(True))
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(result, StoreUnavailable) for result in results), results
    assert len(kit.heard) == len(ids) == kit.store.counts().length
    assert kit.store.last_seq == len(ids) == (await kit.store.snapshot(None)).seq
    assert [kit.store.position(one) for one in ids] == list(range(len(ids)))
    assert (await kit.store.get(ids[1])).status == "queued"
    assert not kit.store.counts().paused
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    last = await kit.store.submit(kit.new())
    assert last.queue_position == len(ids)
    assert kit.heard[-1][0].seq == len(ids) + 1
    assert (await kit.claim("r")).workflow.id == ids[1]
    await kit.store.close()
    print("went on after", failed, results[0])

asyncio.run(main())
"""


def test_a_full_disk_fails_what_it_must_and_nothing_else(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "went on after 20 The disk" in done.stdout
