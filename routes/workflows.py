"""Workflows over HTTP (CONTRACT 4). No rule lives here: decode, call `WorkflowManager`, encode."""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Any, cast
from urllib.parse import quote

import msgspec
from litestar import Request, Response, delete, get, patch, post
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example
from litestar.params import FromPath, HeaderParameter, QueryParameter
from litestar.response import Stream
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from managers.callers import Caller
from managers.delivery.endpoints import Webhooks
from managers.errors import InvalidRequest
from managers.events.types import ErrorType, Finding
from managers.guard import MAX_URL
from managers.workflows.manager import DryRun, Page, Submission, WorkflowManager
from managers.workflows.model import ANY_BACKEND, Filter, IdempotencyKey, Priority, Status, Submitted
from managers.workflows.replay import retry
from managers.workflows.views import WorkflowView
from routes.access import caller_of
from routes.bodies import read_json
from routes.ids import UUID, known
from routes.preferences import Preferences, preferences
from routes.problems import documented, problems
from routes.sse import event_stream

PATH = "/v1/comfyui/workflow"
_MAX_METADATA_BYTES = 4096
_LAST_MS = 2**53 - 1
"""The last time that JSON numbers tell exactly."""
WorkflowId = Annotated[str, Meta(pattern=UUID)]
JsonObject = Annotated[Raw, Meta(extra_json_schema={"type": "object"})]
"""Its text; that it is an object is for the one who reads it to check."""


class SubmitRequest(Struct, frozen=True, kw_only=True, rename="camel"):
    """What POST /v1/comfyui/workflow takes. Unknown keys are ignored."""

    workflow: JsonObject
    priority: Priority = Priority.NORMAL
    gpu: Annotated[str, Meta(max_length=64)] = ANY_BACKEND
    id: WorkflowId | None = None
    metadata: dict[str, Any] | None = None
    extra_data: Annotated[Raw, Meta(extra_json_schema={"type": ["object", "null"]})] | UnsetType = UNSET
    max_attempts: Annotated[int, Meta(ge=1, le=100)] | None = None
    timeout_seconds: Annotated[float, Meta(gt=0, le=30 * 86400)] | None = None
    webhook_url: Annotated[str, Meta(min_length=1, max_length=MAX_URL)] | None = None


class SubmitReply(Struct, frozen=True, kw_only=True, rename="camel"):
    """202: it is on disk. `queuePosition` 0 is next."""

    workflow_id: str
    status: Status
    queue_position: int
    created_at: int
    errors: tuple[Finding, ...] | UnsetType = UNSET
    retry_of: str | UnsetType = UNSET


class StatusReply(Struct, frozen=True, rename="camel"):
    """The status a workflow has now."""

    workflow_id: str
    status: Status


class PriorityRequest(Struct, frozen=True, rename="camel"):
    """What PATCH takes."""

    priority: Priority


class EventsReply(Struct, frozen=True, rename="camel"):
    """The stored events of one workflow, in order."""

    events: list[Raw]


_submit = msgspec.json.Decoder(SubmitRequest)
_priority = msgspec.json.Decoder(PriorityRequest)

_EXAMPLE_ID = "3f0c6f1e-4d3b-4d55-9f6a-0d6f2a3c9b11"
_EXAMPLE_GRAPH = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 3368652}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "example"}},
}
_EXAMPLE_ACCEPTED = {
    "workflowId": _EXAMPLE_ID,
    "status": "queued",
    "queuePosition": 0,
    "createdAt": 1795349867341,
}
_EXAMPLE_VIEW = {
    "workflowId": _EXAMPLE_ID,
    "status": "running",
    "progress": 62,
    "currentNode": "K-Sampler",
    "startTime": 1795349868012,
    "completionTime": None,
    "outputs": [],
    "error": None,
    "priority": "normal",
    "gpu": "local",
    "backend": "local",
    "createdAt": 1795349867341,
    "queuePosition": None,
    "attempt": 1,
    "errors": [],
    "errorType": None,
    "nodes": {"total": 7, "done": 4, "cached": 2},
    "currentNodeId": "3",
    "currentNodeType": "KSampler",
    "step": 15,
    "steps": 20,
    "message": "Generating image using K-Sampler: 15/20 steps (75%)",
    "etaSeconds": 4.6,
    "etaP90Seconds": 5.2,
    "outputsReused": False,
    "metadata": None,
    "promptId": "0b0e7c2e-58f4-4a50-8f7f-5e1f0a3b7c55",
    "maxAttempts": 3,
    "timeoutSeconds": 3600,
    "retryOf": None,
    "submittedBy": "admin",
    "cost": {"gpuSeconds": 4.181, "vramPeakBytes": 8913944576, "energyJoules": 1322.4},
}

