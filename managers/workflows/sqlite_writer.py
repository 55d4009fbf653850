"""The one thread that writes to the embedded store: everything that waits shares one transaction and one fsync.

Must never know what an operation means, and never announce what is not on disk. An operation is a function of a
`Transaction`; it runs in a savepoint of its own, so that one that is refused sinks nobody else.

The operations see a line of waiting workflows that runs ahead of the disk (`Transaction.draft`). What they changed
in it goes to `publish` after the commit, or is taken back when there is none.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from itertools import chain, groupby
from typing import Any, TypeVar

import msgspec
import structlog
from msgspec import Struct

from managers.errors import StoreUnavailable
from managers.events.log import StoredFrame
from managers.events.types import StoredEvent
from managers.workflows import sqlite_statements as sql
from managers.workflows.sqlite_rows import Row
from managers.workflows.waiting import Change, Draft, Line

log = structlog.get_logger(__name__)

BATCH_SIZE = 512
PATIENCE_SECONDS = 0.02
_ROWS_A_STATEMENT = (64, 32, 16, 8, 4, 2, 1)

A = TypeVar("A")
R = TypeVar("R")
Announced = tuple[StoredEvent, StoredFrame]
Publish = Callable[[Sequence[Change], Sequence[Announced]], None]
_Together = Callable[["Transaction", Sequence[Any]], Sequence[Any]]
_encode = msgspec.json.Encoder().encode


class Transaction:
    """What an operation may do: run statements, change the line, write events, take the next number."""

    def __init__(self, connection: sqlite3.Connection, line: Line, last_seq: int, last_number: int) -> None:
        self.execute = connection.execute
        self.draft = Draft(line)
        self.line = line
        self._last_seq = last_seq
        self._last_number = last_number
        self._announced: list[Announced] = []
        self._event_rows: list[Row] = []

    def next_number(self) -> int:
        """The next in the order of acceptance."""
        self._last_number += 1
        return self._last_number

    def write(self, event: StoredEvent, workflow: int | None) -> None:
        """Give the event its seq and store it with this transaction; `workflow` is the number it is about."""
        seq = self._last_seq = self._last_seq + 1
        event = msgspec.structs.replace(event, seq=seq)
        kind = type(event).__struct_config__.tag
        workflow_id = event.workflow_id if isinstance(event.workflow_id, str) else None
        frame = StoredFrame(seq, str(kind), workflow_id, _encode(event))
        self._announced.append((event, frame))
        self._event_rows.append((seq, frame.type, workflow, workflow_id, event.timestamp, frame.data))

    def insert(self, statement: str, rows: Sequence[Row]) -> None:
        """Insert many rows by few statements: each gives up the interpreter lock once, however long it is."""
        for text, chunk in _chunks(statement, rows):
            self.execute(text, tuple(chain.from_iterable(chunk)))

    def mark(self) -> tuple[int, int, int, int]:
        """Where `undo_to` goes back to."""
        return len(self._announced), len(self.draft.changes), self._last_seq, self._last_number

    def undo_to(self, mark: tuple[int, int, int, int]) -> None:
        """Take back what is not in the database: events, numbers, changes of the line."""
        events, changes, self._last_seq, self._last_number = mark
        del self._announced[events:], self._event_rows[events:]
        self.draft.undo_to(changes)

    def insert_events(self) -> None:
        """Store the events of all operations: the last thing before the commit."""
        self.insert(sql.INSERT_EVENTS, self._event_rows)

    def take(self) -> tuple[list[Change], list[Announced]]:
        """Hand over what the commit made true."""
        announced, self._announced, self._event_rows = self._announced, [], []
        return self.draft.take(), announced


class _Task(Struct, gc=False):
    """An operation, its argument, and who waits for the result (filled in by `value` or `error`)."""

    operation: _Together
    argument: Any
    future: asyncio.Future[Any]
    value: Any = None
    error: Exception | None = None


class Writer:
    """The thread, and the way to it. Made on the event loop that it reports to."""

    def __init__(self, connection: sqlite3.Connection, transaction: Transaction, publish: Publish) -> None:
        self.commits = 0
        self.failing = False  # whether the last transaction could not be written
        self._connection = connection
        self._transaction = transaction
        self._publish = publish
        self._loop = asyncio.get_running_loop()
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._patient: list[_Task] = []
        self._closed = False
        self._done: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    def run(self, operation: Callable[[Transaction], R], *, patient: bool = False) -> asyncio.Future[R]:
        """Run the operation with the next batch. The result comes after the commit is on disk.

        A `patient` one waits up to 20 ms for a neighbour that is in a hurry, and shares its commit; the order stays.
        Cancelling the future does not take the operation back.
        """
        return self._put(lambda transaction, _: (operation(transaction),), None, patient=patient)

    def join(self, operation: Callable[[Transaction, Sequence[A]], Sequence[R]], argument: A) -> asyncio.Future[R]:
        """Like `run`, but neighbours with the same operation are done by one call, one result for each argument.

        When that call raises, each of them is tried alone, so that only the culprit hears of it.
        """
        return self._put(operation, argument)

    def _put(self, operation: _Together, argument: Any, *, patient: bool = False) -> asyncio.Future[Any]:
        if self._closed:
            raise StoreUnavailable("The store is closed")
        future: asyncio.Future[Any] = self._loop.create_future()
        task = _Task(operation, argument, future)
        if patient:
            if not self._patient:
                self._loop.call_later(PATIENCE_SECONDS, self._send_patient)
            self._patient.append(task)
        else:
            self._send_patient()
            self._tasks.put(task)
        return future

    def _send_patient(self) -> None:
        for task in self._patient:
            self._tasks.put(task)
        self._patient.clear()

    async def close(self) -> None:
        """Write what waits, then end the thread."""
        if not self._closed:
            self._closed = True
            self._send_patient()
            self._tasks.put(None)
        await asyncio.shield(self._done)

    # ---- below: on the thread

    def _run(self) -> None:
        more = True
        while more:
            batch = []
            task = self._tasks.get()
            while task is not None:
                batch.append(task)
                if len(batch) == BATCH_SIZE:
                    break
                try:
                    task = self._tasks.get_nowait()
                except queue.Empty:
                    break
            more = task is not None
            if batch:
                self._commit(batch)
        self._loop.call_soon_threadsafe(self._done.set_result, None)

    def _commit(self, batch: list[_Task]) -> None:
        transaction = self._transaction
        start = transaction.mark()
        failure: StoreUnavailable | None = None
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            for operation, group in groupby(batch, lambda task: task.operation):
                self._perform(operation, list(group))
            transaction.insert_events()
            self._connection.execute("COMMIT")
            self.commits += 1
        except Exception as error:  # noqa: BLE001 - the thread must go on, and everybody who waits must hear of it
            with suppress(sqlite3.Error):
                self._connection.rollback()
            transaction.undo_to(start)
            failure = unavailable(error) if isinstance(error, sqlite3.Error) else None
            for task in batch:
                task.error = failure or error
        changes, announced = transaction.take()
        self._loop.call_soon_threadsafe(self._tell, changes, announced, batch, failure)

    def _perform(self, operation: _Together, tasks: list[_Task]) -> None:
        """Run one call for all, in a savepoint; raises only what sinks the whole batch."""
        mark = self._transaction.mark()
        self._connection.execute("SAVEPOINT operation")
        try:
            values = operation(self._transaction, [task.argument for task in tasks])
        except Exception as error:
            if isinstance(error, sqlite3.Error) and (sinks_all(error) or not self._connection.in_transaction):
                raise
            self._connection.execute("ROLLBACK TO operation")
            self._connection.execute("RELEASE operation")
            self._transaction.undo_to(mark)
            if len(tasks) == 1:
                tasks[0].error = error
            else:
                for task in tasks:
                    self._perform(operation, [task])
        else:
            self._connection.execute("RELEASE operation")
            for task, value in zip(tasks, values, strict=True):
                task.value = value

    # ---- below: on the loop

    def _tell(
        self,
        changes: Sequence[Change],
        announced: Sequence[Announced],
        batch: Iterable[_Task],
        failure: StoreUnavailable | None,
    ) -> None:
        if self.failing != bool(failure):
            self.failing = bool(failure)
            if failure is None:
                log.info("the store can be written again")
            else:
                log.error("the store cannot be written", reason=str(failure))
        try:
            self._publish(changes, announced)
        finally:
            for task in batch:
                if task.future.cancelled():
                    continue
                if task.error is not None:
                    task.future.set_exception(task.error)
                else:
                    task.future.set_result(task.value)


@cache
def _statement(beginning: str, width: int, rows: int) -> str:
    row = f"({', '.join('?' * width)})"
    return beginning + ", ".join([row] * rows)


def _chunks(beginning: str, rows: Sequence[Row]) -> Iterator[tuple[str, Sequence[Row]]]:
    """Few lengths, so that the connection keeps every statement prepared."""
    done = 0
    for size in _ROWS_A_STATEMENT:
        while len(rows) - done >= size:
            yield _statement(beginning, len(rows[done]), size), rows[done : done + size]
            done += size


def sinks_all(error: sqlite3.Error) -> bool:
    """Whether the file or the disk is at fault, and not what one operation wanted."""
    return isinstance(error, sqlite3.OperationalError) or type(error) is sqlite3.DatabaseError


_PLAIN = {
    "SQLITE_FULL": "The disk is full",
    "SQLITE_IOERR": "The disk of the store cannot be read or written",
    "SQLITE_READONLY": "The store cannot be written",
    "SQLITE_CANTOPEN": "The file of the store cannot be opened",
    "SQLITE_PERM": "The file of the store may not be opened",
    "SQLITE_BUSY": "Another program has locked the store",
    "SQLITE_NOTADB": "The file of the store is damaged: restore a backup, or move it away to begin anew",
    "SQLITE_CORRUPT": "The file of the store is damaged: restore a backup, or move it away to begin anew",
}


def unavailable(error: sqlite3.Error) -> StoreUnavailable:
    """The same in plain words, without paths."""
    name = getattr(error, "sqlite_errorname", "")
    plain = next((plain for code, plain in _PLAIN.items() if name.startswith(code)), "The store failed")
    result = StoreUnavailable(plain if plain != "The store failed" else f"{plain}: {error}")
    result.__cause__ = error
    return result
