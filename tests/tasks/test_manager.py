"""The manager of tasks without a service around it: its end, what it finds again, what it forgets."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import psutil
import pytest

from managers.clock import SystemClock, new_id
from managers.errors import Conflict, Unavailable
from managers.processes.logs import Line
from managers.processes.manager import Order, ProcessManager, TasksConfig
from managers.processes.providers import Provider
from managers.processes.records import Records, Task, TaskStatus
from tests.tasks.kit import FOREVER, SECONDS, Gate, Watched

STUBBORN = "import signal; signal.signal(15, signal.SIG_IGN); print('ready'); signal.pause()"
DAY_MS = 86_400_000


class Clock(SystemClock):
    """Some days ahead."""

    def __init__(self, days: int) -> None:
        self._ahead = days * DAY_MS

    def now_ms(self) -> int:
        return super().now_ms() + self._ahead


@asynccontextmanager
async def opened(folder: Path, *, days: int = 0, grace_seconds: float = 0.3) -> AsyncIterator[ProcessManager]:
    """One with a provider `python`, closed at the end: its tasks go on."""
    provider = Provider(argv=(sys.executable, "-I", "-S", "-u", "-c", "{task}", "{task_dir}"))
    config = TasksConfig(
        folder=folder,
        providers={"python": provider},
        environ={"PATH": os.environ["PATH"]},
        grace_seconds=grace_seconds,
    )
    manager = ProcessManager(config, clock=Clock(days), new_id=new_id)
    await manager.open()
    try:
        yield manager
    finally:
        await manager.aclose()


async def start(manager: ProcessManager, program: str) -> Task:
    return await manager.start(Order(agent="tester", task=program, provider="python"))


async def until(manager: ProcessManager, task_id: str, line: str) -> None:
    """It has said this."""
    async with asyncio.timeout(SECONDS):
        async for told in manager.follow(task_id):
            assert isinstance(told, list), f"it ended before {line!r}"
            if any(one.text == line for one in told):
                return


async def ended(manager: ProcessManager, task_id: str) -> tuple[Task, list[Line]]:
    """What became of it, and all its lines."""
    lines: list[Line] = []
    async with asyncio.timeout(SECONDS):
        async for told in manager.follow(task_id):
            if isinstance(told, list):
                lines += told
            elif isinstance(told, Task):
                return told, lines
    raise AssertionError("it has no end")


def supervisor_of(folder: Path, task_id: str) -> psutil.Process:
    """The process that watches over it."""
    return next(
        process
        for process in psutil.process_iter(["cmdline"])
        if (process.info["cmdline"] or [""])[-1] == str(folder / task_id) and process.status() != psutil.STATUS_ZOMBIE
    )


async def test_who_does_not_listen_is_killed(tmp_path: Path) -> None:
    async with opened(tmp_path) as manager:
        task = await start(manager, STUBBORN)
        await until(manager, task.id, "ready")
        assert (await manager.stop(task.id)).status is TaskStatus.STOPPED
        with pytest.raises(Conflict):
            await manager.stop(task.id)
        after, _ = await ended(manager, task.id)
    assert (after.status, after.exit_code) == (TaskStatus.STOPPED, None)
    assert after.exit_time is not None


async def test_the_kill_comes_even_when_the_service_is_gone(tmp_path: Path) -> None:
    async with opened(tmp_path) as manager:
        task = await start(manager, "import os; print(os.getpid());" + STUBBORN)
        await until(manager, task.id, "ready")
        program = Watched(int((await manager.get(task.id))[1].splitlines()[0]))
        await manager.stop(task.id)
    assert await program.gone()
    async with opened(tmp_path) as manager:
        after, _ = await ended(manager, task.id)
    assert after.status is TaskStatus.STOPPED


async def test_tasks_go_on_and_are_found_again(tmp_path: Path) -> None:
    """One that runs on, one that ends meanwhile; each end is told once."""
    gate, done = Gate(tmp_path / "gate"), Gate(tmp_path / "done")
    told: list[tuple[str, TaskStatus]] = []
    async with opened(tmp_path / "tasks") as manager:
        manager.listen(lambda task: told.append((task.id, task.status)))
        short = await start(
            manager, f"print('before'); {gate.wait}; print('after'); {done.wait}; raise SystemExit(4)"
        )
        long = await start(manager, FOREVER)
        await until(manager, short.id, "before")
        await until(manager, long.id, "ready")
        program = supervisor_of(tmp_path / "tasks", short.id).children()[0]
        watched = Watched(program.pid)
    assert told == []
    await gate.open()
    await done.open()
    assert await watched.gone()

    async with opened(tmp_path / "tasks") as manager:
        manager.listen(lambda task: told.append((task.id, task.status)))
        after, lines = await ended(manager, short.id)
        assert (after.status, after.exit_code, after.error) == (TaskStatus.FAILED, 4, "It ended with status 4")
        assert [line.text for line in lines] == ["before", "after"]
        assert [task.id for task in manager.active()] == [long.id]
        assert manager.active_count == 1
        await manager.stop(long.id)
        await ended(manager, long.id)
    async with opened(tmp_path / "tasks") as manager:
        manager.listen(lambda task: told.append((task.id, task.status)))
        assert (await manager.get(short.id))[0] == after
        assert manager.active() == []
    assert told == [(short.id, TaskStatus.FAILED), (long.id, TaskStatus.STOPPED)]


async def test_a_task_whose_supervisor_is_killed(tmp_path: Path) -> None:
    """It cannot be followed any more, so it does not live on unseen."""
    async with opened(tmp_path) as manager:
        task = await start(manager, "import os; print(os.getpid());" + FOREVER)
        await until(manager, task.id, "ready")
        program = Watched(int((await manager.get(task.id))[1].splitlines()[0]))
        supervisor_of(tmp_path, task.id).kill()
        after, _ = await ended(manager, task.id)
        assert await program.gone()
        assert (after.status, after.exit_time) == (TaskStatus.FAILED, None)
        assert after.error is not None
        assert "Nobody saw its end" in after.error
        assert manager.duration_ms(after) is None
    async with opened(tmp_path) as manager:
        assert (await manager.get(task.id))[0] == after


async def test_a_supervisor_ends_its_task_when_it_is_asked_to(tmp_path: Path) -> None:
    """SIGTERM to it, as by an operator: nobody said in our name that the task is stopped."""
    async with opened(tmp_path) as manager:
        task = await start(manager, FOREVER)
        await until(manager, task.id, "ready")
        supervisor_of(tmp_path, task.id).send_signal(signal.SIGTERM)
        after, _ = await ended(manager, task.id)
    assert (after.status, after.error) == (TaskStatus.FAILED, "It was told to stop")


async def test_a_record_whose_program_was_never_started(tmp_path: Path) -> None:
    """We died between the two."""
    task = Task(id=new_id(), agent="a", task="b", provider="python", start_time=SystemClock().now_ms())
    Records(tmp_path).create(task)
    async with opened(tmp_path) as manager:
        found, tail = await manager.get(task.id)
    assert (found.status, found.settled, tail) == (TaskStatus.FAILED, True, "")


async def test_a_pid_in_use_again_is_mistaken_for_nothing(tmp_path: Path) -> None:
    """There are no pids: what a dead supervisor leaves behind is a pipe without a writer."""
    async with opened(tmp_path) as manager:
        task = await start(manager, FOREVER)
        await until(manager, task.id, "ready")
        supervisor = supervisor_of(tmp_path, task.id)
        watched = Watched(supervisor.pid)
    supervisor.kill()
    assert await watched.gone()
    async with opened(tmp_path) as manager:
        after, _ = await ended(manager, task.id)
        with pytest.raises(Conflict):
            await manager.stop(task.id)
    assert after.status is TaskStatus.FAILED


async def test_what_ended_long_ago_is_forgotten(tmp_path: Path) -> None:
    """But never what a task left in its folder, nor what runs."""
    async with opened(tmp_path) as manager:
        plain = await start(manager, "print('x')")
        fruitful = await start(manager, "open('result.txt', 'w').write('x')")
        running = await start(manager, FOREVER)
        for task in (plain, fruitful):
            await ended(manager, task.id)
        work, _ = manager.paths(fruitful.id)
    async with opened(tmp_path, days=29) as manager:
        assert len(await manager.newest(10)) == 3
    async with opened(tmp_path, days=31) as manager:
        await manager.forget_old()
        assert [task.id for task in await manager.newest(10)] == [running.id]
        assert not (tmp_path / plain.id).exists()
        assert [path.name for path in (tmp_path / fruitful.id).iterdir()] == ["work"]
        assert (work / "result.txt").read_text() == "x"
        await manager.stop(running.id)
        await ended(manager, running.id)


async def test_a_record_that_cannot_be_read_hides_no_other(tmp_path: Path) -> None:
    async with opened(tmp_path) as manager:
        good = await start(manager, "pass")
        bad = await start(manager, "pass")
        for task in (good, bad):
            await ended(manager, task.id)
        (tmp_path / bad.id / "task.json").write_bytes(b"{")
        assert [task.id for task in await manager.newest(10)] == [good.id]
    async with opened(tmp_path):
        pass


async def test_the_folder_must_be_usable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable, match="cannot be used"):
        async with opened(tmp_path / "file" / "tasks"):
            pass


async def test_a_working_directory_that_is_not_there(tmp_path: Path) -> None:
    provider = Provider(argv=(sys.executable, "-c", "pass"), directory=str(tmp_path / "nowhere"))
    config = TasksConfig(folder=tmp_path / "tasks", providers={"p": provider}, environ={"PATH": os.environ["PATH"]})
    manager = ProcessManager(config, clock=SystemClock(), new_id=new_id)
    await manager.open()
    task = await manager.start(Order(agent="a", task="b", provider="p"))
    after, _ = await ended(manager, task.id)
    await manager.aclose()
    assert after.status is TaskStatus.FAILED
    assert after.error is not None
    assert after.error.startswith("It could not be started")


async def test_records_are_private(tmp_path: Path) -> None:
    async with opened(tmp_path / "tasks") as manager:
        task = await start(manager, "pass")
        await ended(manager, task.id)
        folder = tmp_path / "tasks" / task.id
        assert msgspec.json.decode((folder / "task.json").read_bytes())["settled"] is True
        for path in (tmp_path / "tasks", folder, folder / "work"):
            assert path.stat().st_mode & 0o077 == 0, path
