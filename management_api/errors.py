"""Every error becomes problem details here, and nowhere else (CONTRACT 2).

Must never tell a client what only the operator should know: an error without a place in the table is 500, one log
line with its traceback, and no word of it in the reply.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import Enum
from http import HTTPStatus
from typing import Any

import msgspec
import structlog
from litestar import Request, Response
from litestar.enums import ScopeType
from litestar.exceptions import (
    HTTPException,
    InternalServerException,
    LitestarException,
    ValidationException,
    WebSocketException,
)
from litestar.params import ParameterKwarg
from litestar.types import ExceptionHandlersMap, Scope
from litestar.typing import FieldDefinition
from msgspec import UNSET, Struct

from management_api import logging
from managers.errors import (
    Conflict,
    Gone,
    IdempotencyMismatch,
    InvalidRequest,
    InvalidWorkflow,
    ManagerError,
    NotFound,
    ShareFull,
    TooLarge,
    Unavailable,
)
from managers.events.types import Finding
from routes.bodies import finding
from routes.problems import PROBLEM_JSON, Problem

_STATUS: tuple[tuple[type[ManagerError], int], ...] = (
    (NotFound, 404),
    (Gone, 410),
    (Conflict, 409),
    (InvalidWorkflow, 422),
    (InvalidRequest, 400),
    (TooLarge, 413),
    (IdempotencyMismatch, 422),
    (ShareFull, 429),
    (Unavailable, 503),
)
Parameters = Mapping[str, FieldDefinition]
"""What a handler takes, by its names in Python."""

_GONE_CLIENT = "client disconnected prematurely"  # Litestar's only word for it
_log = structlog.get_logger(__name__)
_encode = msgspec.json.Encoder().encode


class Refusal(Struct, frozen=True):
    """A status and what belongs to it, before it becomes a reply."""

    status: int
    detail: str
    headers: Mapping[str, str] = {}
    current_status: str | None = None
    errors: Sequence[Finding] | None = None
    retry_after: int | None = None

    def body(self, instance: str) -> bytes:
        """The problem as JSON; `instance` is the path that was asked for."""
        phrase = _phrase(self.status)
        return _encode(
            Problem(
                title=phrase,
                status=self.status,
                detail=self.detail,
                instance=instance.encode("utf-8", "replace").decode(),
                request_id=logging.request_id.get() or "",
                error=phrase,
                message=self.detail,
                status_code=self.status,
                current_status=UNSET if self.current_status is None else self.current_status,
                errors=UNSET if self.errors is None else tuple(self.errors),
                retry_after=UNSET if self.retry_after is None else self.retry_after,
            )
        )

    def all_headers(self) -> dict[str, str]:
        """Its headers, with `Retry-After` where it belongs."""
        if self.retry_after is None:
            return {**self.headers, "content-type": PROBLEM_JSON}
        return {**self.headers, "content-type": PROBLEM_JSON, "retry-after": str(self.retry_after)}


UNAUTHORIZED = Refusal(
    401,
    "A valid key is required: X-API-Key: <key>, or Authorization: Bearer <key>",
    headers={"www-authenticate": "Bearer"},
)
INTERNAL = Refusal(500, HTTPStatus.INTERNAL_SERVER_ERROR.phrase)


def refusal(error: Exception, parameters: Parameters | None = None, method: str = "") -> Refusal:
    """What a client is told about this error of a request with this method. `parameters`: those of its handler."""
    if isinstance(error, ManagerError):
        return _of_manager(error)
    if isinstance(error, ValidationException):
        findings = [_finding(item, parameters or {}) for item in error.extra or [] if isinstance(item, Mapping)]
        detail = "; ".join(f"{item.pointer or item.input or 'body'}: {item.message}" for item in findings)
        return Refusal(error.status_code, detail or error.detail, errors=findings)
    if isinstance(error, HTTPException) and error.status_code != 500:
        return _of_http(error, method)
    return INTERNAL


def _of_manager(error: ManagerError) -> Refusal:
    status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
    if status == 500:
        return INTERNAL
    detail = str(error) or _phrase(status)
    if isinstance(error, Conflict):
        return Refusal(status, detail, current_status=error.current_status)
    if isinstance(error, InvalidRequest):
        return Refusal(status, detail, errors=error.findings)
    if isinstance(error, Unavailable):
        return Refusal(status, detail, retry_after=max(1, math.ceil(error.retry_after)))
    return Refusal(status, detail)


def _of_http(error: HTTPException, method: str) -> Refusal:
    headers = {name.lower(): value for name, value in (error.headers or {}).items()}
    detail = error.detail
    if headers.get("allow") == "websocket":  # Litestar's name for a path that is a stream and nothing else
        if method in {"GET", "HEAD"}:
            upgrade = {"upgrade": "websocket", "connection": "Upgrade"}
            return Refusal(426, "This is a stream: connect to it as a WebSocket", headers=upgrade)
        headers["allow"] = "GET"
    if error.status_code == 404 and detail == HTTPStatus.NOT_FOUND.phrase:
        detail = "There is nothing at this path"
    if error.status_code == 405 and "allow" in headers:
        detail = f"This path knows {headers['allow']}"
    if error.status_code == 401:
        headers.setdefault("www-authenticate", "Bearer")
    return Refusal(error.status_code, detail, headers=headers)


def _finding(item: Mapping[str, Any], parameters: Parameters) -> Finding:
    """One of Litestar's messages: `key` has dots between steps, `source` is where the value came from."""
    key, source = str(item.get("key", "")), str(getattr(item.get("source"), "value", item.get("source", "")))
    message = str(item.get("message", ""))
    parameter = parameters.get(key)
    known = None if parameter is None else parameter.kwarg_definition
    if isinstance(known, ParameterKwarg):
        allowed = _choices(parameter)
        if allowed:
            message = f"{message}; known: {', '.join(allowed)}"
        name = known.name or key
        return Finding(code=f"invalid_{known.param_type.value}", message=message, input=name, allowed=allowed or None)
    if source in {"query", "path", "header", "cookie"}:
        return Finding(code=f"invalid_{source}", message=message, input=key)
    steps = key.removeprefix("data").strip(".").replace("[", ".").replace("]", "").split(".")
    where = "".join("/" + step.replace("~", "~0").replace("/", "~1") for step in steps if step and step != "...")
    return finding(message, where)


