"""Running again all that failed or was cancelled, by filter (CONTRACT 4). No rule lives here.

Must never take a filter in part: a name it does not know, or one in a body, would make it wider than what was meant.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from litestar import Request, post
from litestar.di import NamedDependency
from litestar.params import QueryParameter

from managers.errors import InvalidRequest
from managers.events.types import ErrorType, Finding
from managers.workflows.manager import WorkflowManager
from managers.workflows.model import Status
from managers.workflows.replay import Replay, ReplayReport, replay
from routes.access import caller_of
from routes.problems import documented, problems

PATH = "/v1/comfyui/workflow/retry"
_NAMES = frozenset({"status", "errorType", "gpu", "submittedBy", "since", "until", "limit", "again"})
_LAST_MS = 2**53 - 1


@post(
    PATH,
    summary="Run again all that failed",
    description=(
        "The filter is that of the list, in the query: look there first at what it names. The oldest go first, each "
        "as a new workflow with `retryOf`. What was retried before is left out, so the request may be repeated, and "
        "goes on where it ended. 503 when not even the first was taken; when the queue fills up in the middle, "
        "`stopped` says so."
    ),
    tags=["workflows"],
    status_code=202,
    responses=problems(429, 503),
    opt=documented(
        reply={
            "count": 1,
            "workflows": [
                {
                    "workflowId": "0a5b6f5e-51c3-5d6e-8f0f-3c1b2a4d5e6f",
                    "retryOf": "3f0c6f1e-4d3b-4d55-9f6a-0d6f2a3c9b11",
                    "status": "queued",
                }
            ],
            "refused": [],
            "skipped": 3,
            "remaining": 0,
            "stopped": None,
        }
    ),
)
async def retry_workflows(
    request: Request[Any, Any, Any],
    workflows: NamedDependency[WorkflowManager],
    status: Annotated[Literal["failed", "cancelled"], QueryParameter(description="What became of them.")] = "failed",
    error_type: Annotated[
        ErrorType | None, QueryParameter(name="errorType", description="Only failures of this class.")
    ] = None,
    gpu: Annotated[str | None, QueryParameter(description="Only those for this backend or pool.")] = None,
    submitted_by: Annotated[
        str | None, QueryParameter(name="submittedBy", description="Only those that the key of this name handed in.")
    ] = None,
    since: Annotated[
        int | None, QueryParameter(ge=0, le=_LAST_MS, description="Submitted at or after this time, epoch ms.")
    ] = None,
    until: Annotated[
        int | None, QueryParameter(ge=0, le=_LAST_MS, description="Submitted at or before this time, epoch ms.")
    ] = None,
    limit: Annotated[int, QueryParameter(ge=1, le=1000, description="How many at most.")] = 100,
    again: Annotated[bool, QueryParameter(description="Also what was retried before.")] = False,
) -> ReplayReport:
    """Run them again."""
    if await request.body():
        raise InvalidRequest("The filter belongs into the query, this takes no body")
    unknown = sorted(set(request.query_params) - _NAMES)
    if unknown:
        message = f"There is no filter {unknown[0][:64]!r}; known: {', '.join(sorted(_NAMES))}"
        raise InvalidRequest(message, [Finding(code="invalid_query", message=message, allowed=sorted(_NAMES))])
    caller = caller_of(request)
    wanted = Replay(
        status=Status(status),
        error_type=error_type,
        gpu=gpu,
        submitted_by=submitted_by,
        since=since,
        until=until,
        limit=limit,
        again=again,
    )
    return await replay(workflows, wanted, submitted_by=caller.name, max_queued=caller.max_queued)


replay_routes = [retry_workflows]