_ACCEPTED = ResponseSpec(SubmitReply, description="It is on disk.", generate_examples=False)


@post(
    PATH,
    summary="Submit a workflow",
    description=(
        "Checks the graph, stores the workflow and answers 202: from then on it survives a restart. "
        "`Prefer: wait=N` holds the reply for the end, `Prefer: handling=strict` refuses what only might run, "
        "`?dryRun=true` stores nothing, `Idempotency-Key` makes repeating the request safe for 24 hours. "
        "`webhookUrl` is called when the workflow starts and when it ends."
    ),
    tags=["workflows"],
    status_code=202,
    responses={
        202: _ACCEPTED,
        200: ResponseSpec(
            cast("Any", WorkflowView | DryRun),  # the library's type names single types only
            description="The workflow has ended (`Prefer: wait`), or what would become of it (`?dryRun=true`).",
            generate_examples=False,
            examples=[Example(summary="Ended", value=_EXAMPLE_VIEW | {"status": "completed", "progress": 100})],
        ),
        **problems(409, 413, 415, 422, 503),
    },
    opt=documented(
        body=SubmitRequest,
        request={"workflow": _EXAMPLE_GRAPH, "priority": "high"},
        reply=_EXAMPLE_ACCEPTED,
    ),
)
async def submit_workflow(
    request: Request[Any, Any, Any],
    workflows: NamedDependency[WorkflowManager],
    webhooks: NamedDependency[Webhooks],
    dry_run: Annotated[bool, QueryParameter(name="dryRun", description="Only say what would become of it.")] = False,
    prefer: Annotated[str | None, HeaderParameter(name="Prefer", description="RFC 7240.")] = None,
    idempotency_key: Annotated[
        str | None,
        HeaderParameter(name="Idempotency-Key", min_length=1, max_length=255, description="1 to 255 characters."),
    ] = None,
) -> Response[SubmitReply | WorkflowView | DryRun]:
    """Take a workflow in."""
    wanted = preferences(prefer)
    body = await read_json(request, _submit)
    caller = caller_of(request)
    submission = _submission(body, caller)
    if body.webhook_url is not None:
        await webhooks.check(body.webhook_url, "/webhookUrl")
    if dry_run:
        verdict = await workflows.dry_run(submission, strict=wanted.strict)
        return Response(verdict, status_code=200, headers=wanted.headers)
    key = _key(idempotency_key, f"{caller.name} POST {PATH}", await request.body())
    submitted = await workflows.submit(submission, key=key, strict=wanted.strict)
    return await _accepted(workflows, submitted, wanted)


