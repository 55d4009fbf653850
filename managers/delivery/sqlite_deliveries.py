"""Cursors, deliveries and webhook endpoints in the file of the embedded store (`managers.workflows.sqlite_store`).

It comes in by the door that the store keeps for neighbours: one writer, the same readers, the same commits. Must
never touch a table of the queue but to read it, and never say who listens to whom.
"""

# ruff: noqa: S608 - the pieces are constants of this file
from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Protocol, TypeVar

import msgspec

from managers.delivery.port import Delivery
from managers.delivery.store import Endpoint, Filter, Outlook, Page, Record, Result, Secret, State
from managers.errors import Conflict, NotFound
from managers.events.log import StoredFrame
from managers.workflows import sqlite_statements as shared
from managers.workflows.sqlite_rows import read_cursor, write_cursor
from managers.workflows.sqlite_writer import Transaction

R = TypeVar("R")

MAX_LOG = 100_000
"""Deliveries that are kept at most, whatever their age; what is pending or dead does not count."""
_SHARED_SECRET = "webhook secret"  # noqa: S105 - the name of a setting

_RECORD = (
    "number, id, destination, kind, seq, workflow_id, type, state, attempts, next_at, last_error, last_status,"
    " created_at, ended_at"
)
_PENDING = "state = 'pending'"
_LANE = f"destination = ? AND workflow_id IS ? AND {_PENDING}"

ATTACH = (
    "INSERT OR IGNORE INTO destination (name, kind, cursor)"
    " VALUES (?, ?, coalesce(?, (SELECT max(seq) FROM event), 0))"
)
CURSOR = "SELECT cursor FROM destination WHERE name = ?"
MOVE_CURSOR = "UPDATE destination SET cursor = max(cursor, ?) WHERE name = ?"
DETACH = "DELETE FROM destination WHERE name = ?"
BURY_ALL = (
    "UPDATE delivery SET state = 'dead', next_at = NULL, last_error = ?, ended_at = ?"
    f" WHERE destination = ? AND {_PENDING}"
)
INSERT = (
    "INSERT INTO delivery (id, destination, kind, seq, workflow_id, type, data, state, attempts, created_at) VALUES "
)
HEAD = f"SELECT number, next_at FROM delivery WHERE {_LANE} ORDER BY number LIMIT 1"
WAIT = f"UPDATE delivery SET next_at = NULL WHERE {_LANE} AND number > ? AND next_at IS NOT NULL"
SET_DUE = "UPDATE delivery SET next_at = ? WHERE number = ?"
DUE = (
    "SELECT id, destination, seq, type, workflow_id, data, attempts, created_at FROM delivery"
    f" WHERE destination = ? AND {_PENDING} AND next_at <= ? ORDER BY next_at, number LIMIT ?"
)
NEXT = f"SELECT min(next_at) FROM delivery WHERE destination = ? AND {_PENDING} AND next_at > ?"
OLDEST = f"SELECT seq, created_at FROM delivery WHERE destination = ? AND {_PENDING} ORDER BY number LIMIT 1"
RECORD = (
    "UPDATE delivery SET state = ?, attempts = ?, next_at = ?, last_error = ?, last_status = ?, ended_at = ?"
    f" WHERE id = ? AND {_PENDING} RETURNING destination, workflow_id"
)
GET = f"SELECT {_RECORD}, data FROM delivery WHERE id = ?"
LIST = f"SELECT {_RECORD} FROM delivery WHERE number < ?"
RETRY = (
    "UPDATE delivery SET state = 'pending', attempts = 0, next_at = ?, ended_at = NULL"
    " WHERE number = ? AND state != 'pending'"
)
DEAD = (
    "SELECT number, destination, workflow_id FROM delivery WHERE state = 'dead'"
    " AND destination IN (SELECT value FROM json_each(?1)) AND (?2 IS NULL OR workflow_id = ?2) AND number > ?3"
    " ORDER BY number LIMIT ?4"
)
PRUNE_DELIVERED = (
    "DELETE FROM delivery WHERE number IN"
    " (SELECT number FROM delivery WHERE state = 'delivered' AND ended_at < ? ORDER BY ended_at LIMIT ?)"
)
PRUNE_MANY = (
    "DELETE FROM delivery WHERE number IN (SELECT number FROM delivery WHERE state = 'delivered'"
    " AND number <= (SELECT max(number) FROM delivery) - ? ORDER BY number LIMIT ?)"
)
PRUNE_DEAD = (
    "DELETE FROM delivery WHERE number IN (SELECT number FROM delivery WHERE state = 'dead'"
    " AND seq < (SELECT min(seq) FROM event) ORDER BY number LIMIT ?)"
)

