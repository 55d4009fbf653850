"""The tasks (CONTRACT 7): start one, look, follow its log, stop it, find it again after a restart of the service.

The verdict of a stop is on disk before the first signal, and never changes. Must never know of HTTP, nor read what a
task wrote into its folder.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from itertools import islice
from pathlib import Path

import msgspec
import structlog
from msgspec import Struct

from managers.clock import Clock, IdMaker
from managers.errors import Conflict, Draining, InvalidRequest, NotFound, Unavailable
from managers.events.types import Finding
from managers.processes import logs
from managers.processes.following import Gap, read_on
from managers.processes.logs import Line
from managers.processes.providers import DEFAULT, Provider, environment, fill
from managers.processes.records import Records, Task, TaskStatus, judged
from managers.processes.supervised import Supervised
from managers.processes.supervisor import Plan

log = structlog.get_logger(__name__)

_DAY_MS = 86_400_000
_SWEEP_SECONDS = 3600
_BUSY_SECONDS = 10


class TasksConfig(Struct, frozen=True, kw_only=True):
    """`folder` is ours alone. `environ` is what programs may get a part of, never what is `withheld`.

    `retention_days` 0 is for ever; `grace_seconds` are between SIGTERM and SIGKILL.
    """

    folder: Path
    providers: Mapping[str, Provider]
    environ: Mapping[str, str]
    withheld: frozenset[str] = frozenset()
    retention_days: int = 30
    grace_seconds: float = 10


class Order(Struct, frozen=True, kw_only=True):
    """What a client wants done."""

    agent: str
    task: str
    provider: str = DEFAULT
    submitted_by: str | None = None


class _Live:
    """A task whose end has not been settled."""

    def __init__(self, task: Task, program: Supervised) -> None:
        self.task = task
        self.program = program
        self.lock = asyncio.Lock()
        """Between a stop and the end: one of them is first."""


class ProcessManager:
    """`open` it before the first call, `aclose` it last: tasks go on without us."""

    def __init__(self, config: TasksConfig, *, clock: Clock, new_id: IdMaker) -> None:
        self._config = config
        self._clock = clock
        self._new_id = new_id
        self._records = Records(config.folder)
        self._live: dict[str, _Live] = {}
        self._starting: Counter[str] = Counter()
        self._listeners: list[Callable[[Task], None]] = []
        self._work: set[asyncio.Task[None]] = set()
        self._draining = False
        self._sweeping = asyncio.Lock()

    # ---- its life

    async def open(self) -> None:
        """Find the tasks that were running. Raises `Unavailable` when the folder cannot be used."""
        try:
            await asyncio.to_thread(self._config.folder.mkdir, mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise Unavailable(
                f"The folder of tasks {self._config.folder} cannot be used: {error.strerror}"
            ) from error
        for task in await asyncio.to_thread(self._unsettled):
            try:
                program = await Supervised.find(self._records.folder(task.id))
            except OSError:  # we died before it was started
                await asyncio.to_thread(self._records.write, judged(task, None))
            else:
                self._attend(_Live(task, program))
        self._spawn(self._sweep())

    def drain(self) -> None:
        """Start no more; who follows a log is sent away, and can go on from there later."""
        self._draining = True
        for live in self._live.values():
            live.program.nudge()

    async def aclose(self) -> None:
        """Let go of the tasks; they run on."""
        self.drain()
        for work in self._work:
            work.cancel()
        await asyncio.gather(*self._work, return_exceptions=True)
        for live in self._live.values():
            live.program.close()

    # ---- start and stop

    async def start(self, order: Order) -> Task:
        """Begin one. Raises `InvalidRequest`, `Unavailable`, `Draining`."""
        if self._draining:
            raise Draining("The service is about to stop and takes no new task")
        name, provider = order.provider, self._provider(order.provider)
        running = sum(live.task.provider == name for live in self._live.values()) + self._starting[name]
        if running >= provider.max_concurrent:
            raise Unavailable(f"{running} tasks of {name} run, which is all it may have", _BUSY_SECONDS)
        self._starting[name] += 1
        try:
            return await self._start(order, provider)
        except OSError as error:
            raise Unavailable(f"The task cannot be started: {error.strerror}") from error
        finally:
            self._starting[name] -= 1

    async def _start(self, order: Order, provider: Provider) -> Task:
        task_id = self._new_id()
        work = self._records.work(task_id)
        words = {"agent": order.agent, "task": order.task, "task_id": task_id, "task_dir": str(work)}
        command = provider.command(words)
        environ = environment(provider, self._config.environ, self._config.withheld)
        if await asyncio.to_thread(provider.executable, environ) is None:
            raise Unavailable(f"The program of {order.provider}, {provider.argv[0]!r}, is not installed", 60)
        task = Task(
            id=task_id,
            agent=order.agent,
            task=order.task,
            provider=order.provider,
            start_time=self._clock.now_ms(),
            submitted_by=order.submitted_by,
        )
        await asyncio.to_thread(self._records.create, task)
        plan = Plan(
            argv=list(command),
            directory=fill(provider.directory, words),
            log_bytes=provider.max_log_bytes,
            timeout_seconds=provider.timeout_seconds,
            grace_seconds=self._config.grace_seconds,
        )
        try:
            program = await Supervised.start(self._records.folder(task_id), plan, {**environ, "TASK_ID": task_id})
        except OSError:
            await asyncio.to_thread(self._records.discard, task_id)
            raise
        log.info("task started", task=task_id, provider=order.provider, key=order.submitted_by)
        self._attend(_Live(task, program))
        return task

    async def stop(self, task_id: str) -> Task:
        """Stop it. Raises `NotFound`, `Conflict` when it does not run any more, `Unavailable`."""
        live = self._live.get(task_id)
        if live is None:
            task = await self._recorded(task_id)
            raise Conflict(f"Task {task_id} is {task.status} already", task.status)
        async with live.lock:
            await self._settle_if_ended(live)
            if live.task.status is not TaskStatus.RUNNING:
                raise Conflict(f"Task {task_id} is {live.task.status} already", live.task.status)
            stopped = msgspec.structs.replace(live.task, status=TaskStatus.STOPPED)
            await self._write(stopped)
            live.task = stopped
        await live.program.stop()
        log.info("task stopped", task=task_id)
        return stopped

    async def forget_old(self) -> int:
        """Remove tasks that ended longer ago than they are to be kept; how many. Raises `OSError`."""
        before = self._clock.now_ms() - self._config.retention_days * _DAY_MS
        async with self._sweeping:
            return await asyncio.to_thread(self._records.forget, before)

    # ---- look

    @property
    def active_count(self) -> int:
        """How many run."""
        return sum(live.task.status is TaskStatus.RUNNING for live in self._live.values())

    def active(self) -> list[Task]:
        """Those that run, the newest first."""
        running = [live.task for live in self._live.values() if live.task.status is TaskStatus.RUNNING]
        return sorted(running, key=lambda task: task.id, reverse=True)

    async def newest(self, limit: int) -> list[Task]:
        """Those that run and those that ended, the newest first."""
        return await asyncio.to_thread(lambda: list(islice(self._records.newest_first(), limit)))

    async def get(self, task_id: str) -> tuple[Task, str]:
        """One, and the end of its log. Raises `NotFound`."""
        live = self._live.get(task_id)
        task = live.task if live is not None else await self._recorded(task_id)
        return task, await asyncio.to_thread(logs.tail, self._records.folder(task_id))

    def paths(self, task_id: str) -> tuple[Path, Path]:
        """Where it works, and its log."""
        return self._records.work(task_id), self._records.log_file(task_id)

    def duration_ms(self, task: Task) -> int | None:
        """How long it has run, or ran; None when nobody saw its end."""
        if task.settled and task.exit_time is None:
            return None
        return max(0, (task.exit_time or self._clock.now_ms()) - task.start_time)

    async def configured(self) -> dict[str, bool]:
        """Every provider, and whether its program is installed."""
        return await asyncio.to_thread(self._look_for_programs)

    async def follow(self, task_id: str, after: int = 0) -> AsyncGenerator[list[Line] | Gap | Task, None]:
        """Each whole line of its log once, from this offset on; at the end the task. Raises `NotFound`.

        It ends without the task when the service stops.
        """
        live = self._live.get(task_id)
        if live is None:
            task = await self._recorded(task_id)
            async with aclosing(read_on(self._records.folder(task_id), after)) as lines:
                async for told in lines:
                    yield told
        else:
            program = live.program
            async with aclosing(read_on(program.folder, after, program, lambda: self._draining)) as lines:
                async for told in lines:
                    yield told
            if not live.program.ended.is_set():
                return
            async with live.lock:
                await self._settle_if_ended(live)
            task = live.task
        yield task

    # ---- who counts

    def listen(self, listener: Callable[[Task], None]) -> Callable[[], None]:
        """Hear of each task that ended, once; gives what ends the listening."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    # ---- inside

    def _provider(self, name: str) -> Provider:
        provider = self._config.providers.get(name)
        if provider is None:
            known = sorted(self._config.providers)
            message = f"There is no provider named {name[:64]!r}; known: {', '.join(known)}"
            finding = Finding(code="unknown_provider", message=message, pointer="/provider", allowed=known)
            raise InvalidRequest(message, [finding])
        return provider

    def _look_for_programs(self) -> dict[str, bool]:
        config = self._config
        return {
            name: provider.executable(environment(provider, config.environ, config.withheld)) is not None
            for name, provider in config.providers.items()
        }

    async def _recorded(self, task_id: str) -> Task:
        task = await asyncio.to_thread(self._records.read, task_id)
        if task is None:
            raise NotFound(f"Task {task_id} not found")
        return task

    def _unsettled(self) -> list[Task]:
        return [task for task in self._records.newest_first() if not task.settled]

    def _attend(self, live: _Live) -> None:
        self._live[live.task.id] = live
        self._spawn(self._until_gone(live))

    async def _until_gone(self, live: _Live) -> None:
        await live.program.ended.wait()
        async with live.lock:
            await self._settle_if_ended(live)
        await live.program.gone.wait()
        await live.program.collect()
        del self._live[live.task.id]

    async def _settle_if_ended(self, live: _Live) -> None:
        """Under its lock."""
        if live.task.settled or not live.program.ended.is_set():
            return
        live.task = judged(live.task, await live.program.outcome())
        try:
            await asyncio.to_thread(self._records.write, live.task)
        except OSError as error:  # the next start judges it again
            log.error("the end of a task cannot be stored", task=live.task.id, reason=str(error))
        log.info("task ended", task=live.task.id, status=live.task.status, exit_code=live.task.exit_code)
        for listener in self._listeners:
            listener(live.task)

    async def _write(self, task: Task) -> None:
        try:
            await asyncio.to_thread(self._records.write, task)
        except OSError as error:
            raise Unavailable(f"The task cannot be stopped, this cannot be stored: {error.strerror}") from error

    async def _sweep(self) -> None:
        while self._config.retention_days:
            try:
                forgotten = await self.forget_old()
            except OSError as error:
                log.error("old tasks cannot be removed", reason=str(error))
            else:
                if forgotten:
                    log.info("old tasks removed", count=forgotten)
            await asyncio.sleep(_SWEEP_SECONDS)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._done)

    def _done(self, work: asyncio.Task[None]) -> None:
        self._work.discard(work)
        if not work.cancelled() and work.exception() is not None:
            log.error("watching over a task failed", exc_info=work.exception())
