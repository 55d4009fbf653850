"""Every error is a problem of the same shape (CONTRACT 2), whatever was sent."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Annotated, Any

import httpx
import msgspec
import pytest
from litestar import Request, get, post
from litestar.params import FromHeader, FromPath, JSONBody, QueryParameter
from litestar.response import Stream
from msgspec import Meta, Struct

from managers.errors import (
    Conflict,
    Draining,
    Gone,
    IdempotencyMismatch,
    InvalidRequest,
    InvalidWorkflow,
    ManagerError,
    NotFound,
    QueueFull,
)
from managers.events.types import Finding
from routes.bodies import decode_json, read_json
from tests.serving import KEY, Log, Server, Service, StartServer, StartService

MEMBERS = {"type", "title", "status", "detail", "instance", "requestId", "error", "message", "statusCode"}
_FINDING = Finding(code="out_of_range", message="too big", node_id="3", input="steps", allowed=[1, 100])
ERRORS: dict[str, tuple[Exception, int, dict[str, Any]]] = {
    "not-found": (NotFound("Workflow x not found"), 404, {}),
    "gone": (Gone("The file has changed"), 410, {}),
    "conflict": (Conflict("It has completed", "completed"), 409, {"currentStatus": "completed"}),
    "invalid": (
        InvalidRequest("No", [_FINDING]),
        400,
        {
            "errors": [
                {"code": "out_of_range", "message": "too big", "nodeId": "3", "input": "steps", "allowed": [1, 100]}
            ]
        },
    ),
    "workflow": (InvalidWorkflow("Cannot run"), 422, {"errors": []}),
    "idempotency": (IdempotencyMismatch("Another body"), 422, {}),
    "full": (QueueFull("10000 wait", retry_after=2.2), 503, {"retryAfter": 3}),
    "draining": (Draining("About to stop"), 503, {"retryAfter": 5}),
    "unnamed": (ManagerError("in /home/somebody"), 500, {}),
    "unexpected": (RuntimeError("in /home/somebody"), 500, {}),
}


class Inner(Struct):
    steps: Annotated[int, Meta(ge=1, le=100)]


class Body(Struct, rename="camel"):
    workflow: dict[str, Any]
    inner_part: Inner | None = None
    tags: list[str] = []


_DECODER = msgspec.json.Decoder(Body)


@get("/v1/test/raise/{name:str}", sync_to_thread=False)
def fail(name: FromPath[str]) -> None:
    raise ERRORS[name][0]


@post("/v1/test/read")
async def read(request: Request[Any, Any, Any]) -> Body:
    return await read_json(request, _DECODER)


@post("/v1/test/declared", sync_to_thread=False)
def declared(data: JSONBody[Body]) -> Body:
    return data


@get("/v1/test/parameters/{number:int}", sync_to_thread=False)
def parameters(
    number: FromPath[int],
    limit: Annotated[int, QueryParameter(ge=1, le=10)],
    prefer: FromHeader[str],
) -> None:
    return None


@get("/v1/test/breaks-off", sync_to_thread=False)
def breaks_off() -> Stream:
    async def parts() -> AsyncIterator[bytes]:
        yield b"some"
        raise RuntimeError("after the reply began")

    return Stream(parts(), media_type="text/plain")


ROUTES = (fail, read, declared, parameters, breaks_off)


@pytest.fixture
async def service(start_service: StartService) -> Service:
    return await start_service(routes=ROUTES)


def problem_of(reply: httpx.Response, status: int) -> dict[str, Any]:
    """The problem, after checking what all have in common."""
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = reply.json()
    assert set(problem) >= MEMBERS
    assert problem["status"] == problem["statusCode"] == status
    assert problem["title"] == problem["error"]
    assert problem["detail"] == problem["message"]
    assert problem["requestId"] == reply.headers["x-request-id"]
    assert problem["instance"] == reply.request.url.path
    assert problem["type"] == "about:blank"
    return problem


async def test_errors_of_managers(service: Service) -> None:
    for name, (error, status, extensions) in ERRORS.items():
        reply = await service.client.get(f"/v1/test/raise/{name}")
        problem = problem_of(reply, status)
        assert {key: value for key, value in problem.items() if key not in MEMBERS} == extensions
        assert problem["detail"] == (str(error) if status != 500 else "Internal Server Error")
        assert "/home" not in reply.text
        assert "Traceback" not in reply.text
        assert reply.headers.get("retry-after") == (str(extensions["retryAfter"]) if status == 503 else None)


async def test_unknown_paths_and_methods(service: Service) -> None:
    assert problem_of(await service.client.get("/v1/nothing"), 404)["title"] == "Not Found"
    problem_of(await service.client.get("/v1/test/parameters/text?limit=3"), 404)
    reply = await service.client.delete("/v1/test/read")
    assert problem_of(reply, 405)["title"] == "Method Not Allowed"
    assert set(reply.headers["allow"].split(", ")) == {"POST", "OPTIONS"}


DEEP = b'{"workflow": ' + b'{"a":' * 10_000 + b"1" + b"}" * 10_000 + b"}"
BAD_BODIES: dict[str, bytes] = {
    "empty": b"",
    "no json": b"{workflow}",
    "cut off": b'{"workflow": {',
    "array": b"[]",
    "text": b'"x"',
    "null": b"null",
    "NaN": b'{"workflow": {"a": NaN}}',
    "infinity": b'{"workflow": {"a": -Infinity}}',
    "huge number": b'{"workflow": {"a": 1e999}}',
    "lone surrogate": b'{"workflow": {"a": "\\ud800"}}',
    "lone low surrogate": b'{"workflow": {"a": "\\udc00"}}',
    "invalid utf-8": b'{"workflow": {"a": "\xff\xfe"}}',
    "invalid utf-8 key": b'{"workflow": {"\xff": 1}}',
    "utf-16": '{"workflow": {}}'.encode("utf-16"),
    "byte order mark": b'\xef\xbb\xbf{"workflow": {}}',
    "control character": b'{"workflow": {"a": "\x01"}}',
    "deep": DEEP,
    "deep list": b"[" * 10_000 + b"]" * 10_000,
    "trailing": b'{"workflow": {}} {}',
    "wrong type": b'{"workflow": 5}',
    "missing": b"{}",
}


@pytest.mark.parametrize("path", ["/v1/test/read", "/v1/test/declared"])
async def test_a_bad_body_is_400(service: Service, path: str, log: Log) -> None:
    for name, body in BAD_BODIES.items():
        reply = await service.client.post(path, content=body, headers={"content-type": "application/json"})
        assert reply.status_code == 400, name
        problem = problem_of(reply, 400)
        assert len(problem["detail"]) > 10
        assert "msgspec" not in reply.text
        if path == "/v1/test/read":
            assert len(problem["errors"]) == 1
            assert problem["errors"][0]["code"] in {"invalid_json", "invalid_value", "required"}
    assert not [line for line in log.lines() if line["level"] == "error"]


def test_raw_parts_are_looked_at_too() -> None:
    decoder = msgspec.json.Decoder(msgspec.Raw)
    for name in ("invalid utf-8", "NaN", "deep", "lone surrogate", "cut off"):
        with pytest.raises(InvalidRequest):
            decode_json(BAD_BODIES[name], decoder)


async def test_duplicate_and_unknown_keys_are_fine(service: Service) -> None:
    body = b'{"workflow": {"a": 1}, "unknown": [1], "workflow": {"a": 2}, "workflow": {"b": "\xf0\x9f\x8e\xa8"}}'
    for path in ("/v1/test/read", "/v1/test/declared"):
        reply = await service.client.post(path, content=body, headers={"content-type": "application/json"})
        assert reply.status_code == 201
        assert reply.json()["workflow"] == {"b": "🎨"}


@pytest.mark.parametrize("path", ["/v1/test/read", "/v1/test/declared"])
async def test_the_pointer_names_the_place(service: Service, path: str) -> None:
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"workflow": {}, "innerPart": {"steps": "x"}}, "/innerPart/steps", "invalid_value"),
        ({"workflow": {}, "innerPart": {"steps": 0}}, "/innerPart/steps", "invalid_value"),
        ({"workflow": {}, "tags": ["a", "b", {}]}, "/tags/2", "invalid_value"),
        ({"workflow": {}, "innerPart": {}}, "/innerPart/steps", "required"),
        ({"workflow": []}, "/workflow", "invalid_value"),
    ]
    for body, pointer, code in cases:
        (error,) = problem_of(await service.client.post(path, json=body), 400)["errors"]
        assert (error["pointer"], error["code"]) == (pointer, code)
        assert error["message"].startswith(("Expected", "Object missing"))


async def test_parameters_are_named(service: Service) -> None:
    reply = await service.client.get("/v1/test/parameters/5?limit=11", headers={"prefer": "x"})
    (error,) = problem_of(reply, 400)["errors"]
    assert (error["code"], error["input"]) == ("invalid_query", "limit")
    assert "10" in error["message"]
    assert (
        "limit"
        in problem_of(await service.client.get("/v1/test/parameters/5", headers={"prefer": "x"}), 400)["detail"]
    )


def doubtful(parameter: dict[str, Any]) -> tuple[str, list[Any] | None] | None:
    """A value that this parameter cannot take, and the values to choose from; None where it takes any text."""
    schema = parameter["schema"]
    options = [schema, *schema.get("oneOf", ()), *schema.get("anyOf", ())]
    for option in options:
        if "enum" in option:
            return "nonsense", [value for value in option["enum"] if value is not None]
        if option.get("type") in ("integer", "number", "boolean"):
            return "nonsense", None
        if "maxLength" in option:
            return "x" * (option["maxLength"] + 1), None
    return None


async def test_every_parameter_is_named_as_on_the_wire(service: Service) -> None:
    """Whatever the operation, and with the values to choose from where there is a list of them."""
    described = (await service.client.get("/docs/json")).json()
    tried = set()
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            for parameter in operation.get("parameters", ()):
                if "$ref" in parameter["schema"]:
                    parameter["schema"] = described["components"]["schemas"][
                        parameter["schema"]["$ref"].split("/")[-1]
                    ]
                bad = doubtful(parameter) if parameter["in"] in ("query", "header") else None
                if bad is None or method == "head" or path.startswith("/v1/test/"):
                    continue
                value, allowed = bad
                sent = {parameter["name"]: value}
                reply = await service.client.request(
                    method,
                    re.sub(r"\{[^}]*\}", "x", path),
                    params=sent if parameter["in"] == "query" else {},
                    headers=sent if parameter["in"] == "header" else {},
                    json={"workflow": {}} if "requestBody" in operation else None,
                )
                where = (method, path, parameter["name"])
                (error,) = problem_of(reply, 400)["errors"]
                assert (error["input"], error["code"]) == (parameter["name"], f"invalid_{parameter['in']}"), where
                assert error.get("allowed") == allowed, where
                assert reply.json()["detail"].startswith(parameter["name"] + ": "), where
                tried.add(parameter["name"])
    assert tried >= {"dryRun", "Idempotency-Key", "type", "errorType", "status", "limit", "since"}


@pytest.mark.parametrize("path", ["/v1/comfyui/workflow", "/v1/comfyui/outputs"])
async def test_a_cursor_of_nobody_is_named(service: Service, path: str) -> None:
    for cursor in ("x", "", "bm9uZQ", "é"):
        reply = await service.client.get(path, params={"cursor": cursor})
        (error,) = problem_of(reply, 400)["errors"]
        assert (error["input"], error["code"]) == ("cursor", "invalid_query")


async def test_a_stream_without_an_upgrade_asks_for_one(service: Service) -> None:
    for method in ("GET", "HEAD"):
        reply = await service.client.request(method, "/v1/comfyui/stream")
        assert (reply.status_code, reply.headers["upgrade"], reply.headers["connection"]) == (
            426,
            "websocket",
            "Upgrade",
        )
    assert "WebSocket" in problem_of(await service.client.get("/v1/comfyui/stream"), 426)["detail"]
    reply = await service.client.post("/v1/comfyui/stream")
    assert (problem_of(reply, 405)["title"], reply.headers["allow"]) == ("Method Not Allowed", "GET")


async def test_a_stream_without_an_upgrade_over_a_real_connection(server: Server) -> None:
    for _ in range(2):  # the connection lives on
        reply = await server.client.get("/v1/comfyui/stream")
        assert (reply.status_code, reply.headers["upgrade"]) == (426, "websocket")
        assert reply.headers["connection"].lower() == "upgrade"


async def test_content_types(service: Service) -> None:
    body = b'{"workflow":{}}'
    for kind in (
        *("application/json", "application/json; charset=utf-8", "APPLICATION/JSON", "application/vnd.comfy+json"),
    ):
        reply = await service.client.post("/v1/test/read", content=body, headers={"content-type": kind})
        assert reply.status_code == 201, kind
    for kind in (
        *("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/jsonx"),
    ):
        reply = await service.client.post("/v1/test/read", content=body, headers={"content-type": kind})
        assert "application/json" in problem_of(reply, 415)["detail"]


@pytest.mark.parametrize("path", ["/v1/test/read", "/v1/test/declared"])
async def test_too_large_a_body_is_413_announced_or_not(start_server: StartServer, path: str) -> None:
    server = await start_server(routes=ROUTES, MANAGEMENT_API_MAX_BODY="1MiB")
    headers = {"content-type": "application/json"}

    async def chunks(count: int) -> AsyncIterator[bytes]:
        yield b'{"workflow": {"a": "'
        for _ in range(count):
            yield b"x" * 65536
        yield b'"}}'

    assert (await server.client.post(path, content=chunks(15), headers=headers)).status_code == 201
    for content in (b"x" * (2**20 + 1), chunks(17)):
        problem = problem_of(await server.client.post(path, content=content, headers=headers), 413)
        assert problem["title"] in {"Request Entity Too Large", "Content Too Large"}
    assert (await server.client.get("/health")).status_code == 200


async def test_a_reply_that_breaks_is_broken_off_and_logged_once(start_server: StartServer, log: Log) -> None:
    server = await start_server(routes=ROUTES)
    with pytest.raises(httpx.RemoteProtocolError):
        await server.client.get("/v1/test/breaks-off")
    lines = log.lines()
    (failed,) = [line for line in lines if line["event"] == "request failed"]
    assert "after the reply began" in failed["exception"]


async def test_a_500_is_logged_once_with_its_traceback(start_service: StartService, log: Log) -> None:
    service = await start_service(routes=ROUTES)
    await service.client.get("/v1/test/raise/unexpected", headers={"x-request-id": "r-1"})
    await service.client.get("/v1/test/raise/not-found")
    lines = log.lines()
    (failed,) = [line for line in lines if line["level"] == "error"]
    assert failed["request_id"] == "r-1"
    assert "Traceback" in failed["exception"]
    assert "in /home/somebody" in failed["exception"]


async def test_a_client_that_goes_away_is_no_error(start_server: StartServer, log: Log) -> None:
    server = await start_server(routes=ROUTES)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    head = f"POST /v1/test/read HTTP/1.1\r\nHost: x\r\nX-API-Key: {KEY}\r\nContent-Length: 1000\r\n\r\n"
    writer.write(head.encode() + b'{"workflow"')
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    assert not await reader.read()
    async with asyncio.timeout(10):
        while not any(line["event"] == "client went away" for line in log.lines()):
            await server.client.get("/health")
    assert not [line for line in log.lines() if line["level"] == "error"]


async def test_garbage_on_the_wire_breaks_nothing(server: Server) -> None:
    for garbage in (b"\x00\xff\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET /%ff%00%2e%2e HTTP/1.1\r\nHost: x\r\n\r\n"):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(garbage)
        await writer.drain()
        async with asyncio.timeout(10):
            assert (await reader.readline()).startswith(b"HTTP/1.1 4")
        writer.close()
        await writer.wait_closed()
    assert (await server.client.get("/health")).status_code == 200