ENDPOINTS = "SELECT data FROM webhook ORDER BY created_at, id"
KEEP_ENDPOINT = "INSERT OR REPLACE INTO webhook (id, created_at, data) VALUES (?, ?, ?)"
REMOVE_ENDPOINT = "DELETE FROM webhook WHERE id = ?"
URLS = "SELECT id, webhook_url FROM workflow WHERE id IN (SELECT value FROM json_each(?)) AND webhook_url IS NOT NULL"

_endpoint = msgspec.json.Decoder(Endpoint)
_secret = msgspec.json.Decoder(Secret)


class Door(Protocol):
    """The store, as far as a neighbour may use it."""

    async def write(self, operation: Callable[[Transaction], R], *, patient: bool = False) -> R:
        """Run it with the one writer; returns after the commit."""
        ...

    async def read(self, question: Callable[[sqlite3.Connection], R]) -> R:
        """Run it on a connection that cannot write."""
        ...


class SqliteDeliveries:
    """Both ports of `managers.delivery.store`. Open and closed with the store whose door it uses."""

    def __init__(self, door: Door) -> None:
        self._door = door

    # ---- cursors

    async def attach(self, name: str, kind: str, start: int | None = None) -> int:
        """See the port."""

        def operation(transaction: Transaction) -> int:
            transaction.execute(ATTACH, (name, kind, start))
            return int(transaction.execute(CURSOR, (name,)).fetchone()[0])

        return await self._door.write(operation)

    async def detach(self, name: str, reason: str, now: int) -> None:
        """See the port."""

        def operation(transaction: Transaction) -> None:
            transaction.execute(BURY_ALL, (reason, now, name))
            transaction.execute(DETACH, (name,))

        await self._door.write(operation)

    async def fan_out(self, name: str, cursor: int, deliveries: Sequence[Delivery], kind: str) -> None:
        """See the port."""
        rows = [
            (
                one.id,
                name,
                kind,
                one.event.seq,
                one.event.workflow_id,
                one.event.type,
                one.event.data,
                State.PENDING.value,
                0,
                one.created_at,
            )
            for one in deliveries
        ]

        def operation(transaction: Transaction) -> None:
            transaction.insert(INSERT, rows)
            transaction.execute(MOVE_CURSOR, (cursor, name))
            lanes = {(name, one.event.workflow_id): one.created_at for one in deliveries}
            for lane, now in lanes.items():
                _settle(transaction, lane, now)

        await self._door.write(operation, patient=True)

    # ---- tries

    async def due(self, name: str, now: int, limit: int) -> Sequence[Delivery]:
        """See the port."""

        def question(connection: sqlite3.Connection) -> list[Delivery]:
            return [_delivery(row) for row in connection.execute(DUE, (name, now, limit))]

        return await self._door.read(question)

    async def outlook(self, name: str, now: int) -> Outlook:
        """See the port."""

        def question(connection: sqlite3.Connection) -> Outlook:
            (next_at,) = connection.execute(NEXT, (name, now)).fetchone()
            return Outlook(next_at, *(connection.execute(OLDEST, (name,)).fetchone() or (None, None)))

        return await self._door.read(question)

    async def record(self, results: Sequence[Result], now: int) -> None:
        """See the port."""

        def operation(transaction: Transaction) -> None:
            for one in results:
                again = one.state is State.PENDING
                at, ended_at = (one.at, None) if again else (None, one.at)
                values = (one.state.value, one.attempts, at, one.error, one.status, ended_at, one.id)
                for lane in transaction.execute(RECORD, values).fetchall():
                    _settle(transaction, lane, now)

        await self._door.write(operation, patient=True)

    # ---- the delivery log

    async def get(self, delivery_id: str) -> tuple[Record, bytes]:
        """See the port."""

        def question(connection: sqlite3.Connection) -> tuple[Record, bytes]:
            row = _get(connection, delivery_id)
            return _record(row), row[-1]

        return await self._door.read(question)

    async def list(self, wanted: Filter) -> Page:
        """See the port."""
        before = read_cursor(wanted.cursor) if wanted.cursor is not None else 2**63 - 1
        text, values = LIST, [before]
        for column in ("state", "destination", "workflow_id"):
            value = getattr(wanted, column)
            if value is not None:
                text, values = f"{text} AND {column} = ?", [*values, value]

        def question(connection: sqlite3.Connection) -> Page:
            rows = connection.execute(f"{text} ORDER BY number DESC LIMIT ?", [*values, wanted.limit + 1]).fetchall()
            records = tuple(map(_record, rows[: wanted.limit]))
            return Page(records, write_cursor(records[-1].number) if len(rows) > wanted.limit else None)

        return await self._door.read(question)

    async def retry(self, delivery_id: str, destinations: Collection[str], now: int) -> Record:
        """See the port."""

        def operation(transaction: Transaction) -> Record:
            record = _record(_get(transaction, delivery_id))
            if record.destination not in destinations:
                raise Conflict(f"There is no destination {record.destination} any more", record.state.value)
            if record.state is not State.PENDING:
                _again(transaction, record.number, (record.destination, record.workflow_id), now)
            elif record.next_at is not None:
                transaction.execute(SET_DUE, (now, record.number))
            return _record(_get(transaction, delivery_id))

        return await self._door.write(operation)

    async def retry_dead(
        self, destinations: Collection[str], now: int, *, after: int, limit: int, workflow_id: str | None = None
    ) -> Sequence[int]:
        """See the port."""

        def operation(transaction: Transaction) -> list[int]:
            rows = transaction.execute(DEAD, (_json(destinations), workflow_id, after, limit)).fetchall()
            for number, *lane in rows:
                _again(transaction, number, lane, now)
            return [row[0] for row in rows]

        return await self._door.write(operation)

    async def prune(self, before_ms: int | None, *, limit: int, heard: int | None = None) -> int:  # noqa: ARG002
        """See the port."""

        def operation(transaction: Transaction) -> int:
            done = 0
            if before_ms is not None:
                done = transaction.execute(PRUNE_DELIVERED, (before_ms, limit)).rowcount
            done = done or transaction.execute(PRUNE_MANY, (MAX_LOG, limit)).rowcount
            return done or transaction.execute(PRUNE_DEAD, (limit,)).rowcount

        return await self._door.write(operation, patient=True)

    # ---- webhooks

    async def endpoints(self) -> Sequence[Endpoint]:
        """See the port."""
        return await self._door.read(
            lambda connection: [_endpoint.decode(data) for (data,) in connection.execute(ENDPOINTS)]
        )

    async def keep(self, endpoint: Endpoint) -> None:
        """See the port."""
        row = (endpoint.id, endpoint.created_at, msgspec.json.encode(endpoint))
        await self._door.write(lambda transaction: _run(transaction, KEEP_ENDPOINT, row))

    async def remove(self, endpoint_id: str) -> None:
        """See the port."""
        await self._door.write(lambda transaction: _run(transaction, REMOVE_ENDPOINT, (endpoint_id,)))

    async def shared_secret(self, made: str) -> Secret:
        """See the port."""

        def operation(transaction: Transaction) -> Secret:
            row = transaction.execute(shared.GET_SETTING, (_SHARED_SECRET,)).fetchone()
            if row is not None:
                return _secret.decode(row[0])
            secret = Secret(secret=made)
            transaction.execute(shared.SET_SETTING, (_SHARED_SECRET, msgspec.json.encode(secret).decode()))
            return secret

        return await self._door.write(operation)

    async def keep_shared_secret(self, secret: Secret) -> None:
        """See the port."""
        row = (_SHARED_SECRET, msgspec.json.encode(secret).decode())
        await self._door.write(lambda transaction: _run(transaction, shared.SET_SETTING, row))

    async def urls(self, workflow_ids: Collection[str]) -> dict[str, str]:
        """See the port."""
        return await self._door.read(lambda connection: dict(connection.execute(URLS, (_json(workflow_ids),))))


