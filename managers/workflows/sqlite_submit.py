"""How a workflow gets into the embedded store: many at once by few statements, or one that is not to come twice.

Must never leave half a workflow: record, graph, place in the line and event come in one transaction.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Sequence

from msgspec import Struct

from managers.errors import Conflict, IdempotencyMismatch, QueueFull, ShareFull
from managers.events.types import WorkflowError
from managers.workflows import sqlite_statements as sql
from managers.workflows.model import IdempotencyKey, NewWorkflow, Status, Submitted, Workflow
from managers.workflows.sqlite_moves import enter, queued
from managers.workflows.sqlite_rows import findings_of, findings_text, inserted, new_record, pack, workflow_of
from managers.workflows.sqlite_writer import Transaction

DAY_MS = 86_400_000


class Submission(Struct, frozen=True, gc=False):
    """A new workflow with its graph packed, and how many may wait, in all and of its key, before it is refused."""

    new: NewWorkflow
    graph: bytes
    extra_data: bytes | None
    parameters: bytes | None
    max_waiting: int | None
    max_queued: int | None


def submission(new: NewWorkflow, max_waiting: int | None, max_queued: int | None) -> Submission:
    """Pack what is long: done by the caller, not in the writer's time."""
    extra_data = None if new.extra_data is None else pack(new.extra_data)
    parameters = None if new.made_from is None else pack(new.made_from.parameters)
    return Submission(new, pack(new.graph), extra_data, parameters, max_waiting, max_queued)


def submit(transaction: Transaction, submissions: Sequence[Submission]) -> list[Submitted]:
    """Store them all, or raise for the first that cannot be."""
    records: list[Workflow] = []
    waiting = len(transaction.line)
    own: Counter[str | None] = Counter()  # that are not in the line yet
    for one in submissions:
        if one.max_waiting is not None and waiting >= one.max_waiting:
            _raise_if_known(transaction, one.new.id)
            raise QueueFull(f"{waiting} workflows wait already, no more are taken")
        name = one.new.submitted_by
        if one.max_queued is not None:
            of_key = transaction.line.of_submitter(name) + own[name]
            if of_key >= one.max_queued:
                _raise_if_known(transaction, one.new.id)
                raise ShareFull(f"{of_key} workflows of the key {name} wait already, and it may have no more waiting")
        record = new_record(one.new, transaction.next_number())
        records.append(record)
        if record.status is Status.QUEUED:
            waiting += 1
            own[name] += 1
    try:
        transaction.insert(sql.INSERT_WORKFLOWS, [inserted(record) for record in records])
    except sqlite3.IntegrityError:
        if len(records) == 1:
            _raise_if_known(transaction, records[0].id)
        raise
    transaction.insert(
        sql.INSERT_GRAPHS,
        [
            (record.number, one.graph, one.extra_data, one.parameters)
            for record, one in zip(records, submissions, strict=True)
        ],
    )
    return [_accept(transaction, record) for record in records]


def _accept(transaction: Transaction, record: Workflow) -> Submitted:
    if record.status is Status.QUEUED:
        position = enter(transaction, record)
        transaction.write(queued(record, position, record.created_at), record.number)
    else:
        position = 0
        told = WorkflowError(
            timestamp=record.created_at,
            workflow_id=record.id,
            error=record.error or "",
            error_type="validation",
            errors=record.errors,
        )
        transaction.write(told, record.number)
    return Submitted(record, position, record.status, record.errors)


def first_reply(source: Transaction | sqlite3.Connection, key: IdempotencyKey, now: int) -> Submitted | None:
    """What the same request was told within a day. Raises `IdempotencyMismatch`."""
    row = source.execute(sql.FIND_IDEMPOTENCY, (key.scope, key.key, now - DAY_MS)).fetchone()
    if row is None:
        return None
    body_hash, number, position, status, errors = row
    if body_hash != key.body_hash:
        raise IdempotencyMismatch("This Idempotency-Key was used before with another body")
    workflow = workflow_of(source.execute(sql.GET_WORKFLOW_BY_NUMBER, (number,)).fetchone())
    return Submitted(workflow, position, Status(status), findings_of(errors), replayed=True)


def submit_once(transaction: Transaction, one: Submission, key: IdempotencyKey, now: int) -> Submitted:
    """Store it, unless the same request did so within a day."""
    transaction.execute(sql.PRUNE_IDEMPOTENCY, (now - DAY_MS, 2))  # shrinks, because each call adds one
    replayed = first_reply(transaction, key, now)
    if replayed is not None:
        return replayed
    (result,) = submit(transaction, [one])
    transaction.execute(
        sql.INSERT_IDEMPOTENCY,
        (
            key.scope,
            key.key,
            key.body_hash,
            result.workflow.number,
            result.queue_position,
            result.status.value,
            findings_text(result.errors),
            now,
        ),
    )
    return result


def _raise_if_known(transaction: Transaction, workflow_id: str) -> None:
    row = transaction.execute(sql.GET_STATUS, (workflow_id,)).fetchone()
    if row is not None:
        raise Conflict(f"Workflow {workflow_id} is known already", row[0])