def _choices(parameter: FieldDefinition | None) -> list[str]:
    """The values that it takes, where they are listed: an enum, or literals."""
    if parameter is None:
        return []
    if parameter.is_literal:
        return [str(value) for value in parameter.args]
    if parameter.is_subclass_of(Enum):
        return [str(one.value) for one in parameter.annotation]
    return [value for inner in parameter.inner_types for value in _choices(inner)]


def exception_handlers() -> ExceptionHandlersMap:
    """For `Litestar(exception_handlers=)`."""
    return {Exception: _answer, HTTPException: _answer, LitestarException: _answer, ManagerError: _answer}


def _answer(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    refused = refusal(error, _parameters(request), request.method)
    if refused.status == 500:
        if isinstance(error, InternalServerException) and error.detail == _GONE_CLIENT:
            _log.info("client went away", method=request.method, path=request.scope["path"])
        else:
            log_failure(error, request.method, request.scope["path"])
    return Response(
        refused.body(request.scope["path"]),
        status_code=refused.status,
        headers=refused.all_headers(),
        media_type=PROBLEM_JSON,
    )


def _parameters(request: Request[Any, Any, Any]) -> Parameters:
    handler = request.scope.get("route_handler")
    return handler.parsed_fn_signature.parameters if handler is not None else {}


def log_failure(error: BaseException, method: str, path: str) -> None:
    """The one line an unexpected error gets, with its traceback."""
    _log.error("request failed", method=method, path=path, exc_info=error)


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"


async def log_socket_failure(error: Exception, scope: Scope) -> None:
    """For `Litestar(after_exception=)`: else an error in a stream handler is closed with 4500 and forgotten."""
    if scope["type"] != ScopeType.WEBSOCKET or "path_template" not in scope or isinstance(error, WebSocketException):
        return
    if refusal(error).status == 500:
        log_failure(error, "GET", scope["path"])
