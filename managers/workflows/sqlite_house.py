"""The folder of the embedded store: who owns it, how it is opened, copied and kept small, and its few settings.

Must never replace or repair a file that cannot be read: that is for the operator to decide.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import socket
import sqlite3
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import IO

import msgspec
from msgspec import Struct

from managers.clock import IdMaker
from managers.errors import Conflict, NotFound, StoreUnavailable
from managers.events.types import StoredEvent
from managers.workflows import sqlite_statements as sql
from managers.workflows.model import Priority, Status, rank
from managers.workflows.sqlite_rows import names_of
from managers.workflows.sqlite_schema import (
    FILE_NAME,
    MIGRATIONS,
    connect_reader,
    connect_writer,
    examine,
    migrate,
)
from managers.workflows.sqlite_writer import Transaction, unavailable
from managers.workflows.waiting import CLASSES, Act, Change, Entry, Line

_LOCK_NAME = "lock"
_PAUSED = "paused"
_PROBE = "probe"
_PROBE_BYTES = 32_768  # more than a workflow usually takes
_SPARE_PAGES = 2560


class House(Struct):
    """An opened folder. `published` equals the line of `transaction`, for the event loop to own."""

    lock: IO[str]
    connection: sqlite3.Connection
    transaction: Transaction
    published: Line
    last_seq: int

    def close(self) -> None:
        """Close the file, then let the folder go."""
        self.connection.close()
        self.lock.close()


def open_house(
    directory: Path,
    aging_seconds: float,
    migrations: Sequence[str] = MIGRATIONS,
) -> House:
    """Take the folder, bring the file up to date, rebuild what lives in memory. Raises `StoreUnavailable`.

    A file of an older schema is copied beside itself first.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = _take(directory)
    except OSError as error:
        raise StoreUnavailable(
            f"The data folder {directory} cannot be used: {error.strerror}. Give the service a folder it may write to"
        ) from error
    connection = None
    path = directory / FILE_NAME
    try:
        version = examine(path, len(migrations))
        connection = connect_writer(path)
        _bring_up_to_date(connection, path, version, migrations)
        # A file that may not be written is opened without complaint: better to hear of it now.
        connection.executescript("BEGIN IMMEDIATE; COMMIT;")
        lines = _load(connection, aging_seconds)
        last_seq = connection.execute(sql.LAST_SEQ).fetchone()[0]
        last_number = connection.execute(sql.LAST_NUMBER).fetchone()[0]
    except BaseException as error:
        if connection is not None:
            connection.close()
        lock.close()
        if isinstance(error, sqlite3.Error):
            raise StoreUnavailable(f"{path}: {unavailable(error)}") from error
        raise
    return House(lock, connection, Transaction(connection, lines[0], last_seq, last_number), lines[1], last_seq)


def _bring_up_to_date(connection: sqlite3.Connection, path: Path, version: int, migrations: Sequence[str]) -> None:
    if not 0 < version < len(migrations):
        return migrate(connection, version, migrations)
    names = itertools.chain(
        [f"{path.name}.schema-{version}"], map(f"{path.name}.schema-{version}.{{}}".format, itertools.count(2))
    )
    copy = next(copy for copy in map(path.with_name, names) if not copy.exists())
    backup(path, copy)
    try:
        migrate(connection, version, migrations)
    except BaseException:
        copy.unlink()  # the file is as it was: a start that is tried again and again must not fill the disk
        raise


