"""JSON bodies into Structs, with an error that points at the place (CONTRACT 2).

Must never let a decoder's own error out: everything that is wrong with a body is `InvalidRequest`.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Any, TypeVar

import msgspec
from litestar import Request
from litestar.exceptions import HTTPException
from litestar.exceptions.http_exceptions import RequestEntityTooLarge
from msgspec import Struct

from managers.errors import InvalidRequest
from managers.events.types import Finding

T = TypeVar("T")

_PLACE = re.compile(r"(?P<message>.*) - at `(?P<key>key in )?\$?(?P<path>.*)`$", re.DOTALL)
_STEP = re.compile(r"\.(?P<name>[^.\[\]]+)|\[(?P<index>\d+|\.\.\.)\]")
_MISSING = re.compile(r"missing required field `(?P<name>.+)`$")
_MAX_SHOWN = 300  # of a value that is wrong
_ANYTHING: msgspec.json.Decoder[Any] = msgspec.json.Decoder()


class JsonRequest(Request[Any, Any, Any]):
    """For `Litestar(request_class=)`: bodies that Litestar decodes go the same way, and fail the same way."""

    async def json(self) -> Any:
        """The body, decoded. Raises `InvalidRequest`."""
        return decode_json(await self.body(), _ANYTHING)

    async def body(self) -> bytes:
        """The body, whole. 413 says how much is allowed, and who says so."""
        try:
            return await super().body()
        except RequestEntityTooLarge:
            limit = self.route_handler.resolve_request_max_body_size()
            raise HTTPException(
                status_code=413, detail=f"The body is larger than {limit} bytes, which MANAGEMENT_API_MAX_BODY allows"
            ) from None


async def read_json(request: Request[Any, Any, Any], decoder: msgspec.json.Decoder[T]) -> T:
    """The body of this request, decoded. 415 for a body of another type; raises `InvalidRequest`."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise HTTPException(status_code=415, detail=f"Send application/json, not {kind[:80]}")
    return decode_json(await request.body(), decoder)


def decode_json(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """Bytes to a value of the decoder's type. Raises `InvalidRequest` with one finding."""
    try:
        body.decode()  # msgspec leaves the text inside a `Raw` unread
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise InvalidRequest(*_at(str(error), decoder.type)) from None
    except msgspec.DecodeError as error:
        message = f"The body is not valid JSON: {error}"
    except UnicodeDecodeError:
        message = "The body is not valid UTF-8"
    except RecursionError:
        message = "The body is nested too deeply"
    raise InvalidRequest(message, [Finding(code="invalid_json", message=message)])


def pointer(path: str) -> str:
    """msgspec's `.a[2].b` as a JSON pointer (RFC 6901); it ends where msgspec does not name a key (`[...]`)."""
    steps: list[str] = []
    for step in _STEP.finditer(path):
        if step["index"] == "...":
            break
        name = step["name"] or step["index"]
        steps.append("/" + name.replace("~", "~0").replace("/", "~1"))
    return "".join(steps)


def finding(message: str, where: str) -> Finding:
    """One finding in msgspec's words; `where` is a pointer to the place, or to the object that lacks a field."""
    missing = _MISSING.search(message)
    if missing:
        return Finding(code="required", message=message, pointer=f"{where}/{missing['name']}")
    return Finding(code="invalid_value", message=message, pointer=where)


def _at(text: str, kind: Any) -> tuple[str, list[Finding]]:
    place = _PLACE.match(text)
    message, where = (place["message"], pointer(place["path"])) if place else (text, "")
    found = finding(message if len(message) <= _MAX_SHOWN else message[:_MAX_SHOWN] + "…", where)
    allowed = _allowed(kind, found.pointer)
    if allowed:
        message = f"{found.message}; known: {', '.join(allowed)}"
        found = msgspec.structs.replace(found, message=message, allowed=allowed)
    start = f"{found.pointer}: " if found.pointer else "The body is not what was expected: "
    return start + found.message, [found]


def _allowed(kind: Any, where: str) -> list[str]:
    """The names to choose from, where the field at this place of the body has a list of them."""
    fields = msgspec.structs.fields(kind) if isinstance(kind, type) and issubclass(kind, Struct) else ()
    kinds = [field.type for field in fields if f"/{field.encode_name}" == where]
    return [str(one.value) for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum) for one in kind]
