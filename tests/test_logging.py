"""What is logged, and what never is (CONTRACT 1)."""

from __future__ import annotations

import io
import logging as standard_logging
import re

import pytest
import structlog
from litestar import WebSocket, get, websocket
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from management_api import logging
from tests.serving import KEY, Log, StartServer, StartService


@get("/v1/test/log", sync_to_thread=False)
def speak() -> None:
    structlog.get_logger("test").info("working", presigned="https://s3/x?X-Amz-Signature=abcdef&a=b")
    standard_logging.getLogger("library").warning("asked %s", "https://h/stream?since=1&ticket=tick-et-9")
    raise RuntimeError(f"no such key: {KEY} in /home/somebody/secret")


@websocket("/v1/test/socket")
async def broken_socket(socket: WebSocket[object, object, object]) -> None:  # type: ignore[type-var]
    await socket.accept()
    raise RuntimeError(f"the socket broke with {KEY}")


async def test_log_lines_carry_the_request_id_and_no_secret(start_server: StartServer, log: Log) -> None:
    server = await start_server(routes=[speak, broken_socket], logs=log.logs)
    reply = await server.client.get(f"/v1/test/log?ticket=tick-et-1&key={KEY}", headers={"x-request-id": "id-1"})
    assert reply.status_code == 500
    with pytest.raises(InvalidStatus):
        async with connect(f"{server.websocket_url}/v1/comfyui/stream?ticket=tick-et-2"):
            pass
    async with connect(
        f"{server.websocket_url}/v1/test/socket?ticket=tick-et-3", additional_headers={"X-API-Key": KEY}
    ) as s:
        await s.wait_closed()
    await server.client.get("/v1/a%0Ab", headers={"X-API-Key": f"Bearer {KEY}"})

    text = log.stream.getvalue()
    assert KEY not in text
    assert "tick-et" not in text
    assert "abcdef" not in text
    lines = log.lines()
    for line in lines:
        assert {"timestamp", "level", "event"} <= set(line), line
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["timestamp"])
    of_request = [line for line in lines if line.get("request_id") == "id-1"]
    assert [line["event"] for line in of_request] == [
        "working",
        "asked https://h/stream?since=1&ticket=***",
        "request failed",
        "request",
    ]
    failed, access = of_request[2:]
    assert "RuntimeError: no such key: ***" in failed["exception"]
    assert (failed["method"], failed["path"], failed["level"]) == ("GET", "/v1/test/log", "error")
    assert (access["method"], access["path"], access["status"]) == ("GET", "/v1/test/log", 500)
    assert access["client"] == "127.0.0.1"
    assert access["milliseconds"] > 0
    sockets = [line for line in lines if line["event"] == "request" and "/v1/test/socket" in line["path"]]
    assert [line["status"] for line in sockets] == [101]
    assert sum("the socket broke with ***" in line.get("exception", "") for line in lines) == 1


async def test_console_lines_and_levels(start_service: StartService, log: Log) -> None:
    stream = log.stream
    logs = logging.configure("info", "console", stream, secrets=(KEY,))
    service = await start_service(logs=logs, routes=[speak])
    await service.client.get("/v1/test/log?ticket=tick-et-1")
    text = stream.getvalue()
    assert re.search(r"error +GET /v1/test/log 500 \d", text)
    assert "RuntimeError: no such key: ***" in text
    assert KEY not in text
    assert "locals" not in text, "a traceback with variables shows more than it should"

    logs = logging.configure("warning", "json", stream, secrets=(KEY,))
    logs.access.write(request="r", client="c", method="GET", path="/", status=200, seconds=0)
    structlog.get_logger("test").info("quiet")
    assert stream.getvalue() == text


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ('{"event":"x","ticket":"abc"}', '{"event":"x","ticket":"***"}'),
        ('{"event":"got {\\"token\\": \\"abc\\"}"}', '{"event":"got {\\"token\\": \\"***\\"}"}'),
        ("GET /a?b=c&signature=abc%3D&d=e", "GET /a?b=c&signature=***&d=e"),
        ("X-API-Key: abc", "X-API-Key: ***"),
        ("Authorization: Bearer abc", "Authorization: Bearer ***"),
        ("sec-websocket-protocol: bearer, abc", "sec-websocket-protocol: bearer, ***"),
        ("X-Amz-Credential=abc&X-Amz-Signature=def", "X-Amz-Credential=***&X-Amz-Signature=***"),
        ("the key is s\\u00e9cret", "the key is s\\u00e9cret"),
        ('the key is quo\\"ted', "the key is ***"),
        ("a workflow was designed", "a workflow was designed"),
    ],
)
def test_the_gate(line: str, kept: str) -> None:
    stream = io.StringIO()
    gate = logging.Gate(stream)
    gate.hide('quo"ted', "")
    gate.write(line.encode())
    assert stream.getvalue() == kept + "\n"