@get(
    PATH,
    summary="List workflows",
    description="Newest first. `nextCursor` goes on where the page ended, whatever was submitted meanwhile.",
    tags=["workflows"],
    opt=documented(reply={"workflows": [_EXAMPLE_VIEW], "nextCursor": None}),
)
async def list_workflows(
    workflows: NamedDependency[WorkflowManager],
    status: Annotated[Status | None, QueryParameter(description="Only these.")] = None,
    gpu: Annotated[str | None, QueryParameter(description="Only those for this backend or pool.")] = None,
    error_type: Annotated[
        ErrorType | None, QueryParameter(name="errorType", description="Only failures of this class.")
    ] = None,
    submitted_by: Annotated[
        str | None, QueryParameter(name="submittedBy", description="Only those that the key of this name handed in.")
    ] = None,
    since: Annotated[
        int | None, QueryParameter(ge=0, le=_LAST_MS, description="Submitted at or after this time, epoch ms.")
    ] = None,
    limit: Annotated[int, QueryParameter(ge=1, le=1000, description="How many at most.")] = 50,
    cursor: Annotated[str | None, QueryParameter(description="`nextCursor` of the page before.")] = None,
) -> Page:
    """A page of workflows."""
    wanted = Filter(
        status=status,
        gpu=gpu,
        error_type=error_type,
        submitted_by=submitted_by,
        since=since,
        limit=limit,
        cursor=cursor,
    )
    return await workflows.list(wanted)


@get(
    PATH + "/{workflow_id:str}",
    summary="Look at a workflow",
    description=(
        "Its state, progress and outputs. `?include=workflow,attempts,nodes` adds the graph, its attempts, and the "
        "times of its nodes (`nodeTimes`)."
    ),
    tags=["workflows"],
    responses=problems(404),
    opt=documented(reply=_EXAMPLE_VIEW),
)
async def get_workflow(
    workflows: NamedDependency[WorkflowManager],
    workflow_id: FromPath[str],
    include: Annotated[str, QueryParameter(description="Any of `workflow`, `attempts`, `nodes`, with commas.")] = "",
) -> WorkflowView:
    """One workflow."""
    wanted = {part.strip() for part in include.split(",")}
    return await workflows.get(
        known(workflow_id),
        with_graph="workflow" in wanted,
        with_attempts="attempts" in wanted,
        with_nodes="nodes" in wanted,
    )


@delete(
    PATH + "/{workflow_id:str}",
    summary="Cancel a workflow",
    description="The verdict is stored before the reply. ComfyUI lets go of a running prompt shortly after.",
    tags=["workflows"],
    status_code=200,
    responses=problems(404, 409),
    opt=documented(reply={"workflowId": _EXAMPLE_ID, "status": "cancelled"}),
)
async def cancel_workflow(workflows: NamedDependency[WorkflowManager], workflow_id: FromPath[str]) -> StatusReply:
    """Cancel."""
    return StatusReply(workflow_id, await workflows.cancel(known(workflow_id)))


@patch(
    PATH + "/{workflow_id:str}",
    summary="Change the priority of a waiting workflow",
    description="It moves to the place it would have, had it been submitted with this priority at the same time.",
    tags=["workflows"],
    responses=problems(404, 409, 415),
    opt=documented(body=PriorityRequest, request={"priority": "high"}, reply=_EXAMPLE_VIEW | {"status": "queued"}),
)
async def change_workflow(
    request: Request[Any, Any, Any], workflows: NamedDependency[WorkflowManager], workflow_id: FromPath[str]
) -> WorkflowView:
    """Reorder."""
    body = await read_json(request, _priority)
    return await workflows.set_priority(known(workflow_id), body.priority)


@post(
    PATH + "/{workflow_id:str}/retry",
    summary="Run a failed or cancelled workflow again",
    description="As a new workflow with `retryOf`, of the key that asks for it: what is final stays final.",
    tags=["workflows"],
    status_code=202,
    responses={202: _ACCEPTED, **problems(404, 409, 503)},
    opt=documented(reply=_EXAMPLE_ACCEPTED | {"retryOf": _EXAMPLE_ID}),
)
async def retry_workflow(
    request: Request[Any, Any, Any], workflows: NamedDependency[WorkflowManager], workflow_id: FromPath[str]
) -> Response[SubmitReply | WorkflowView | DryRun]:
    """Run again."""
    caller = caller_of(request)
    again = await retry(workflows, known(workflow_id), submitted_by=caller.name, max_queued=caller.max_queued)
    return await _accepted(workflows, again, Preferences())