# ---- the steps they share


def _settle(transaction: Transaction, lane: Iterable[Any], now: int) -> None:
    """Of a destination's deliveries of one workflow the first is due, and no other."""
    lane = tuple(lane)
    head = transaction.execute(HEAD, lane).fetchone()
    if head is not None:
        number, next_at = head
        transaction.execute(WAIT, (*lane, number))
        if next_at is None:
            transaction.execute(SET_DUE, (now, number))


def _again(transaction: Transaction, number: int, lane: Iterable[Any], now: int) -> None:
    transaction.execute(RETRY, (now, number))
    _settle(transaction, lane, now)


def _get(source: Transaction | sqlite3.Connection, delivery_id: str) -> Any:
    row = source.execute(GET, (delivery_id,)).fetchone()
    if row is None:
        raise NotFound(f"Delivery {delivery_id} not found")
    return row


def _run(transaction: Transaction, statement: str, values: Sequence[Any]) -> None:
    transaction.execute(statement, values)


def _record(row: Sequence[Any]) -> Record:
    (
        number, id_, destination, kind, seq, workflow_id, type_, state, attempts, next_at, last_error, last_status,
        created_at, ended_at,
    ) = row[:14]  # fmt: skip
    return Record(
        number=number,
        id=id_,
        destination=destination,
        kind=kind,
        seq=seq,
        workflow_id=workflow_id,
        type=type_,
        state=State(state),
        attempts=attempts,
        next_at=next_at,
        last_error=last_error,
        last_status=last_status,
        created_at=created_at,
        ended_at=ended_at,
    )


def _delivery(row: Sequence[Any]) -> Delivery:
    id_, destination, seq, type_, workflow_id, data, attempts, created_at = row
    return Delivery(
        id=id_,
        destination=destination,
        event=StoredFrame(seq, type_, workflow_id, data),
        attempts=attempts,
        created_at=created_at,
    )


def _json(values: Collection[str]) -> str:
    return msgspec.json.encode(list(values)).decode()
