"""What disks, files and other programs do to the store, and how the service takes it: nothing is lost or invented."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from managers.errors import StoreUnavailable
from managers.workflows.model import Filter, Status
from managers.workflows.sqlite_schema import FILE_NAME, MIGRATIONS, examine
from managers.workflows.sqlite_store import SqliteStore
from tests.program import PROGRAM, environment, run
from tests.queue_kit import PATIENCE, Comfy, Queue, comfy, picture, sleeper
from tests.serving import KEY
from tests.store_kit import Kit, ManualClock, numbered_ids

ROOT = Path(__file__).parent.parent
LOG = f"{FILE_NAME}-wal"


def make(folder: Path, migrations: Sequence[str] = MIGRATIONS) -> SqliteStore:
    return SqliteStore(folder, clock=ManualClock(), ids=numbered_ids(), aging_seconds=600, migrations=migrations)


async def filled(folder: Path, count: int = 100) -> list[str]:
    """The ids in a store that was closed in order."""
    kit = Kit(lambda clock, ids, aging: SqliteStore(folder, clock=clock, ids=ids, aging_seconds=aging))
    await kit.open()
    found = await asyncio.gather(
        *(kit.submit(graph=b'{"1":"%s"}' % os.urandom(400).hex().encode()) for _ in range(count))
    )
    await kit.store.close()
    return [one.id for one in found]


def content(folder: Path) -> dict[str, bytes]:
    """The file and its log, byte for byte; an empty log is none."""
    found = {name: folder / name for name in (FILE_NAME, LOG)}
    return {name: path.read_bytes() for name, path in found.items() if path.exists() and path.stat().st_size}


def copies(folder: Path) -> list[str]:
    """The names of what was kept of older schemas."""
    return sorted(path.name for path in folder.glob("*.schema-*"))


async def refused(folder: Path, words: str) -> str:
    """The start is refused in these words, and what was there is as it was."""
    before = content(folder)
    with pytest.raises(StoreUnavailable, match=words) as caught:
        await make(folder).open(lambda _: None)
    assert content(folder) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- a damaged file


async def test_one_bad_page_in_the_middle(tmp_path: Path) -> None:
    await filled(tmp_path)
    path = tmp_path / FILE_NAME
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 4096 // 2 * 4096)
        file.write(os.urandom(4096))
    told = await refused(tmp_path, "damaged")
    assert str(path) in told
    assert re.search(r"move it away together with its -wal and -shm.*management-api backup", told)


@pytest.mark.parametrize("cut", [1, 2000, 4096, 40_000])
async def test_an_end_that_is_torn_off(tmp_path: Path, cut: int) -> None:
    await filled(tmp_path)
    os.truncate(tmp_path / FILE_NAME, (tmp_path / FILE_NAME).stat().st_size - cut)
    await refused(tmp_path, "damaged")


async def test_the_service_says_it_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    await filled(tmp_path / "data")
    path = tmp_path / "data" / FILE_NAME
    path.write_bytes(path.read_bytes()[:10_000])
    before = content(tmp_path / "data")
    ended = await asyncio.to_thread(run, tmp_path, "serve")
    assert ended.status == 1
    assert len(ended.lines) == 1, ended.err
    assert str(path) in ended.lines[0]
    assert "damaged" in ended.lines[0]
    assert content(tmp_path / "data") == before


async def test_the_way_out_it_names_works(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    ids = await filled(data)
    assert (await asyncio.to_thread(run, tmp_path, "backup", str(tmp_path / "copy"))).status == 0
    (data / FILE_NAME).write_bytes(b"damaged " * 1000)
    await refused(data, "damaged")
    (data / FILE_NAME).rename(tmp_path / "aside")
    shutil.copy(tmp_path / "copy", data / FILE_NAME)
    store = make(data)
    await store.open(lambda _: None)
    assert [store.position(one) for one in ids] == list(range(len(ids)))
    await store.close()


async def test_looking_for_damage_has_an_end(tmp_path: Path) -> None:
    """What a look in time would find is not found without time; the file is opened all the same."""
    await filled(tmp_path)
    path = tmp_path / FILE_NAME
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE ballast (data)")
        connection.executemany("INSERT INTO ballast VALUES (?)", ((os.urandom(1000),) for _ in range(60_000)))
    with path.open("r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(b"\xff" * 4096)
    with pytest.raises(StoreUnavailable, match="damaged"):
        examine(path)
    assert any(cut_short(path) for _ in range(50))  # a busy machine may be late to stop it


def cut_short(path: Path) -> bool:
    try:
        return examine(path, check_seconds=0.0001) == len(MIGRATIONS)
    except StoreUnavailable:
        return False


# ---- a log that a crash has left

SUBMITTING = """
import asyncio, sys
from pathlib import Path
from managers.workflows.sqlite_store import SqliteStore
from tests.serving import KEY
from tests.store_kit import Kit

