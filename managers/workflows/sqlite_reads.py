"""What is read from the embedded store: every function is one question to one connection.

Must never write; the connections could not.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Sequence

import msgspec

from managers.errors import NotFound
from managers.events.log import StoredFrame
from managers.workflows import sqlite_statements as sql
from managers.workflows.model import Attempt, Claimed, Filter, MadeFrom, Page, Workflow
from managers.workflows.sqlite_rows import (
    attempt_of,
    claimed_of,
    frame_of,
    read_cursor,
    unpack,
    unpack_graph,
    workflow_of,
    write_cursor,
)
from managers.workflows.store import OutputOwner, Snapshot

_MAX_NUMBER = 2**63 - 1


def get(connection: sqlite3.Connection, workflow_id: str) -> Workflow:
    """One record."""
    row = connection.execute(sql.GET_WORKFLOW, (workflow_id,)).fetchone()
    if row is None:
        raise NotFound(f"Workflow {workflow_id} not found")
    return workflow_of(row)


def graph(connection: sqlite3.Connection, workflow_id: str) -> tuple[bytes, bytes | None]:
    """What ComfyUI is to run."""
    row = connection.execute(sql.GET_GRAPH, (workflow_id,)).fetchone()
    if row is None:
        raise NotFound(f"Workflow {workflow_id} not found")
    return unpack_graph(row)


def made_from(connection: sqlite3.Connection, workflow_id: str) -> MadeFrom | None:
    """The template, and the values of its parameters."""
    row = connection.execute(sql.GET_MADE_FROM, (workflow_id,)).fetchone()
    return None if row is None or row[0] is None else MadeFrom(row[0], row[1], unpack(row[2]))


def page(connection: sqlite3.Connection, wanted: Filter) -> Page:
    """Newest first, and one more than wanted is read to know whether there are more."""
    statement = sql.LIST_WORKFLOWS
    values = {
        "before": _MAX_NUMBER if wanted.cursor is None else read_cursor(wanted.cursor),
        "status": wanted.status and wanted.status.value,
        "gpu": wanted.gpu,
        "error_type": wanted.error_type,
        "submitted_by": wanted.submitted_by,
        "since": wanted.since,
        "limit": wanted.limit + 1,
    }
    for name, condition in (
        ("status", sql.LIST_BY_STATUS),
        ("gpu", sql.LIST_BY_GPU),
        ("error_type", sql.LIST_BY_ERROR_TYPE),
        ("submitted_by", sql.LIST_BY_SUBMITTER),
        ("since", sql.LIST_SINCE),
    ):
        if values[name] is not None:
            statement += condition
    rows = connection.execute(statement + sql.LIST_ORDER, values).fetchall()
    workflows = tuple(workflow_of(row) for row in rows[: wanted.limit])
    more = len(rows) > wanted.limit
    return Page(workflows, write_cursor(workflows[-1].number) if more and workflows else None)


def attempts(connection: sqlite3.Connection, workflow_id: str) -> list[Attempt]:
    """All of one workflow."""
    return [attempt_of(row) for row in connection.execute(sql.GET_ATTEMPTS, (workflow_id,))]


def open_attempts(connection: sqlite3.Connection, backend: str | None) -> list[Claimed]:
    """What is open, with what it runs."""
    return [claimed_of(row) for row in connection.execute(sql.OPEN_ATTEMPTS, (backend,))]


def snapshot(connection: sqlite3.Connection, workflow_ids: Collection[str] | None) -> Snapshot:
    """Both from one view of the database."""
    connection.execute("BEGIN")
    try:
        seq = connection.execute(sql.LAST_SEQ).fetchone()[0]
        if workflow_ids is None:
            rows = connection.execute(sql.GET_RUNNING)
        else:
            rows = connection.execute(sql.GET_WORKFLOWS, (_json(workflow_ids),))
        return Snapshot(seq, tuple(workflow_of(row) for row in rows))
    finally:
        connection.execute("ROLLBACK")


def first_seq(connection: sqlite3.Connection) -> int | None:
    """The oldest event."""
    first: int | None = connection.execute(sql.FIRST_SEQ).fetchone()[0]
    return first


def forgettable(connection: sqlite3.Connection, before_ms: int, now_ms: int, limit: int) -> list[int]:
    """Numbers of workflows that ended before then, have no open attempt, and whose events are gone."""
    return [number for (number,) in connection.execute(sql.FORGETTABLE, (before_ms, now_ms, limit))]


def drained(connection: sqlite3.Connection) -> frozenset[str]:
    """Names of the backends that are to get no work."""
    return frozenset(name for (name,) in connection.execute(sql.SETTINGS_BELOW, (sql.DRAINED,)))


def events_after(connection: sqlite3.Connection, seq: int, limit: int) -> Sequence[StoredFrame]:
    """A stretch of the log."""
    return [frame_of(row) for row in connection.execute(sql.EVENTS_AFTER, (seq, limit))]


def events_of(connection: sqlite3.Connection, workflow_id: str, after: int) -> Sequence[StoredFrame]:
    """The events of one workflow."""
    return [frame_of(row) for row in connection.execute(sql.EVENTS_OF, (workflow_id, after))]


def owners(connection: sqlite3.Connection, backend: str | None, paths: Collection[str]) -> dict[str, OutputOwner]:
    """The last run that reported each file."""
    rows = connection.execute(sql.OWNERS, (backend, _json(paths)))
    return {path: OutputOwner(workflow_id, node_id) for path, workflow_id, node_id in rows}


def output_paths(connection: sqlite3.Connection, workflow_id: str) -> list[str]:
    """In the order they were reported."""
    return [path for (path,) in connection.execute(sql.OUTPUT_PATHS, (workflow_id,))]


def _json(values: Collection[str]) -> str:
    return msgspec.json.encode(list(values)).decode()
