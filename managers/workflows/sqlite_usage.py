"""What workflows took, kept in two places by one transaction: in their records, and in sums that outlive these.

The sums are by day, key and backend. The day is that of our own clock (UTC) at the end of an attempt, so what is told
for a past day never changes. Must never count anything twice, nor take anything away.
"""

from __future__ import annotations

import sqlite3
from datetime import UTC, date, datetime

from msgspec import UNSET
from msgspec.structs import replace

from managers.events.types import Cost
from managers.workflows import sqlite_statements as sql
from managers.workflows.model import Status, Workflow, added
from managers.workflows.sqlite_rows import cost_row
from managers.workflows.sqlite_writer import Transaction
from managers.workflows.usage import Usage, UsageBy


def charged(transaction: Transaction, workflow: Workflow, cost: Cost | None, *, end: int, now: int) -> Workflow:
    """The record with what its attempt took. It is about to be saved, with the backend and the start of that attempt.

    An attempt that began has taken something, even where nobody knows what. A final workflow is counted. Times are
    epoch ms, `end` may be ComfyUI's.
    """
    began = workflow.start_time is not None
    if not (began or workflow.final):
        return workflow
    transaction.execute(
        sql.ADD_USAGE,
        (
            datetime.fromtimestamp(now / 1000, UTC).date().isoformat(),
            workflow.submitted_by or "",
            workflow.backend or "",
            workflow.final,
            workflow.status is Status.COMPLETED,
            workflow.status is Status.FAILED,
            workflow.status is Status.CANCELLED,
            0.0 if workflow.start_time is None else max(0, end - workflow.start_time) / 1000,
            *cost_row(cost if began else None),
        ),
    )
    return replace(workflow, cost=added(workflow.cost, cost)) if began else workflow


def usage(connection: sqlite3.Connection, by: UsageBy, first: date, last: date) -> list[Usage]:
    """The sums of these days, the last one in."""
    rows = connection.execute(sql.USAGE[by.value], (first.isoformat(), last.isoformat()))
    return [
        Usage(
            key=name if by is UsageBy.KEY else UNSET,
            gpu=name if by is UsageBy.GPU else UNSET,
            day=name if by is UsageBy.DAY else UNSET,
            workflows=workflows,
            completed=completed,
            failed=failed,
            cancelled=cancelled,
            run_seconds=run_seconds,
            gpu_seconds=gpu_seconds,
            vram_peak_bytes=vram_peak,
            energy_joules=energy,
        )
        for name, workflows, completed, failed, cancelled, run_seconds, gpu_seconds, vram_peak, energy in rows
    ]