def _take(directory: Path) -> IO[str]:
    """Lock the folder for this process. The lock goes when the process ends, however it does.

    The name in it is for people; a pid alone would lie between containers that share the folder.
    """
    lock = (directory / _LOCK_NAME).open("a+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        owner = lock.read().strip() or "another process"
        lock.close()
        raise StoreUnavailable(f"The data folder {directory} is in use by {owner}") from error
    except BaseException:
        lock.close()
        raise
    try:
        lock.truncate(0)
        lock.write(f"{os.getpid()}@{socket.gethostname()}\n")
        lock.flush()
    except BaseException:
        with suppress(OSError):  # it tries to write once more
            lock.close()
        raise
    return lock


def _load(connection: sqlite3.Connection, aging_seconds: float) -> tuple[Line, Line]:
    """Two equal lines of what waits. Ranks follow the aging of today, and the file with them."""
    entries, moved, running = [], [], 0
    for number, workflow_id, status, priority, gpu, old, created_at, submitter, unfit in connection.execute(sql.LIVE):
        place = rank(Priority(priority), created_at, aging_seconds)
        if place != old:
            moved.append((place, number))
        if status == Status.RUNNING:
            running += 1
        else:
            level = CLASSES.index(Priority(priority))
            entries.append(Entry(place, number, workflow_id, gpu, level, created_at, submitter, names_of(unfit)))
    if moved:
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(sql.UPDATE_RANK, moved)
        connection.execute("COMMIT")
    held = {workflow_id for (workflow_id,) in connection.execute(sql.HELD)}
    paused = connection.execute(sql.GET_SETTING, (_PAUSED,)).fetchone() == ("1",)
    lines = (Line(), Line())
    for line in lines:
        line.fill(entries)
        line.running, line.paused = running, paused
        for workflow_id in held:
            if entry := line.get(workflow_id):
                line.apply(Change(Act.HOLD, entry))
    return lines


# ---- operations of the writer


def append(transaction: Transaction, event: StoredEvent) -> None:
    """An event that changes no workflow. Raises `NotFound` when it is about one that is not there."""
    number = None
    if isinstance(event.workflow_id, str):
        row = transaction.execute(sql.GET_NUMBER, (event.workflow_id,)).fetchone()
        if row is None:
            raise NotFound(f"Workflow {event.workflow_id} not found")
        number = row[0]
    transaction.write(event, number)


def set_paused(transaction: Transaction, paused: bool) -> None:
    """Keep it, and let the line know."""
    if paused != transaction.line.paused:
        transaction.execute(sql.SET_SETTING, (_PAUSED, "1" if paused else "0"))
        transaction.draft.do(Act.PAUSE if paused else Act.RESUME)


def set_drained(transaction: Transaction, backend: str, drained: bool) -> None:
    """Keep it; whoever gives that backend work has to ask."""
    name = sql.DRAINED + backend
    if drained:
        transaction.execute(sql.SET_SETTING, (name, "1"))
    else:
        transaction.execute(sql.REMOVE_SETTING, (name,))


def client_id(transaction: Transaction, backend: str, ids: IdMaker) -> str:
    """Made once for each backend."""
    name = f"client_id {backend}"
    row = transaction.execute(sql.GET_SETTING, (name,)).fetchone()
    if row is not None:
        return str(row[0])
    made = ids()
    transaction.execute(sql.SET_SETTING, (name, made))
    return made


def probe(transaction: Transaction, askers: Sequence[None]) -> list[None]:
    """Whether something of a workflow's size can be written: raises what the disk says."""
    transaction.execute(sql.SET_SETTING, (_PROBE, "." * _PROBE_BYTES))
    return list(askers)


# ---- forgetting, each a small step that tells how much it did


def prune_events(transaction: Transaction, before_ms: int, limit: int, heard: int) -> int:
    """The oldest events, up to the first that is younger or has a seq above `heard`: the log has never a hole."""
    cut = 0
    for seq, created_at in transaction.execute(sql.OLDEST_EVENTS, (heard, limit)).fetchall():
        if created_at >= before_ms:
            break
        cut = seq
    return transaction.execute(sql.PRUNE_EVENTS, (cut,)).rowcount


def prune_workflows(transaction: Transaction, numbers: Sequence[int]) -> int:
    """These, which `sqlite_reads.forgettable` has named: what is final stays final."""
    for statement in sql.PRUNE_WORKFLOWS:
        transaction.execute(statement, (msgspec.json.encode(numbers).decode(),))
    return len(numbers)


def tidy(transaction: Transaction, before_ms: int, limit: int) -> int:
    """Idempotency keys of another day; when there are none left, free pages."""
    return transaction.execute(sql.PRUNE_IDEMPOTENCY, (before_ms, limit)).rowcount or _shrink(transaction, limit)


def _shrink(transaction: Transaction, pages: int) -> int:
    """Give free pages back to the disk, all but a quarter of the file: that much will be used again."""
    before = free = transaction.execute(sql.FREE_PAGES).fetchone()[0]
    spare = max(_SPARE_PAGES, transaction.execute(sql.ALL_PAGES).fetchone()[0] // 4)
    for _ in range(min(pages, free - spare)):
        transaction.execute(sql.GIVE_BACK)
    free = transaction.execute(sql.FREE_PAGES).fetchone()[0]
    return int(before - free)


# ---- the copy


def backup(source: Path, target: Path) -> None:
    """A consistent copy of the file, on the disk when this returns. Works from any process, beside a running service.

    Raises `Conflict` when the target exists, `StoreUnavailable` when it cannot be made.
    """
    if target.exists():
        raise Conflict(f"{target.name} exists already: a backup never replaces a file", "exists")
    partial = target.with_name(f"{target.name}.partial")
    try:
        partial.unlink(missing_ok=True)
        with closing(connect_reader(source)) as reader, closing(sqlite3.connect(partial)) as copy:
            reader.backup(copy)
        _sync(partial)
        partial.rename(target)
        _sync(target.parent)
    except (sqlite3.Error, OSError) as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        plain = unavailable(error) if isinstance(error, sqlite3.Error) else error.strerror
        raise StoreUnavailable(f"The backup cannot be written: {plain}") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
