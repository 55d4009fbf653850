"""From parameters to a picture over HTTP. No rule lives here: decode, call `generate`, encode.

The body is the parameters and nothing else, so that no name of ours can clash with one of a template: what is about
the queue goes into the query and into headers.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

import msgspec
from litestar import Request, post
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example
from litestar.params import HeaderParameter, PathParameter, QueryParameter
from litestar.response.base import ASGIResponse
from msgspec import Raw, Struct

from managers.errors import Gone, InvalidRequest, NotFound
from managers.events.types import Finding
from managers.templates.generate import Generated, generate, picture_of
from managers.templates.registry import Templates
from managers.workflows.manager import Submission, WorkflowManager
from managers.workflows.model import ANY_BACKEND, IdempotencyKey, Priority, Status, Workflow
from managers.workflows.outputs import OutputDoor
from managers.workflows.views import WorkflowView
from routes.access import caller_of
from routes.bodies import decode_json, read_json
from routes.files import file_response
from routes.preferences import MAX_WAIT_SECONDS, Preferences, preferences
from routes.problems import documented, problems

PATH = "/v1/generate"
WORKFLOWS = "/v1/comfyui/workflow"
PICTURE_SECONDS = 60.0
"""How long who wants a picture waits for it, who does not say how long."""
MAX_METADATA_BYTES = 4096


class GenerateReply(Struct, frozen=True, kw_only=True, rename="camel"):
    """202: it is on disk. `parameters` are all of them as they were taken, with defaults and the seed."""

    workflow_id: str
    status: Status
    queue_position: int
    created_at: int
    template: str
    template_version: int
    parameters: Raw


class Parameters(Struct):
    """The parameters of the template, by name: its JSON Schema says which."""


_parameters: msgspec.json.Decoder[dict[str, Any]] = msgspec.json.Decoder(dict[str, Any])

_Template = Annotated[
    str,
    PathParameter(
        min_length=1, max_length=130, description="A template; `name@prod` for an alias, `name@3` for a version."
    ),
]
_Wait = Annotated[
    float | None,
    QueryParameter(le=MAX_WAIT_SECONDS, description="Seconds to wait for the end; like `Prefer: wait=N`."),
]
_Prefer = Annotated[str | None, HeaderParameter(name="Prefer", description="`wait=N` (RFC 7240).")]
_Priority = Annotated[Priority, QueryParameter(description="Its class in the queue.")]
_Gpu = Annotated[str, QueryParameter(max_length=64, description="`local`, or the name of a backend.")]
_Seconds = Annotated[
    float | None,
    QueryParameter(name="timeoutSeconds", ge=0.001, le=30 * 86400, description="How long it may execute."),
]
_Metadata = Annotated[
    str | None, QueryParameter(max_length=MAX_METADATA_BYTES, description="A JSON object, echoed with the workflow.")
]
_Key = Annotated[
    str | None,
    HeaderParameter(name="Idempotency-Key", min_length=1, max_length=255, description="1 to 255 characters."),
]

_EXAMPLE = {"color": "#3366cc", "width": 512}
_EXAMPLE_ID = "3f0c6f1e-4d3b-4d55-9f6a-0d6f2a3c9b11"
_ACCEPTED = {
    "workflowId": _EXAMPLE_ID,
    "status": "queued",
    "queuePosition": 0,
    "createdAt": 1795349867341,
    "template": "demo",
    "templateVersion": 1,
    "parameters": {"color": "#3366cc", "width": 512, "height": 512},
}
_ENDED = {
    "workflowId": _EXAMPLE_ID,
    "status": "completed",
    "progress": 100,
    "outputs": [
        {
            "kind": "image",
            "nodeId": "2",
            "filename": "demo_00001_.png",
            "subfolder": "",
            "type": "output",
            "url": f"{WORKFLOWS}/{_EXAMPLE_ID}/outputs/0",
        }
    ],
    "template": "demo",
    "templateVersion": 1,
    "parameters": {"color": "#3366cc", "width": 512, "height": 512},
}
_WORDS = (
    "Fills the template and hands the workflow in: 202 with all parameters as they were taken, or with "
    "`?wait=N` (or `Prefer: wait=N`) 200 with the workflow when it has ended in that time. With `Accept: image/png` "
    "or `image/*` the picture itself, in headers its `X-Workflow-Id`, `X-Seed` and `X-Generation-Seconds`. "
    "The body is the parameters and nothing else; it may be empty. `Idempotency-Key` makes repeating safe for 24 "
    "hours."
)
_REPLIES = {
    303: ResponseSpec(None, description="The picture is only in a bucket any more; `Location` is a link to it."),
    202: ResponseSpec(GenerateReply, description="It is on disk.", generate_examples=False),
    200: ResponseSpec(
        WorkflowView,
        description="The workflow has ended; its picture, where that was asked for.",
        generate_examples=False,
        examples=[Example(summary="Ended", value=_ENDED)],
    ),
    **problems(404, 409, 413, 415, 422, 503),
}
_TOLD = documented(body=Parameters, request=_EXAMPLE, reply=_ACCEPTED, optional=True, pictures=[200])


@post(
    PATH + "/{template:str}",
    summary="Generate from a template",
    description=_WORDS + " What a template takes is at `/v1/templates/{name}/schema`.",
    tags=["generate"],
    status_code=202,
    responses=_REPLIES,
    opt=_TOLD,
)
async def generate_from(
    request: Request[Any, Any, Any],
    templates: NamedDependency[Templates],
    workflows: NamedDependency[WorkflowManager],
    output_door: NamedDependency[OutputDoor],
    template: _Template,
    wait: _Wait = None,
    prefer: _Prefer = None,
    priority: _Priority = Priority.NORMAL,
    gpu: _Gpu = ANY_BACKEND,
    timeout_seconds: _Seconds = None,
    metadata: _Metadata = None,
    idempotency_key: _Key = None,
) -> ASGIResponse:
    """From this one."""
    caller = caller_of(request)
    submission = Submission(
        graph=b"",
        priority=priority,
        gpu=gpu,
        metadata=_object(metadata),
        timeout_seconds=timeout_seconds,
        submitted_by=caller.name,
        max_queued=caller.max_queued,
    )
    given = await read_json(request, _parameters) if await request.body() else {}
    key = None
    if idempotency_key is not None:
        # The query says what is done as much as the body does; how long to wait is another matter.
        said = msgspec.json.encode([gpu, priority, timeout_seconds, submission.metadata]) + await request.body()
        scope = f"{caller.name} POST {PATH}/{template}"
        key = IdempotencyKey(scope=scope, key=idempotency_key, body_hash=hashlib.sha256(said).hexdigest())
    generated = await generate(templates, workflows, template, given, submission, key)
    return await _answer(request, templates, workflows, output_door, generated, _wanted(wait, prefer))


@post(
    PATH,
    summary="Generate from the default template",
    description=_WORDS + " The template is the one that `GENERATE_TEMPLATE` names.",
    tags=["generate"],
    status_code=202,
    responses=_REPLIES,
    opt=_TOLD,
)
async def generate_default(
    request: Request[Any, Any, Any],
    templates: NamedDependency[Templates],
    workflows: NamedDependency[WorkflowManager],
    output_door: NamedDependency[OutputDoor],
    wait: _Wait = None,
    prefer: _Prefer = None,
    priority: _Priority = Priority.NORMAL,
    gpu: _Gpu = ANY_BACKEND,
    timeout_seconds: _Seconds = None,
    metadata: _Metadata = None,
    idempotency_key: _Key = None,
) -> ASGIResponse:
    """From the default one."""
    reply: ASGIResponse = await generate_from.fn(
        request=request,
        templates=templates,
        workflows=workflows,
        output_door=output_door,
        template=templates.default,
        wait=wait,
        prefer=prefer,
        priority=priority,
        gpu=gpu,
        timeout_seconds=timeout_seconds,
        metadata=metadata,
        idempotency_key=idempotency_key,
    )
    return reply


async def _answer(
    request: Request[Any, Any, Any],
    templates: Templates,
    workflows: WorkflowManager,
    output_door: OutputDoor,
    generated: Generated,
    wanted: Preferences,
) -> ASGIResponse:
    workflow = generated.submitted.workflow
    headers = wanted.headers | {"location": f"{WORKFLOWS}/{workflow.id}", "x-workflow-id": workflow.id}
    if generated.submitted.replayed:
        headers["idempotency-replayed"] = "true"
    if generated.seed is not None:
        headers["x-seed"] = str(generated.seed)
    picture = "image/" in request.headers.get("accept", "").lower()
    seconds = PICTURE_SECONDS if wanted.wait is None and picture else wanted.wait
    if seconds is not None:
        workflow = await workflows.wait(workflow.id, seconds)
        if workflow.final:
            headers |= _timing(workflow)
            if picture:
                return await _picture(request, templates, output_door, workflow, headers)
            view = await workflows.get(workflow.id)
            view = msgspec.structs.replace(view, parameters=Raw(generated.made_from.parameters))
            return _json(view, 200, headers)
    reply = GenerateReply(
        workflow_id=workflow.id,
        status=generated.submitted.status,
        queue_position=generated.submitted.queue_position,
        created_at=workflow.created_at,
        template=generated.made_from.template,
        template_version=generated.made_from.version,
        parameters=Raw(generated.made_from.parameters),
    )
    return _json(reply, 202, headers)


async def _picture(
    request: Request[Any, Any, Any],
    templates: Templates,
    output_door: OutputDoor,
    workflow: Workflow,
    headers: dict[str, str],
) -> ASGIResponse:
    n = picture_of(workflow, await templates.outputs_of(workflow))
    try:
        file = await output_door.open(workflow.id, workflow.outputs[n])
    except (NotFound, Gone):
        link = await output_door.link(workflow.id, n)
        if link is None:
            raise
        return ASGIResponse(status_code=303, headers={**headers, "location": link, "cache-control": "no-store"})
    return file_response(request, file, headers)


def _json(value: Struct, status: int, headers: dict[str, str]) -> ASGIResponse:
    return ASGIResponse(
        body=msgspec.json.encode(value), media_type="application/json", status_code=status, headers=headers
    )


def _timing(workflow: Workflow) -> dict[str, str]:
    if workflow.start_time is None or workflow.completion_time is None:
        return {}
    return {"x-generation-seconds": f"{max(0, workflow.completion_time - workflow.start_time) / 1000:.3f}"}


def _wanted(wait: float | None, prefer: str | None) -> Preferences:
    told = preferences(prefer)
    return Preferences(told.wait if wait is None else max(0.0, wait), strict=False)


def _object(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        return decode_json(text.encode(), _parameters)
    except (InvalidRequest, UnicodeEncodeError):
        message = 'metadata has to be a JSON object, like {"project":"spring"}'
        raise InvalidRequest(message, [Finding(code="invalid_query", message=message, input="metadata")]) from None


generate_routes = [generate_from, generate_default]
