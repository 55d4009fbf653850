"""What was used, rolled up by key, by backend or by day: who took how much, and for what it will be paid.

Counted are workflows that waited in the queue and have ended; one that was refused when it came in never did. What an
attempt took is counted when it ends, under the backend that ran it: lost ones too, and cancelled ones up to their
cancellation. Must never tell a sum as complete where a part of it is not known: that part adds nothing to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import date
from enum import StrEnum
from typing import Protocol

from msgspec import UNSET, Struct, UnsetType

from managers.errors import InvalidRequest
from managers.events.types import Finding

DAYS = 30
"""So many when nobody says from when."""


class UsageBy(StrEnum):
    """What the sums are rolled up by."""

    KEY = "key"
    GPU = "gpu"
    DAY = "day"


class Usage(Struct, frozen=True, kw_only=True, rename="camel"):
    """Sums of one key ("": none was shown), one backend ("": it never reached one), one day (UTC), or of all.

    `run_seconds`: from ComfyUI's start to the end. The last three are of what is known, None: nothing is;
    `vram_peak_bytes` is the highest.
    """

    key: str | UnsetType = UNSET
    gpu: str | UnsetType = UNSET
    day: str | UnsetType = UNSET
    workflows: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    run_seconds: float = 0.0
    gpu_seconds: float | None = None
    energy_joules: float | None = None
    vram_peak_bytes: int | None = None


class UsageReport(Struct, frozen=True, kw_only=True, rename={"first": "from", "last": "to"}):
    """The reply of GET /v1/usage. Both days are in it."""

    by: UsageBy
    first: str
    last: str
    usage: tuple[Usage, ...]
    total: Usage


class UsageBooks(Protocol):
    """What this needs of a store."""

    async def usage(self, by: UsageBy, first: date, last: date) -> Sequence[Usage]:
        """The sums of these days, the last one in. Raises `StoreUnavailable`."""
        ...


async def report(
    books: UsageBooks, by: UsageBy, *, first: date | None, last: date | None, today: date
) -> UsageReport:
    """The sums of some days; where they are not named, of the last 30 (`DAYS`).

    Raises `InvalidRequest`, `StoreUnavailable`.
    """
    if last is None:
        last = today if first is None else max(first, today)
    if first is None:
        first = date.fromordinal(max(1, last.toordinal() + 1 - DAYS))
    if first > last:
        message = f"from ({first}) is after to ({last})"
        raise InvalidRequest(message, [Finding(code="invalid_query", message=message, input="from")])
    rows = tuple(await books.usage(by, first, last))
    return UsageReport(by=by, first=first.isoformat(), last=last.isoformat(), usage=rows, total=total(rows))


def total(rows: Sequence[Usage]) -> Usage:
    """All of them together."""
    return Usage(
        workflows=sum(row.workflows for row in rows),
        completed=sum(row.completed for row in rows),
        failed=sum(row.failed for row in rows),
        cancelled=sum(row.cancelled for row in rows),
        run_seconds=round(sum(row.run_seconds for row in rows), 3),
        gpu_seconds=_sum(row.gpu_seconds for row in rows),
        energy_joules=_sum(row.energy_joules for row in rows),
        vram_peak_bytes=max((row.vram_peak_bytes for row in rows if row.vram_peak_bytes is not None), default=None),
    )


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known), 3) if known else None
