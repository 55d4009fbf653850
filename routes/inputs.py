"""Files that workflows begin with, uploaded by hand. No rule lives here: read the form, call `InputDoor`, encode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from litestar import Request, post
from litestar.di import NamedDependency
from litestar.exceptions import HTTPException
from litestar.openapi.spec import OpenAPIMediaType, Operation, RequestBody, Schema
from litestar.openapi.spec.enums import OpenAPIFormat, OpenAPIType
from litestar.params import QueryParameter
from multipart import (  # type: ignore[import-untyped]  # it has no stubs
    MultipartError,
    MultipartSegment,
    PushMultipartParser,
    parse_options_header,
)

from managers.comfyui.spool import Spool
from managers.errors import InvalidRequest
from managers.workflows.inputs import InputDoor, UploadedInput
from routes.problems import documented, problems

_AROUND = 64 * 1024
"""What may stand around the file: names, and fields that nobody asks for."""

_EXAMPLE = {
    "name": "uploads/019ab3c4-5d6e-7f80-9a1b-2c3d4e5f6071/cat.png",
    "backends": ["local"],
    "size": 183042,
    "contentType": "image/png",
}


@dataclass
class _Form(Operation):
    """The form for the documentation: the route reads it piece by piece itself."""

    def __post_init__(self) -> None:
        file = Schema(type=OpenAPIType.STRING, format=OpenAPIFormat.BINARY, description="The file, with its name.")
        form = Schema(type=OpenAPIType.OBJECT, properties={"file": file}, required=["file"])
        self.request_body = RequestBody(content={"multipart/form-data": OpenAPIMediaType(schema=form)}, required=True)


@post(
    "/v1/comfyui/inputs",
    tags=["files"],
    summary="Upload an input",
    description=(
        "Put a file into ComfyUI's input folder: that of `backend`, else of every backend that is up now, because a "
        "workflow may run on any. `name` of the reply is what `LoadImage` and other loaders take. Nothing is "
        "overwritten. The size has a limit of its own, `INPUT_MAX_BYTES`."
    ),
    operation_class=_Form,
    request_max_body_size=None,  # the file is counted while it comes
    responses=problems(413, 415, 503),
    opt=documented(reply=_EXAMPLE),
)
async def upload_input(
    request: Request[Any, Any, Any],
    inputs: NamedDependency[InputDoor],
    backend: Annotated[str | None, QueryParameter(description="Only this one.")] = None,
) -> UploadedInput:
    """POST /v1/comfyui/inputs."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != "multipart/form-data":
        raise HTTPException(status_code=415, detail="Send multipart/form-data with one file")
    inputs.check(backend)
    async with inputs.new_spool() as spool:
        filename = await _read(request, options.get("boundary", ""), spool)
        return await inputs.upload(spool, filename, backend)


async def _read(request: Request[Any, Any, Any], boundary: str, spool: Spool) -> str:
    """The one file of the form, and its name. Raises `InvalidRequest`, `TooLarge`."""
    spool.announce((request.content_length or 0) - _AROUND)
    filename: str | None = None
    current: MultipartSegment | None = None
    around = 0
    try:
        with PushMultipartParser(boundary, max_segment_count=100) as parser:
            async for piece in request.stream():
                if not piece:
                    break
                around += len(piece)
                for event in parser.parse(piece):
                    if isinstance(event, MultipartSegment):
                        current = event
                        if event.filename:
                            if filename is not None:
                                raise InvalidRequest("There are several files in the form: send one")
                            filename = event.filename
                    elif event is not None and current is not None and current.filename:
                        around -= len(event)
                        await spool.write(bytes(event))
                if around > _AROUND + len(piece):
                    raise InvalidRequest("There is more in the form than a file")
    except MultipartError as error:
        raise InvalidRequest(f"The body is no form: {error}") from None
    if filename is None:
        raise InvalidRequest("There is no file in the form: send one, as `curl -F file=@picture.png` does")
    return filename


input_routes = [upload_input]
