"""Templates in the file of the embedded store, by the door that it keeps for neighbours.

Must never touch a table of the queue but to read it.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import msgspec

from managers.templates.model import Definition, Head, Source, Version, digest
from managers.templates.store import Found, Statistics
from managers.workflows.sqlite_rows import pack, unpack
from managers.workflows.sqlite_writer import Transaction

R = TypeVar("R")

_SAMPLE = 1000

COUNT_UP = (
    "INSERT INTO template (name, last_version) VALUES (?, 1)"
    " ON CONFLICT (name) DO UPDATE SET last_version = last_version + 1 RETURNING last_version"
)
INSERT = (
    "INSERT INTO template_version (name, number, created_at, source, saved_by, definition) VALUES (?, ?, ?, ?, ?, ?)"
)
CAME = {
    Source.FILE: "SELECT file_digest FROM template WHERE name = ?",
    Source.BOX: "SELECT box_digest FROM template WHERE name = ?",
}
COMES = {
    Source.FILE: "UPDATE template SET file_digest = ? WHERE name = ?",
    Source.BOX: "UPDATE template SET box_digest = ? WHERE name = ?",
}
_COLUMNS = "name, number, created_at, source, saved_by, definition"
NEWEST_SOURCE = "SELECT source FROM template_version WHERE name = ? ORDER BY number DESC LIMIT 1"
HEADS = f"SELECT {_COLUMNS}, max(number), count(*) FROM template_version GROUP BY name ORDER BY name"  # noqa: S608
ALIASES = "SELECT name, alias, number FROM template_alias ORDER BY alias"
GET = f"SELECT {_COLUMNS} FROM template_version WHERE name = ? AND number = ?"  # noqa: S608
LIST = f"SELECT {_COLUMNS} FROM template_version WHERE name = ? ORDER BY number DESC"  # noqa: S608
SET_ALIAS = (
    "INSERT OR REPLACE INTO template_alias (name, alias, number)"
    " SELECT name, ?, number FROM template_version WHERE name = ? AND number = ?"
)
DELETE_ALIASES = "DELETE FROM template_alias WHERE name = ?"
DELETE = "DELETE FROM template_version WHERE name = ?"
COUNTS = (
    "SELECT template_version, status, count(*) FROM workflow"
    " WHERE template = ? AND template IS NOT NULL GROUP BY 1, 2"
)
SECONDS = (
    "SELECT (completion_time - start_time) / 1000.0 FROM workflow WHERE template = ? AND template IS NOT NULL"
    " AND template_version = ? AND status = 'completed' AND start_time IS NOT NULL ORDER BY number DESC LIMIT ?"
)

_definition = msgspec.json.Decoder(Definition)


class Door(Protocol):
    """The store, as far as a neighbour may use it."""

    async def write(self, operation: Callable[[Transaction], R], *, patient: bool = False) -> R:
        """Run it with the one writer; returns after the commit."""
        ...

    async def read(self, question: Callable[[sqlite3.Connection], R]) -> R:
        """Run it on a connection that cannot write."""
        ...


class SqliteTemplates:
    """The port of `managers.templates.store`. Open and closed with the store whose door it uses."""

    def __init__(self, door: Door) -> None:
        self._door = door

    async def heads(self) -> Mapping[str, Head]:
        """See the port."""

        def question(connection: sqlite3.Connection) -> dict[str, Head]:
            aliases: dict[str, dict[str, int]] = {}
            for name, alias, number in connection.execute(ALIASES):
                aliases.setdefault(name, {})[alias] = number
            return {
                row[0]: Head(newest=_version(row), count=row[-1], aliases=aliases.get(row[0], {}))
                for row in connection.execute(HEADS)
            }

        return await self._door.read(question)

    async def save(self, name: str, definition: Definition, *, saved_by: str, now: int) -> Version:
        """See the port."""

        def operation(transaction: Transaction) -> Version:
            return _save(transaction, name, definition, Source.API, saved_by, now)

        return await self._door.write(operation)

    async def settle(self, found: Sequence[Found], source: Source, now: int) -> Sequence[Version]:
        """See the port."""

        def operation(transaction: Transaction) -> list[Version]:
            saved = []
            for one in found:
                mark = digest(one.definition)
                came = transaction.execute(CAME[source], (one.name,)).fetchone()
                if came == (mark,):
                    continue
                newest = transaction.execute(NEWEST_SOURCE, (one.name,)).fetchone()
                if source is Source.BOX and came is not None and newest != (Source.BOX,):
                    continue  # somebody has saved another, or has deleted it
                saved.append(_save(transaction, one.name, one.definition, source, "", now))
                transaction.execute(COMES[source], (mark, one.name))
            return saved

        return await self._door.write(operation)

    async def version(self, name: str, number: int) -> Version | None:
        """See the port."""

        def question(connection: sqlite3.Connection) -> Version | None:
            row = connection.execute(GET, (name, number)).fetchone()
            return None if row is None else _version(row)

        return await self._door.read(question)

    async def versions(self, name: str) -> Sequence[Version]:
        """See the port."""
        return await self._door.read(lambda connection: [_version(row) for row in connection.execute(LIST, (name,))])

    async def set_alias(self, name: str, alias: str, number: int) -> bool:
        """See the port."""
        given = (alias, name, number)
        return await self._door.write(lambda transaction: transaction.execute(SET_ALIAS, given).rowcount > 0)

    async def delete(self, name: str) -> bool:
        """See the port."""

        def operation(transaction: Transaction) -> bool:
            transaction.execute(DELETE_ALIASES, (name,))
            return transaction.execute(DELETE, (name,)).rowcount > 0

        return await self._door.write(operation)

    async def statistics(self, name: str) -> Mapping[int, Statistics]:
        """See the port."""

        def question(connection: sqlite3.Connection) -> dict[int, Statistics]:
            counts: dict[int, dict[str, int]] = {}
            for number, status, count in connection.execute(COUNTS, (name,)):
                counts.setdefault(number, {})[status] = count
            return {
                number: _statistics(
                    by_status, [seconds for (seconds,) in connection.execute(SECONDS, (name, number, _SAMPLE))]
                )
                for number, by_status in counts.items()
            }

        return await self._door.read(question)


def _save(
    transaction: Transaction, name: str, definition: Definition, source: Source, saved_by: str, now: int
) -> Version:
    (number,) = transaction.execute(COUNT_UP, (name,)).fetchone()
    data = pack(msgspec.json.encode(definition))
    transaction.execute(INSERT, (name, number, now, source.value, saved_by, data))
    return Version(name=name, number=number, created_at=now, source=source, saved_by=saved_by, definition=definition)


def _version(row: Sequence[Any]) -> Version:
    name, number, created_at, source, saved_by, definition = row[:6]
    return Version(
        name=name,
        number=number,
        created_at=created_at,
        source=Source(source),
        saved_by=saved_by,
        definition=_definition.decode(unpack(definition)),
    )


def _statistics(by_status: Mapping[str, int], seconds: Sequence[float]) -> Statistics:
    failures = by_status.get("failed", 0)
    ordered = sorted(max(0.0, one) for one in seconds)
    return Statistics(
        runs=failures + by_status.get("completed", 0),
        failures=failures,
        p50_seconds=_percentile(ordered, 0.5),
        p95_seconds=_percentile(ordered, 0.95),
    )


def _percentile(ordered: Sequence[float], share: float) -> float | None:
    """The nearest rank: a time that there was."""
    return round(ordered[math.ceil(len(ordered) * share) - 1], 3) if ordered else None
