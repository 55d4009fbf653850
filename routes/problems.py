"""The shape of every error reply (RFC 9457 with the three members of older clients, CONTRACT 2), and how routes tell
the documentation which of them they may give.

Must never build an answer itself: routes raise `managers.errors`, `management_api.errors` answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example
from msgspec import UNSET, Struct, UnsetType

from managers.events.types import Finding

PROBLEM_JSON = "application/problem+json"


class Problem(Struct, frozen=True, kw_only=True, rename="camel"):
    """What went wrong. `error`, `message`, `statusCode` repeat `title`, `detail`, `status` for older clients."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    instance: str
    request_id: str
    error: str
    message: str
    status_code: int
    current_status: str | UnsetType = UNSET
    errors: tuple[Finding, ...] | UnsetType = UNSET
    retry_after: int | UnsetType = UNSET


_WHEN: dict[int, tuple[str, str]] = {
    400: ("The request cannot be understood.", "The body is not valid JSON"),
    401: (
        "The key is missing or wrong.",
        "A valid key is required: X-API-Key: <key>, or Authorization: Bearer <key>",
    ),
    403: (
        "The key has not the scope that this needs; `detail` and `WWW-Authenticate` name it.",
        "The key dashboard has not the scope submit, which this needs",
    ),
    404: ("There is no such thing.", "Workflow 9b2f… not found"),
    405: ("The path does not know this method; `Allow` names those it knows.", "Method Not Allowed"),
    409: ("The state of the thing forbids this.", "The workflow has completed already"),
    410: ("It was there, but is no more what it was.", "The file has changed since the run"),
    413: ("The body is larger than allowed.", "The body is larger than 10485760 bytes"),
    415: ("The body is of another type than expected.", "Send application/json"),
    422: ("Understood, but it cannot be done.", "The workflow cannot run"),
    429: (
        "Too many requests of this address or key, or too many workflows of this key wait.",
        "Rate limit of 100 per 1 minute is used up, try again in 12 s",
    ),
    500: ("Something broke on our side.", "Internal Server Error"),
    503: ("Not now; `Retry-After` says when to try again.", "The service is about to stop"),
}


def example_problem(status: int, instance: str = "/v1/comfyui/workflow") -> Mapping[str, Any]:
    """A reply of this status, for the documentation."""
    phrase = HTTPStatus(status).phrase
    detail = _WHEN[status][1] if status in _WHEN else phrase
    problem: dict[str, Any] = {
        "type": "about:blank",
        "title": phrase,
        "status": status,
        "detail": detail,
        "instance": instance,
        "requestId": "4f1c2d1e9a3b4c5d8e7f60718293a4b5",
        "error": phrase,
        "message": detail,
        "statusCode": status,
    }
    if status == 409:
        problem["currentStatus"] = "completed"
    if status in {429, 503}:
        problem["retryAfter"] = 12
    return problem


def problems(*statuses: int) -> dict[int, ResponseSpec]:
    """For a route's `responses=`: the error replies that are its own.

    400 for parameters, 401, 429, 500 are added to every operation they belong to by `management_api.openapi`.
    """
    return {
        status: ResponseSpec(
            data_container=Problem,
            generate_examples=False,
            description=_WHEN[status][0],
            media_type=PROBLEM_JSON,
            examples=[Example(summary=HTTPStatus(status).phrase, value=example_problem(status))],
        )
        for status in statuses
    }


def describe_problem(status: int) -> str:
    """When this status is given, in a sentence."""
    return _WHEN[status][0]


def documented(
    *,
    body: type[Struct] | None = None,
    request: Any = None,
    reply: Any = None,
    also: Mapping[str, str] | None = None,
    optional: bool = False,
    pictures: Sequence[int] = (),
) -> dict[str, Any]:
    """For a route's `opt=`: what the documentation shows beside the signature.

    `body` is the Struct of a JSON body that the route decodes itself (`routes.bodies`), `request` and `reply` are
    examples as they go over the wire; `also` are the other media types of the reply, each with an example.
    `optional`: the body may be left out. `pictures`: statuses whose reply may be a picture.
    """
    told = {"body": body, "request": request, "reply": reply, "also": also or {}}
    return {"documented": {**told, "optional": optional, "pictures": pictures}}