@get(
    PATH + "/{workflow_id:str}/events",
    summary="The events of a workflow",
    description=(
        "What was stored about it, in order. With `Accept: text/event-stream` as server-sent events, which go on "
        "until the workflow ends; `id:` is the `seq`, and `Last-Event-ID` resumes."
    ),
    tags=["workflows"],
    responses={
        200: ResponseSpec(EventsReply, description="The events so far.", generate_examples=False),
        **problems(404),
    },
    opt=documented(
        reply={
            "events": [
                {
                    "type": "workflow:queued",
                    "timestamp": 1795349867341,
                    "workflowId": _EXAMPLE_ID,
                    "seq": 1,
                    "queuePosition": 0,
                    "priority": "normal",
                    "gpu": "local",
                    "attempt": 0,
                }
            ]
        },
        also={"text/event-stream": 'id: 1\ndata: {"type":"workflow:queued","seq":1,"queuePosition":0}\n\n'},
    ),
)
async def workflow_events(
    request: Request[Any, Any, Any],
    workflows: NamedDependency[WorkflowManager],
    workflow_id: FromPath[str],
) -> Response[EventsReply] | Stream:
    """Its life."""
    workflow = await workflows.store.get(known(workflow_id))
    if "text/event-stream" in request.headers.get("accept", ""):
        return event_stream(
            workflows.follow(workflow.id, _last_event_id(request)), welcome=caller_of(request).welcome
        )
    frames = await workflows.log.events_of(workflow.id)
    return Response(EventsReply([Raw(frame.data) for frame in frames]))


def _submission(body: SubmitRequest, caller: Caller) -> Submission:
    if body.metadata is not None and len(msgspec.json.encode(body.metadata)) > _MAX_METADATA_BYTES:
        message = f"metadata is larger than {_MAX_METADATA_BYTES} bytes"
        raise InvalidRequest(message, [Finding(code="too_large", message=message, pointer="/metadata")])
    return Submission(
        graph=bytes(body.workflow),
        priority=body.priority,
        gpu=body.gpu,
        id=body.id,
        metadata=body.metadata,
        extra_data=bytes(body.extra_data) if body.extra_data not in (UNSET, Raw(b"null")) else None,
        max_attempts=body.max_attempts,
        timeout_seconds=body.timeout_seconds,
        submitted_by=caller.name,
        max_queued=caller.max_queued,
        webhook_url=body.webhook_url,
    )


def _key(key: str | None, scope: str, body: bytes) -> IdempotencyKey | None:
    if key is None:
        return None
    return IdempotencyKey(scope=scope, key=key, body_hash=hashlib.sha256(body).hexdigest())


async def _accepted(
    workflows: WorkflowManager, submitted: Submitted, wanted: Preferences
) -> Response[SubmitReply | WorkflowView | DryRun]:
    workflow = submitted.workflow
    headers = wanted.headers | {"location": f"{PATH}/{quote(workflow.id)}"}
    if submitted.replayed:
        headers["idempotency-replayed"] = "true"
    if wanted.wait is not None:
        ended = await workflows.wait(workflow.id, wanted.wait)
        if ended.final:
            return Response(await workflows.get(ended.id), status_code=200, headers=headers)
    reply = SubmitReply(
        workflow_id=workflow.id,
        status=submitted.status,
        queue_position=submitted.queue_position,
        created_at=workflow.created_at,
        errors=submitted.errors or UNSET,
        retry_of=workflow.retry_of or UNSET,
    )
    return Response(reply, status_code=202, headers=headers)


def _last_event_id(request: Request[Any, Any, Any]) -> int:
    value = request.headers.get("last-event-id", "")
    return int(value) if re.fullmatch(r"[0-9]{1,18}", value) else 0


workflow_routes = [
    submit_workflow,
    list_workflows,
    get_workflow,
    cancel_workflow,
    change_workflow,
    retry_workflow,
    workflow_events,
]
