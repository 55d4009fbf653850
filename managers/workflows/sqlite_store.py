"""The embedded store: the port of `store.py` over one SQLite file, for one process.

One thread writes (`sqlite_writer`), a few others read on their own connections. Who waits is kept in memory twice:
the writer's line runs ahead of the disk and belongs to its thread, `_line` follows each commit and belongs to the
event loop; so nobody takes a lock, and nobody sees what is not on disk. Must never be named outside the program's
composition: everybody else knows the port.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import partial
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from managers.clock import Clock, IdMaker
from managers.errors import StoreUnavailable
from managers.events.log import StoredFrame
from managers.events.types import Cost, ErrorType, StoredEvent
from managers.workflows import (
    sqlite_durations,
    sqlite_house,
    sqlite_moves,
    sqlite_reads,
    sqlite_submit,
    sqlite_usage,
)
from managers.workflows.course import NodeTime
from managers.workflows.durations import Kind, NodeDuration
from managers.workflows.model import (
    Attempt,
    Claimed,
    Filter,
    IdempotencyKey,
    MadeFrom,
    NewWorkflow,
    Outcome,
    Page,
    Priority,
    QueueCounts,
    Submitted,
    Workflow,
)
from managers.workflows.sqlite_schema import FILE_NAME, MIGRATIONS, connect_reader
from managers.workflows.sqlite_writer import Announced, Transaction, Writer, unavailable
from managers.workflows.store import CommitListener, OutputOwner, Snapshot
from managers.workflows.usage import Usage, UsageBy
from managers.workflows.waiting import Change, Entry, Line

P = ParamSpec("P")
R = TypeVar("R")

READERS = 3
_LAST_SEQ = 2**63 - 1
_LONG = 65_536  # bytes of JSON: packing more than that would hold up the event loop
_LONG_PACKED = 16_384  # bytes of such a pack: unpacking more would


class SqliteStore:
    """The record of every workflow, in `directory`."""

    def __init__(
        self,
        directory: Path,
        *,
        clock: Clock,
        ids: IdMaker,
        aging_seconds: float,
        migrations: Sequence[str] = MIGRATIONS,
    ) -> None:
        self._directory = directory
        self._migrations = migrations
        self._path = directory / FILE_NAME
        self._clock = clock
        self._ids = ids
        self._aging_seconds = aging_seconds
        self._line = Line()
        self._last_seq = 0
        self._house: sqlite_house.House | None = None
        self._writer: Writer | None = None
        self._readers: ThreadPoolExecutor | None = None
        self._connections: list[sqlite3.Connection] = []
        self._own = threading.local()

    @property
    def commits(self) -> int:
        """How many transactions were written since `open`."""
        return self._open_writer().commits

    # ---- one workflow in, through, and out

    async def submit(
        self,
        new: NewWorkflow,
        *,
        key: IdempotencyKey | None = None,
        max_waiting: int | None = None,
        max_queued: int | None = None,
    ) -> Submitted:
        """See the port."""
        if len(new.graph) + len(new.extra_data or b"") > _LONG:
            one = await self._in_thread(sqlite_submit.submission, new, max_waiting, max_queued)
        else:
            one = sqlite_submit.submission(new, max_waiting, max_queued)
        if key is None:
            return await self._open_writer().join(sqlite_submit.submit, one)
        return await self._write(sqlite_submit.submit_once, one, key, self._clock.now_ms())

    async def first_reply(self, key: IdempotencyKey) -> Submitted | None:
        """See the port."""
        return await self._read(sqlite_submit.first_reply, key, self._clock.now_ms())

    async def claim(self, *, backend: str, pools: Collection[str], prompt_id: str, now: int) -> Claimed | None:
        """See the port."""
        claimed = await self._write(
            sqlite_moves.claim, backend=backend, pools=tuple(pools), prompt_id=prompt_id, now=now
        )
        if claimed is None:
            return None
        if len(claimed.graph) + len(claimed.extra_data or b"") > _LONG_PACKED:
            return await self._in_thread(sqlite_moves.unpacked, claimed)
        return sqlite_moves.unpacked(claimed)

    async def start(self, prompt_id: str, start_time: int) -> Workflow | None:
        """See the port."""
        now = self._clock.now_ms()
        return await self._open_writer().run(
            lambda transaction: sqlite_moves.start(transaction, prompt_id, start_time, now), patient=True
        )

    async def finish(self, prompt_id: str, outcome: Outcome) -> Workflow | None:
        """See the port."""
        return await self._write(sqlite_moves.finish, prompt_id, outcome, self._clock.now_ms())

    async def lose(
        self,
        prompt_id: str,
        *,
        error: str,
        error_type: ErrorType,
        now: int,
        retry: bool,
        died: bool = False,
        cost: Cost | None = None,
    ) -> Workflow | None:
        """See the port."""
        return await self._write(
            sqlite_moves.lose,
            prompt_id,
            error=error,
            error_type=error_type,
            now=now,
            retry=retry,
            died=died,
            cost=cost,
        )

    async def withdraw(self, prompt_id: str, now: int) -> Workflow | None:
        """See the port."""
        return await self._write(sqlite_moves.withdraw, prompt_id, now)

    async def cancel(self, workflow_id: str, now: int, cost: Cost | None = None) -> Workflow:
        """See the port."""
        return await self._write(sqlite_moves.cancel, workflow_id, now, cost)

    async def close_attempt(self, prompt_id: str, now: int) -> None:
        """See the port."""
        await self._write(sqlite_moves.close_attempt, prompt_id, now)

    async def set_priority(self, workflow_id: str, priority: Priority) -> Workflow:
        """See the port."""
        return await self._write(sqlite_moves.set_priority, workflow_id, priority, self._aging_seconds)

    # ---- reading

    async def get(self, workflow_id: str) -> Workflow:
        """See the port."""
        return await self._read(sqlite_reads.get, workflow_id)

    async def graph(self, workflow_id: str) -> tuple[bytes, bytes | None]:
        """See the port."""
        return await self._read(sqlite_reads.graph, workflow_id)

    async def made_from(self, workflow_id: str) -> MadeFrom | None:
        """See the port."""
        return await self._read(sqlite_reads.made_from, workflow_id)

    async def list(self, wanted: Filter) -> Page:
        """See the port."""
        return await self._read(sqlite_reads.page, wanted)

    async def attempts(self, workflow_id: str) -> Sequence[Attempt]:
        """See the port."""
        return await self._read(sqlite_reads.attempts, workflow_id)

    async def open_attempts(self, backend: str | None = None) -> Sequence[Claimed]:
        """See the port."""
        return await self._read(sqlite_reads.open_attempts, backend)

    async def snapshot(self, workflow_ids: Collection[str] | None) -> Snapshot:
        """See the port."""
        return await self._read(sqlite_reads.snapshot, workflow_ids)

    def position(self, workflow_id: str) -> int | None:
        """See the port."""
        entry = self._line.get(workflow_id)
        return None if entry is None else self._line.position(entry)

    def ahead(self, gpu: str, rank: int) -> int:
        """See the port."""
        return self._line.ahead(gpu, rank)

    def next_in_line(self, pools: Collection[str], backend: str) -> tuple[int, int] | None:
        """See the port."""
        entry = self._line.next(pools, backend)
        return None if entry is None else (entry.rank, entry.number)

    def first_in_line(self, limit: int) -> Sequence[Entry]:
        """See the port."""
        return self._line.first(limit)

    def counts(self) -> QueueCounts:
        """See the port."""
        return self._line.counts()

    async def usage(self, by: UsageBy, first: date, last: date) -> Sequence[Usage]:
        """See the port."""
        return await self._read(sqlite_usage.usage, by, first, last)

    # ---- the log

    @property
    def last_seq(self) -> int:
        """See the port."""
        return self._last_seq

    async def first_seq(self) -> int:
        """See the port."""
        none_kept = self._last_seq + 1  # before the read: what is committed during it is kept
        first = await self._read(sqlite_reads.first_seq)
        return none_kept if first is None else first

    async def events_after(self, seq: int, limit: int) -> Sequence[StoredFrame]:
        """See the port."""
        return await self._read(sqlite_reads.events_after, seq, limit)

    async def events_of(self, workflow_id: str, after: int = 0) -> Sequence[StoredFrame]:
        """See the port."""
        return await self._read(sqlite_reads.events_of, workflow_id, after)

    async def append(self, event: StoredEvent, *, patient: bool = False) -> None:
        """See the port."""
        await self._open_writer().run(lambda transaction: sqlite_house.append(transaction, event), patient=patient)

    # ---- the times of nodes

    async def graphs(self, workflow_ids: Collection[str]) -> dict[str, bytes]:
        """See the port."""
        return await self._read(sqlite_durations.graphs, workflow_ids)

    async def keep_times(
        self, prompt_id: str, times: Sequence[NodeTime], learnt: Sequence[NodeDuration], dropped: Sequence[Kind]
    ) -> None:
        """See the port."""
        await self._patiently(sqlite_durations.keep, prompt_id, times, learnt, dropped)

    async def node_times(self, workflow_id: str) -> Sequence[NodeTime]:
        """See the port."""
        return await self._read(sqlite_durations.node_times, workflow_id)

    async def durations(self) -> Sequence[NodeDuration]:
        """See the port."""
        return await self._read(sqlite_durations.durations)

    # ---- outputs

    async def owners(self, backend: str | None, paths: Collection[str]) -> dict[str, OutputOwner]:
        """See the port."""
        return await self._read(sqlite_reads.owners, backend, paths)

    async def output_paths(self, workflow_id: str) -> Sequence[str]:
        """See the port."""
        return await self._read(sqlite_reads.output_paths, workflow_id)

    # ---- the house itself

    async def set_paused(self, paused: bool) -> None:
        """See the port."""
        await self._write(sqlite_house.set_paused, paused)

    async def drained(self) -> frozenset[str]:
        """See the port."""
        return await self._read(sqlite_reads.drained)

    async def set_drained(self, backend: str, drained: bool) -> None:
        """See the port."""
        await self._write(sqlite_house.set_drained, backend, drained)

    async def client_id(self, backend: str) -> str:
        """See the port."""
        return await self._write(sqlite_house.client_id, backend, self._ids)

    async def prune(self, before_ms: int | None, *, limit: int = 200, heard: int | None = None) -> int:
        """One small step of forgetting (see `retention.Prunable`)."""
        if before_ms is not None:
            seq = _LAST_SEQ if heard is None else heard
            if count := await self._patiently(sqlite_house.prune_events, before_ms, limit, seq):
                return count
            now = self._clock.now_ms()
            if numbers := await self._read(sqlite_reads.forgettable, before_ms, now, limit):
                return await self._patiently(sqlite_house.prune_workflows, numbers)
        yesterday = self._clock.now_ms() - sqlite_submit.DAY_MS
        return await self._patiently(sqlite_house.tidy, yesterday, limit)

    async def check(self) -> None:
        """Raises `StoreUnavailable` when the file cannot be read, or when writing failed and still does."""
        writer = self._open_writer()
        if writer.failing:
            await writer.join(sqlite_house.probe, None)
        await self._read(sqlite_reads.first_seq)

    async def backup(self, target: Path) -> None:
        """See the port."""
        await self._in_thread(sqlite_house.backup, self._path, target)

    async def open(self, listener: CommitListener) -> None:
        """See the port."""
        if self._readers is not None:
            raise StoreUnavailable("The store is open already")
        readers = ThreadPoolExecutor(READERS, thread_name_prefix="store-reader")
        loop = asyncio.get_running_loop()
        try:
            house = await loop.run_in_executor(
                readers,
                sqlite_house.open_house,
                self._directory,
                self._aging_seconds,
                self._migrations,
            )
        except BaseException:
            readers.shutdown(wait=False)
            raise
        self._house, self._readers = house, readers
        self._line, self._last_seq = house.published, house.last_seq

        def publish(changes: Sequence[Change], announced: Sequence[Announced]) -> None:
            for change in changes:
                self._line.apply(change)
            if announced:
                self._last_seq = announced[-1][1].seq
                listener(announced)

        self._writer = Writer(house.connection, house.transaction, publish)

    async def close(self) -> None:
        """See the port."""
        writer, readers, house = self._writer, self._readers, self._house
        if writer is None or readers is None or house is None:
            return
        await writer.close()
        if self._house is house:  # of several callers the first one shuts the house
            self._readers = self._house = None
            await asyncio.to_thread(self._shut, readers, house)

    def _shut(self, readers: ThreadPoolExecutor, house: sqlite_house.House) -> None:
        readers.shutdown(wait=True)
        while self._connections:
            self._connections.pop().close()
        house.close()

    # ---- the door for neighbours with tables of their own in this file

    async def write(self, operation: Callable[[Transaction], R], *, patient: bool = False) -> R:
        """Run it with the one writer, in a savepoint of its own; returns after the commit."""
        return await self._open_writer().run(operation, patient=patient)

    async def read(self, question: Callable[[sqlite3.Connection], R]) -> R:
        """Run it on a connection that cannot write."""
        return await self._read(question)

    # ---- ways to the threads

    def _open_writer(self) -> Writer:
        if self._writer is None:
            raise StoreUnavailable("The store is not open")
        return self._writer

    async def _write(
        self, operation: Callable[Concatenate[Transaction, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        return await self._open_writer().run(lambda transaction: operation(transaction, *args, **kwargs))

    async def _patiently(
        self, operation: Callable[Concatenate[Transaction, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        return await self._open_writer().run(
            lambda transaction: operation(transaction, *args, **kwargs), patient=True
        )

    async def _in_thread(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        if self._readers is None:
            raise StoreUnavailable("The store is closed")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._readers, partial(function, *args, **kwargs))

    async def _read(
        self, question: Callable[Concatenate[sqlite3.Connection, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        def ask() -> R:
            try:
                connection: sqlite3.Connection | None = getattr(self._own, "connection", None)
                if connection is None:
                    connection = self._own.connection = connect_reader(self._path)
                    self._connections.append(connection)
                return question(connection, *args, **kwargs)
            except sqlite3.Error as error:
                raise unavailable(error) from error

        return await self._in_thread(ask)
