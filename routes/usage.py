"""GET /v1/usage: what was used, as JSON or as a table for a spreadsheet. The sums are `managers.workflows.usage`.

Any key that may read may see it, those of other keys too: there are no tenants (`managers.callers`), and the list of
workflows names who handed them in as well. Must never write a cell that a spreadsheet takes for a formula.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from datetime import UTC, date, datetime
from typing import Annotated, Any, Literal

import msgspec
from litestar import Request, Response, get
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import QueryParameter, SkipValidation

from managers.workflows.manager import WorkflowManager
from managers.workflows.usage import Usage, UsageBy, UsageReport, report
from routes.problems import documented
from routes.service import ServiceInfo

PATH = "/v1/usage"
CSV = "text/csv"

_SUMS = [field for field in msgspec.structs.fields(Usage) if field.name not in set(UsageBy)]
_NUMBERS = [field.encode_name for field in _SUMS]
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""How a cell begins that is run and not shown."""

_EXAMPLE = {
    "workflows": 214,
    "completed": 209,
    "failed": 3,
    "cancelled": 2,
    "runSeconds": 1893.204,
    "gpuSeconds": 1893.377,
    "energyJoules": 611843.9,
    "vramPeakBytes": 21474836480,
}
_EXAMPLE_TABLE = f"""\
key,{",".join(_NUMBERS)}\r
studio,214,209,3,2,1893.204,1893.377,611843.9,21474836480\r
"""


@get(
    PATH,
    summary="What was used",
    description=(
        "Workflows that ended, and what they took of the GPUs, rolled up `by` key, GPU (the backend it was) or "
        "day. Every attempt counts when it ends: lost ones too, cancelled ones up to their cancellation. Sums stay "
        "when workflows are forgotten. `null`: nobody knows. With `Accept: text/csv` or `?format=csv` as a table."
    ),
    tags=["monitoring"],
    responses={200: ResponseSpec(UsageReport, description="The sums.", generate_examples=False)},
    opt=documented(
        reply={
            "by": "key",
            "from": "2026-10-24",
            "to": "2026-11-22",
            "usage": [{"key": "studio", **_EXAMPLE}],
            "total": _EXAMPLE,
        },
        also={CSV: _EXAMPLE_TABLE},
    ),
)
async def usage(
    request: Request[Any, Any, Any],
    workflows: NamedDependency[WorkflowManager],
    service: NamedDependency[SkipValidation[ServiceInfo]],
    by: Annotated[UsageBy, QueryParameter(description="What the sums are rolled up by.")] = UsageBy.DAY,
    first: Annotated[
        date | None, QueryParameter(name="from", description="The first day, UTC. Else 29 days before the last one.")
    ] = None,
    last: Annotated[date | None, QueryParameter(name="to", description="The last day, UTC. Else today.")] = None,
    format_: Annotated[
        Literal["json", "csv"] | None, QueryParameter(name="format", description="Goes before `Accept`.")
    ] = None,
) -> Response[Any]:
    """Answer GET /v1/usage."""
    today = datetime.fromtimestamp(service.clock.now_ms() / 1000, UTC).date()
    found = await report(workflows.store, by, first=first, last=last, today=today)
    headers = {"vary": "Accept", "cache-control": "no-store"}
    if format_ == "csv" or (format_ is None and CSV in request.headers.get("accept", "")):
        name = f"usage-by-{found.by}-{found.first}-{found.last}.csv"
        headers["content-disposition"] = f'attachment; filename="{name}"'
        return Response(table(found), media_type=CSV, headers=headers)
    return Response(found, headers=headers)


def table(found: UsageReport) -> str:
    """As RFC 4180 wants it, a line for each row; none for the total: whoever adds up would count it twice."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow((found.by.value, *_NUMBERS))
    writer.writerows(_cells(found.usage, found.by))
    return text.getvalue()


def _cells(rows: Iterable[Usage], by: UsageBy) -> Iterator[tuple[Any, ...]]:
    for row in rows:
        name = getattr(row, by.value)
        yield (f"'{name}" if name.startswith(_FORMULA) else name, *(getattr(row, one.name) for one in _SUMS))


usage_routes = [usage]
