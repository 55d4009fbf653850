"""The records of uploads in the file of the embedded store, by the door that it keeps for neighbours.

Must never touch a table of the queue but to read it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection
from typing import Any, Protocol, TypeVar

import msgspec

from managers.delivery.uploads import Upload
from managers.errors import NotFound
from managers.events.types import UploadCompleted, UploadFailed
from managers.workflows import sqlite_statements as shared
from managers.workflows.sqlite_writer import Transaction

R = TypeVar("R")

FOUND = "SELECT error FROM upload WHERE workflow = ? AND n = ?"
KEEP = (
    "INSERT OR REPLACE INTO upload (workflow, n, bucket, key, sha256, size, uploaded_at, error)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
)
OF = (
    "SELECT w.id, u.n, u.bucket, u.key, u.sha256, u.size, u.uploaded_at FROM upload u"
    " JOIN workflow w ON w.number = u.workflow"
    " WHERE w.id IN (SELECT value FROM json_each(?)) AND u.error IS NULL ORDER BY w.number, u.n"
)


class Door(Protocol):
    """The store, as far as a neighbour may use it."""

    async def write(self, operation: Callable[[Transaction], R], *, patient: bool = False) -> R:
        """Run it with the one writer; returns after the commit."""
        ...

    async def read(self, question: Callable[[sqlite3.Connection], R]) -> R:
        """Run it on a connection that cannot write."""
        ...


class SqliteUploads:
    """The port of `managers.delivery.uploads`. Open and closed with the store whose door it uses."""

    def __init__(self, door: Door) -> None:
        self._door = door

    async def completed(self, upload: Upload, event: UploadCompleted) -> bool:
        """See the port."""

        def operation(transaction: Transaction) -> bool:
            number = _number(transaction, upload.workflow_id)
            if transaction.execute(FOUND, (number, upload.n)).fetchone() == (None,):
                return False
            place = (upload.bucket, upload.key, upload.sha256, upload.size, upload.uploaded_at)
            transaction.execute(KEEP, (number, upload.n, *place, None))
            transaction.write(event, number)
            return True

        return await self._door.write(operation, patient=True)

    async def failed(self, event: UploadFailed, *, bucket: str) -> bool:
        """See the port."""

        def operation(transaction: Transaction) -> bool:
            number = _number(transaction, str(event.workflow_id))
            if transaction.execute(FOUND, (number, event.n)).fetchone() in ((None,), (event.error,)):
                return False
            transaction.execute(KEEP, (number, event.n, bucket, None, None, None, event.timestamp, event.error))
            transaction.write(event, number)
            return True

        return await self._door.write(operation, patient=True)

    async def of(self, workflow_ids: Collection[str]) -> dict[str, dict[int, Upload]]:
        """See the port."""
        names = msgspec.json.encode(list(workflow_ids)).decode()

        def question(connection: sqlite3.Connection) -> dict[str, dict[int, Upload]]:
            found: dict[str, dict[int, Upload]] = {}
            for row in connection.execute(OF, (names,)):
                upload = _upload(row)
                found.setdefault(upload.workflow_id, {})[upload.n] = upload
            return found

        return await self._door.read(question)


def _number(transaction: Transaction, workflow_id: str) -> int:
    row = transaction.execute(shared.GET_NUMBER, (workflow_id,)).fetchone()
    if row is None:
        raise NotFound(f"Workflow {workflow_id} not found")
    return int(row[0])


def _upload(row: tuple[Any, ...]) -> Upload:
    workflow_id, n, bucket, key, sha256, size, uploaded_at = row
    return Upload(
        workflow_id=workflow_id,
        n=n,
        bucket=bucket,
        key=key,
        sha256=sha256,
        size=size,
        uploaded_at=uploaded_at,
    )
