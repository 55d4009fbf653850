"""Models and outputs over HTTP (CONTRACT 5). No rule lives here: decode, call `Files`, encode."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal
from urllib.parse import quote, unquote

from litestar import Request, delete, get, route
from litestar.di import NamedDependency
from litestar.enums import HttpMethod
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromPath, PathParameter, QueryParameter
from litestar.response.base import ASGIResponse
from msgspec import UNSET, Struct, UnsetType

from managers.comfyui.remote_file import RemoteFile
from managers.errors import Gone, NotFound
from managers.files import Files, Model, ModelType, OutputEntry, OutputFile, media_of, read
from managers.workflows.outputs import OutputDoor
from routes.ids import known
from routes.problems import PROBLEM_JSON, Problem, documented, problems
from routes.ranged import content_disposition, ranged_response

OUTPUT_URL = "/v1/comfyui/output/"


class ModelsReply(Struct, frozen=True, rename="camel"):
    """All models asked for."""

    models: list[Model]


class OutputView(Struct, frozen=True, kw_only=True, rename="camel"):
    """A file in the outputs folder."""

    filename: str
    subfolder: str
    workflow_id: str
    type: str
    size: int
    created_at: int
    url: str
    node_id: str | UnsetType = UNSET


class OutputsReply(Struct, frozen=True, rename="camel"):
    """A page of files."""

    outputs: list[OutputView]
    next_cursor: str | None


_MODELS_EXAMPLE = {
    "models": [
        {
            "name": "sdxl/base_1.0.safetensors",
            "type": "checkpoints",
            "size": 6938078334,
            "hash": None,
            "modifiedAt": 1762300000000,
        }
    ]
}
_OUTPUTS_EXAMPLE = {
    "outputs": [
        {
            "filename": "img_00001_.png",
            "subfolder": "jobs/7",
            "workflowId": "3f0c6f1e-4d3b-4d55-9f6a-0d6f2a3c9b11",
            "type": "png",
            "size": 183042,
            "createdAt": 1762300000000,
            "url": OUTPUT_URL + "jobs/7/img_00001_.png",
            "nodeId": "9",
        }
    ],
    "nextCursor": None,
}


def _refusal(description: str) -> ResponseSpec:
    return ResponseSpec(Problem, description=description, media_type=PROBLEM_JSON, generate_examples=False)


def _bytes(description: str) -> ResponseSpec:
    return ResponseSpec(bytes, description=description, media_type="*/*", generate_examples=False)


_FILE = {
    200: _bytes("The whole file."),
    206: _bytes("The range asked for."),
    304: ResponseSpec(None, description="The client's copy is still good."),
    412: _refusal("`If-Match` or `If-Unmodified-Since` names another state of the file."),
    416: _refusal("The range lies outside the file; `Content-Range: bytes */<size>` tells its size."),
    **problems(404, 410, 503),
}
"""What a file answers."""


@get(
    "/v1/comfyui/models",
    tags=["files"],
    summary="List models",
    description=(
        "The model files below the configured folders, sub-folders included, by type and name. "
        "`hash` is the SHA-256 where a file `<model>.sha256` lies beside the model, else null."
    ),
    responses=problems(503),
    opt=documented(reply=_MODELS_EXAMPLE),
)
async def list_models(
    files: NamedDependency[Files],
    type_: Annotated[
        ModelType | None, QueryParameter(name="type", description="Only this type; all five without it.")
    ] = None,
) -> ModelsReply:
    """GET /v1/comfyui/models."""
    return ModelsReply(await files.list_models(type_))


@get(
    "/v1/comfyui/outputs",
    tags=["files"],
    summary="List outputs",
    description=(
        "The files below the outputs folder, newest first; `nextCursor` is null on the last page. `workflowId` is "
        "known from what the run reported; a file no run reported is of `unknown`. The filter works before the limit."
    ),
    responses=problems(503),
    opt=documented(reply=_OUTPUTS_EXAMPLE),
)
async def list_outputs(
    files: NamedDependency[Files],
    workflow_id: Annotated[
        str | None, QueryParameter(name="workflowId", description="Only files this workflow reported.")
    ] = None,
    limit: Annotated[int, QueryParameter(ge=1, le=1000, description="Files in a page.")] = 50,
    cursor: Annotated[
        str | None, QueryParameter(description="`nextCursor` of the page before; stable under inserts and deletes.")
    ] = None,
) -> OutputsReply:
    """GET /v1/comfyui/outputs."""
    page = await files.list_outputs(workflow_id=workflow_id, limit=limit, cursor=cursor)
    return OutputsReply([_view(entry) for entry in page.outputs], page.next_cursor)


_Path = Annotated[str, PathParameter(description="`subfolder/filename`.")]
_Backend = Annotated[str | None, QueryParameter(description="The backend whose folder is meant.")]
_Folder = Annotated[
    Literal["output", "temp", "input"] | None, QueryParameter(name="type", description="Which of its folders.")
]


@route(
    OUTPUT_URL + "{path:path}",
    http_method=[HttpMethod.GET, HttpMethod.HEAD],
    tags=["files"],
    summary="Read an output",
    description=(
        "The bytes of a file below the outputs folder. One range, `If-Range`, `If-None-Match`, `If-Modified-Since`, "
        "`If-Match` and `If-Unmodified-Since` are understood. What a browser could run (html, svg, xml, js) comes as "
        "an attachment. Links that leave the folder, absolute paths and `..` are 404."
    ),
    responses=_FILE,
)
async def read_output(
    request: Request[Any, Any, Any],
    files: NamedDependency[Files],
    output_door: NamedDependency[OutputDoor],
    path: _Path,  # noqa: ARG001 -- see _asked
    backend: _Backend = None,
    type_: _Folder = None,
) -> ASGIResponse:
    """GET and HEAD /v1/comfyui/output/{path}."""
    if backend is None and type_ in (None, "output"):
        return file_response(request, await files.open_output(_asked(request)))
    return file_response(request, await output_door.on_backend(backend, _asked(request), type_ or "output"))


@route(
    "/v1/comfyui/workflow/{workflow_id:str}/outputs/{n:int}",
    http_method=[HttpMethod.GET, HttpMethod.HEAD],
    tags=["workflows"],
    summary="Read an output of a workflow",
    description=(
        "The bytes that this run wrote, from the folder on this machine or through the backend's /view. When another "
        "run has written the same name since, the answer is 410. A text output comes as text/plain. What is only in "
        "a bucket any more is found there: 307."
    ),
    responses={307: ResponseSpec(None, description="It was uploaded; `Location` is a link to it."), **_FILE},
)
async def read_workflow_output(
    request: Request[Any, Any, Any],
    output_door: NamedDependency[OutputDoor],
    workflow_id: FromPath[str],
    n: FromPath[int],
) -> ASGIResponse:
    """GET and HEAD /v1/comfyui/workflow/{id}/outputs/{n}."""
    output = await output_door.of_workflow(known(workflow_id), n)
    if output.text is not None:
        return ASGIResponse(body=output.text.encode(), media_type="text/plain; charset=utf-8")
    try:
        return file_response(request, await output_door.open(workflow_id, output))
    except (NotFound, Gone):
        link = await output_door.link(workflow_id, n)
        if link is None:
            raise
        return ASGIResponse(status_code=307, headers={"location": link, "cache-control": "no-store"})


@delete(
    OUTPUT_URL + "{path:path}",
    tags=["files"],
    summary="Delete an output",
    description=(
        "Remove the file for good: the one that GET reads with the same parameters. 409 where the folder is not on "
        "this machine, or is that of inputs."
    ),
    responses=problems(404, 409, 503),
)
async def delete_output(
    request: Request[Any, Any, Any],
    files: NamedDependency[Files],
    output_door: NamedDependency[OutputDoor],
    path: _Path,  # noqa: ARG001 -- see _asked
    backend: _Backend = None,
    type_: _Folder = None,
) -> None:
    """DELETE /v1/comfyui/output/{path}."""
    ours = backend is None and type_ in (None, "output")
    folder = None if ours else output_door.folder_to_delete_in(backend, type_ or "output")
    await files.delete_output(_asked(request), folder)


files_routes = [list_models, list_outputs, read_output, read_workflow_output, delete_output]


def file_response(
    request: Request[Any, Any, Any], file: OutputFile | RemoteFile, more: Mapping[str, str] | None = None
) -> ASGIResponse:
    """Answer a GET or HEAD with this file, in whole or in part, wherever it lies, with `more` headers."""
    media = media_of(file.name)
    return ranged_response(
        request.scope,
        request.headers,
        file.read if isinstance(file, RemoteFile) else partial(read, file),
        size=file.size,
        etag=file.etag,
        modified_at=file.modified_at,
        content={
            "content-type": media.type,
            "content-disposition": content_disposition(file.name, inline=media.inline),
            "cache-control": "private, no-cache",  # the same name may hold another picture tomorrow
            **(more or {}),
        },
    )


def _asked(request: Request[Any, Any, Any]) -> str:
    """The path as it was sent, decoded once: Litestar's own has lost doubled and trailing slashes, which say that
    it is absolute, or a folder. Raises `NotFound` for what is no UTF-8.
    """
    try:
        path = unquote(request.scope["raw_path"].decode("ascii"), errors="strict")
    except UnicodeDecodeError as error:
        raise NotFound("Output not found") from error
    return path.partition(OUTPUT_URL)[2]


def _view(entry: OutputEntry) -> OutputView:
    return OutputView(
        filename=entry.filename,
        subfolder=entry.subfolder,
        workflow_id=entry.workflow_id,
        type=entry.type,
        size=entry.size,
        created_at=entry.created_at,
        url=OUTPUT_URL + quote(entry.path),
        node_id=entry.node_id if entry.node_id is not None else UNSET,
    )