async def main():
    kit = Kit(lambda clock, ids, aging: SqliteStore(Path(sys.argv[1]), clock=clock, ids=ids, aging_seconds=aging))
    await kit.open()
    while True:
        sys.stdout.write((await kit.submit()).id + "\\n")
        sys.stdout.flush()

asyncio.run(main())
"""


@pytest.fixture
def crashed(tmp_path: Path) -> list[str]:
    """What was acknowledged before a kill; it lies in the log only."""
    child = subprocess.Popen([sys.executable, "-c", SUBMITTING, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    assert child.stdout is not None
    ids = [child.stdout.readline().decode().strip() for _ in range(60)]
    child.send_signal(signal.SIGKILL)
    ids += [line.decode().strip() for line in child.stdout.readlines() if line.endswith(b"\n")]
    child.stdout.close()
    assert child.wait(10) == -signal.SIGKILL
    assert (tmp_path / LOG).stat().st_size > 100_000
    return ids


async def there(folder: Path) -> list[str]:
    """Who waits, in order; the log of events agrees."""
    store = make(folder)
    await store.open(lambda _: None)
    page = await store.list(Filter(limit=1000))
    ids = [one.id for one in page.workflows[::-1]]
    assert [store.position(one) for one in ids] == list(range(len(ids)))
    assert [frame.workflow_id for frame in await store.events_after(0, 10**6)] == ids
    await store.close()
    return ids


async def test_it_is_read_whole(tmp_path: Path, crashed: list[str]) -> None:
    assert (await there(tmp_path))[: len(crashed)] == crashed


@pytest.mark.parametrize("damage", ["cut", "zeros", "noise"])
async def test_a_torn_last_page_of_it_costs_the_last_commit_only(
    tmp_path: Path, crashed: list[str], damage: str
) -> None:
    """As after a power failure in the middle of a write: what had not been synced yet is no commit."""
    whole = tmp_path / "whole"
    whole.mkdir()
    for name in (FILE_NAME, LOG):
        shutil.copy(tmp_path / name, whole / name)
    log = tmp_path / LOG
    os.truncate(log, log.stat().st_size - 2000)
    if damage != "cut":
        with log.open("ab") as file:
            file.write(bytes(2000) if damage == "zeros" else os.urandom(2000))
    left, before = await there(tmp_path), await there(whole)
    assert len(before) - 2 <= len(left) < len(before) + 1
    assert left == before[: len(left)]


async def test_with_a_damaged_file_both_are_left_alone(tmp_path: Path, crashed: list[str]) -> None:
    with (tmp_path / FILE_NAME).open("r+b") as file:
        file.write(b"no database at all")
    os.truncate(tmp_path / LOG, 0)
    await refused(tmp_path, "damaged")


async def test_without_its_file_it_is_not_thrown_away(tmp_path: Path, crashed: list[str]) -> None:
    (tmp_path / FILE_NAME).rename(tmp_path / "aside")
    assert LOG in await refused(tmp_path, "without its file")
    (tmp_path / "aside").rename(tmp_path / FILE_NAME)
    assert (await there(tmp_path))[: len(crashed)] == crashed


async def test_a_newer_schema_in_it_is_seen(tmp_path: Path, crashed: list[str]) -> None:
    other = sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)
    other.execute("PRAGMA user_version = 99")  # in the log, as long as it is open
    await refused(tmp_path, "newer version.*schema 99")
    other.close()


# ---- an older schema

ONE_MORE = (*MIGRATIONS, "ALTER TABLE workflow ADD COLUMN mood TEXT; UPDATE workflow SET mood = 'calm';")


def ask(path: Path, question: str) -> list[Any]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return connection.execute(question).fetchall()


async def test_it_is_copied_and_then_brought_up_to_date(tmp_path: Path) -> None:
    ids = await filled(tmp_path)
    store = make(tmp_path, ONE_MORE)
    await store.open(lambda _: None)
    assert [store.position(one) for one in ids] == list(range(len(ids)))
    await store.close()
    assert ask(tmp_path / FILE_NAME, "SELECT DISTINCT mood FROM workflow") == [("calm",)]
    assert ask(tmp_path / FILE_NAME, "PRAGMA user_version") == [(len(ONE_MORE),)]
    copy = tmp_path / f"{FILE_NAME}.schema-{len(MIGRATIONS)}"
    # Back to the version before, as an operator would do it.
    (tmp_path / "old").mkdir()
    shutil.copy(copy, tmp_path / "old" / FILE_NAME)
    assert await there(tmp_path / "old") == ids
    # Once is enough; and another copy never replaces the first.
    await make_and_close(tmp_path, ONE_MORE)
    assert copies(tmp_path) == [copy.name]
    shutil.copy(copy, tmp_path / FILE_NAME)
    await make_and_close(tmp_path, ONE_MORE)
    assert copies(tmp_path) == [copy.name, f"{copy.name}.2"]


async def make_and_close(folder: Path, migrations: Sequence[str]) -> None:
    store = make(folder, migrations)
    await store.open(lambda _: None)
    await store.close()


async def test_a_step_that_fails_changes_nothing_and_leaves_no_copies(tmp_path: Path) -> None:
    ids = await filled(tmp_path)
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="no such table"):
            await make(tmp_path, (*ONE_MORE, "DROP TABLE nowhere;")).open(lambda _: None)
    assert ask(tmp_path / FILE_NAME, "PRAGMA user_version") == [(len(MIGRATIONS),)]
    assert "mood" not in {column[1] for column in ask(tmp_path / FILE_NAME, "PRAGMA table_info(workflow)")}
    assert not copies(tmp_path)
    assert await there(tmp_path) == ids


async def test_a_new_file_needs_no_copy(tmp_path: Path) -> None:
    await make_and_close(tmp_path, ONE_MORE)
    assert not copies(tmp_path)
    assert ask(tmp_path / FILE_NAME, "PRAGMA auto_vacuum") == [(2,)]


# ---- a file that may not be written

OBEDIENT = """
import ctypes, os, sys
for capability in (1, 2):  # even root obeys the modes of its files without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.parametrize("what", ["file", "folder", "lock"])
async def test_a_start_that_may_not_write_is_refused(tmp_path: Path, what: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    await filled(data)
    path = {"file": data / FILE_NAME, "folder": data, "lock": data / "lock"}[what]
    if what == "folder":
        (data / "lock").unlink()
    path.chmod(0o555 if what == "folder" else 0o444)
    before = content(data)
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", OBEDIENT, *PROGRAM, "serve"],
        cwd=tmp_path, env=environment(tmp_path, PYTHONPATH=str(ROOT)), capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    path.chmod(0o755)
    lines = done.stderr.splitlines()
    assert (done.returncode, len(lines)) == (1, 1), done.stderr
    assert str(data) in lines[0]
    assert re.search("cannot be (used|written)", lines[0])
    assert content(data) == before


# ---- somebody else's lock


async def test_a_foreign_program_holds_it_for_a_while(tmp_path: Path) -> None:
    kit = Kit(lambda clock, ids, aging: SqliteStore(tmp_path, clock=clock, ids=ids, aging_seconds=aging))
    await kit.open()
    store = kit.store
    assert isinstance(store, SqliteStore)
    assert store._house is not None
    store._house.connection.execute("PRAGMA busy_timeout = 50")  # 5 s in earnest
    await kit.submit()
    with contextlib.closing(sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable, match="Another program has locked"):
            await kit.submit()
        with pytest.raises(StoreUnavailable, match="Another program has locked"):
            await store.check()
        assert len((await store.list(Filter())).workflows) == 1
        other.execute("ROLLBACK")
    await store.check()
    assert (await kit.submit()).number == 2
    assert [event.seq for event, _ in kit.heard] == [1, 2]
    await store.close()


# ---- a full disk under a running service


class Disk:
    """The data folder of a service that can be filled up from outside. One on which files cannot grow beyond a size
    is had everywhere; a small file system needs the right to mount."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.data = folder / "data"
        self.data.mkdir()
        self.kind = kind
        self.pid = 0
        self._mount = f'mount -t tmpfs -o size=4m none "{self.data}" && exec "$0" "$@"'

    @property
    def wrapper(self) -> list[str]:
        return ["unshare", "-Urm", "sh", "-c", self._mount] if self.kind == "tmpfs" else []

    def possible(self) -> bool:
        if self.kind == "limit":
            return True
        try:
            return (
                subprocess.run([*self.wrapper, "true"], check=False, capture_output=True, timeout=10).returncode == 0
            )
        except FileNotFoundError:
            return False

    @property
    def _ballast(self) -> Path:
        return Path(f"/proc/{self.pid}/root{self.data}/ballast")

    def fill(self) -> None:
        if self.kind == "limit":
            hard = resource.prlimit(self.pid, resource.RLIMIT_FSIZE)[1]
            resource.prlimit(self.pid, resource.RLIMIT_FSIZE, ((self.data / LOG).stat().st_size, hard))
            return
        with self._ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass

    def free(self) -> None:
        if self.kind == "limit":
            hard = resource.prlimit(self.pid, resource.RLIMIT_FSIZE)[1]
            resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (hard, hard))
            return
        self._ballast.unlink()


@pytest.fixture
def simulator(tmp_path: Path) -> Iterator[Comfy]:
    with comfy(tmp_path / "comfyui") as process:
        yield process


@pytest.fixture(params=["limit", "tmpfs"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Disk:
    disk = Disk(tmp_path, request.param)
    if not disk.possible():
        pytest.skip("no right to mount a small file system")
    return disk


@contextlib.asynccontextmanager
async def service(folder: Path, simulator: Comfy, disk: Disk) -> AsyncIterator[Queue]:
    """`management-api serve` on this disk."""
    log = folder / "service.log"
    with log.open("w") as stderr:
        process = await asyncio.to_thread(
            subprocess.Popen,
            [*disk.wrapper, *PROGRAM, "serve"],
            cwd=folder,
            env=environment(
                folder,
                COMFYUI_URL=simulator.url,
                PYTHONPATH=str(ROOT),
                LOG_FORMAT="json",
                MANAGEMENT_API_KEY=KEY,
            ),
            stderr=stderr,
        )
    try:
        async with asyncio.timeout(PATIENCE):
            while not (ready := re.search(r'"url":"(http[^"]*)"', log.read_text())):
                assert process.poll() is None, log.read_text()
                await asyncio.sleep(0.05)
        disk.pid = process.pid
        async with httpx.AsyncClient(
            base_url=ready[1], headers={"X-API-Key": KEY}, timeout=20, trust_env=False
        ) as client:
            yield Queue(client, ready[1])
        assert process.poll() is None
    finally:
        process.kill()
        process.wait(10)


async def test_a_full_disk_is_told_and_survived(tmp_path: Path, simulator: Comfy, disk: Disk) -> None:
    async with service(tmp_path, simulator, disk) as queue, queue.stream("workflow") as stream:
        await queue.connected()
        accepted = [await queue.submit(sleeper(steps=10)), await queue.submit(picture())]
        await queue.started(accepted[0])
        ready = await queue.client.get("/ready")
        assert (ready.status_code, ready.json()["checks"]["store"]) == (200, "ok")
        disk.fill()
        for _ in range(100):  # what was set aside for the log may still take some
            reply = await queue.post(picture())
            if reply.status_code != 202:
                break
            accepted.append(reply.json()["workflowId"])
        assert reply.status_code == 503
        assert int(reply.headers["retry-after"]) > 0
        assert reply.json()["retryAfter"] > 0
        assert "disk" in reply.json()["detail"]
        assert "/" not in reply.json()["detail"]
        ready = await queue.client.get("/ready")
        assert (ready.status_code, ready.json()["checks"]["store"]) == (503, "failing")
        assert (await queue.client.get("/health")).status_code == 200
        # ComfyUI ends what it has; the verdict cannot be written, so nobody is told of it.
        await simulator.until_queue(lambda running, pending: not running and not pending)
        assert (await queue.post(picture())).status_code == 503
        assert (await queue.get(accepted[0]))["status"] == Status.RUNNING
        assert {frame["type"] for frame in await stream.settled()} <= {
            "subscribed", "pong", "workflow:queued", "workflow:started", "workflow:progress",
        }  # fmt: skip
        disk.free()
        ready = await queue.client.get("/ready")
        assert (ready.status_code, ready.json()["checks"]["store"]) == (200, "ok")
        accepted.append(await queue.submit(picture()))
        for one in accepted:
            assert (await queue.ended(one))["status"] == "completed"
            assert [state for _, state in await queue.attempts(one)] == ["ended"]
        assert await simulator.posts() == len(accepted)
        assert len((await queue.list(limit=1000))["workflows"]) == len(accepted)
        await stream.until("workflow:completed", workflowId=accepted[-1])
        told = [frame["seq"] for frame in await stream.settled() if "seq" in frame and frame["type"] != "subscribed"]
        async with queue.stream("workflow", since=0) as again:
            await again.until("workflow:completed", workflowId=accepted[-1])
            stored = [
                frame["seq"] for frame in await again.settled() if "seq" in frame and frame["type"] != "subscribed"
            ]
        assert told == stored
