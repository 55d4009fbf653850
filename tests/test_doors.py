"""What the doors do with clients that mean no good: raw bytes on real sockets, against the real process."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import uvicorn
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from websockets.sync.client import connect

from management_api.guarded_http import GuardedHttpProtocol
from management_api.limits import ClientAddress
from management_api.values import networks
from tests.doors import AUTHORIZED, SECONDS, STREAM, Doors, opened, read_reply
from tests.program import KEY, served
from tests.queue_kit import PATH, picture


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    with opened(tmp_path_factory.mktemp("doors")) as found:
        yield found


def outcome(send: Callable[[], None], connection: socket.socket) -> int:
    """The status of the reply to something that may be broken off while it is sent; 0: broken off without one."""
    with suppress(OSError):
        send()
    try:
        return read_reply(connection)[0].status
    except (OSError, http.client.HTTPException):
        return 0


# ---- heads

ODD_VALUES = (
    b"*/*;q=\xff|text/event-stream|application/openmetrics-text; version=9|bytes=-|bytes=0-0,2-|*|wait=|null|\xc3\x28"
    b'|bytes=99999999999999999999-|W/"|Sun, 31 Feb 1999 99:99:99 GMT|wait=99999999999|handling=strict;wait=-1|-1|'
    b"999999999999999999999999999999|127.0.0.1|::1, , ,[|bearer, "
).split(b"|")
VALUES = st.one_of(
    st.binary(max_size=60).map(lambda value: bytes(byte for byte in value if byte == 9 or 32 <= byte != 127)),
    st.sampled_from(ODD_VALUES),
)
NAMES = st.sampled_from(
    b"Accept Accept-Encoding Access-Control-Request-Method Authorization Content-Type Cookie Forwarded Host "
    b"Idempotency-Key If-Match If-Modified-Since If-None-Match If-Range If-Unmodified-Since Last-Event-ID Origin "
    b"Prefer Range Referer Sec-WebSocket-Protocol X-API-Key X-Forwarded-For X-Forwarded-Host "
    b"X-HTTP-Method-Override X-Real-IP X-Request-ID".split()
)
QUERY_NAMES = "limit since cursor status gpu type backend include dryRun ticket workflowId".split()  # noqa: SIM905
QUERY_VALUES = "-1 9999999999999999999999999 1e5 %00 %ff %F0%9F%98%80 true %2e%2e%2f nan bl8x".split()  # noqa: SIM905
QUERIES = st.one_of(
    st.text("&=%;+[]0123456789abcdefABCDEF", max_size=30),
    st.tuples(
        st.sampled_from(
            [
                "limit",
                "since",
                "cursor",
                "status",
                "gpu",
                "type",
                "backend",
                "include",
                "dryRun",
                "ticket",
                "workflowId",
            ]
        ),
        st.sampled_from(
            [
                "-1",
                "9999999999999999999999999",
                "1e5",
                "%00",
                "%ff",
                "%F0%9F%98%80",
                "true",
                "%2e%2e%2f",
                "nan",
                "bl8x",
            ]
        ),
    ).map("=".join),
)
TARGETS = st.sampled_from(
    f"/ // /%00 /health /metrics /docs/json {STREAM} {PATH} {PATH}/x {PATH}/x/outputs/{'9' * 30} "
    f"{PATH}/00000000-0000-4000-8000-000000000000/events /v1/comfyui/models /v1/comfyui/outputs "
    "/v1/comfyui/output/kit_00001_.png /v1/comfyui/output/%2e%2e/x /v1/comfyui/output/%ff "
    "/v1/comfyui/queue/resume".split()
)


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    method=st.sampled_from(["GET", "HEAD", "POST", "DELETE", "PATCH", "OPTIONS", "PUT", "TRACE"]),
    target=TARGETS,
    query=QUERIES,
    headers=st.lists(st.tuples(NAMES, VALUES), max_size=8),
)
@example(method="GET", target=PATH, query="since=-94046655562731873107968", headers=[])
@example(method="GET", target=PATH, query=f"since={2**63}", headers=[(b"Accept", b"\xff")])
def test_whatever_the_head_says(
    doors: Doors, method: str, target: str, query: str, headers: list[tuple[bytes, bytes]]
) -> None:
    head = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
    request = f"{method} {target}?{query} HTTP/1.1\r\n".encode() + AUTHORIZED
    request += b"Host: x\r\nContent-Length: 0\r\nConnection: close\r\n" + head + b"\r\n"
    with doors.open(request) as connection:
        reply, body = read_reply(connection, method)
    assert reply.status < 500, (reply.status, body)
    (request_id,) = reply.headers.get_all("x-request-id", [])
    assert KEY.encode() not in body
    assert KEY not in str(reply.headers)
    if reply.status >= 400 and method != "HEAD":
        assert reply.headers["content-type"] == "application/problem+json"
        problem = json.loads(body)
        assert (problem["status"], problem["requestId"]) == (reply.status, request_id)
        assert b"/site-packages/" not in body
        assert "allow" in reply.headers or reply.status != 405


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # TLS
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"GET  HTTP/1.1\r\n\r\n", 400),
        (b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nA: b\0c\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n folded: no\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3, 3\r\n\r\nabc", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: +3\r\n\r\nabc", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0x3\r\n\r\nabc", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n", 400),
        (b"GET /health HTTP/1.0\r\nHost: x\r\nhost: y\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nX-Forwarded-Host: x\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nX-Long: " + b"x" * 100_000 + b"\r\n\r\n", 431),
        (b"GET /health HTTP/1.1\r\n" + b"x: y\r\n" * 20_000 + b"\r\n", 431),
        (b"GET /health?" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n", 431),
    ],
    ids=lambda value: repr(value[:40]) if isinstance(value, bytes) else None,
)
def test_what_is_no_request_is_told_so_and_the_connection_ends(doors: Doors, request_: bytes, status: int) -> None:
    with doors.open(request_) as connection:
        reply, body = read_reply(connection)
        assert reply.status == status, body
        assert reply.headers["content-type"] == "application/problem+json"
        assert reply.headers["connection"] == "close"
        problem = json.loads(body)
        assert (problem["status"], problem["requestId"]) == (status, reply.headers["x-request-id"])
        with_what_is_left = b""
        while more := connection.recv(65536):  # the server does not stay
            with_what_is_left += more
        assert not with_what_is_left


def test_a_head_without_an_end_is_broken_off(doors: Doors) -> None:
    for start, piece in ((b"GET / HTTP/1.1\r\nA: ", b"a" * 65536), (b"GET / HTTP/1.1\r\n", b"a: b\r\n" * 10_000)):
        with doors.open(start) as connection:
            sent = [0]

            def send(piece: bytes = piece, connection: socket.socket = connection, sent: list[int] = sent) -> None:
                while sent[0] < 1 << 28:
                    connection.sendall(piece)
                    sent[0] += len(piece)

            assert outcome(send, connection) in (0, 431)
            assert sent[0] < 1 << 24, "what the kernel takes, but not what the process keeps"


def test_a_body_for_nobody_is_broken_off(doors: Doors) -> None:
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nX-API-Key: wrong\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    for piece in (b"10000\r\n" + b"a" * 65536 + b"\r\n", b"0\r\n" + b"a: b\r\n" * 10_000):
        with doors.open(head) as connection:
            assert read_reply(connection)[0].status == 401
            sent = 0
            with suppress(OSError):  # reset, or a broken pipe
                while sent < 1 << 28:
                    connection.sendall(piece)
                    sent += len(piece)
            assert sent < 1 << 26


# ---- names that are not what they seem


@pytest.mark.parametrize(
    "value", [b"a\x01b", b"a\x1b[31mb", b"a\tb", b"a b", b"\xff", b"\xc2\x85", b"../x", b'"', b"{}", b"x" * 129, b""]
)
def test_a_request_id_is_a_plain_word_or_ours(doors: Doors, value: bytes) -> None:
    for target in (b"/nothing", b"/health", STREAM.encode()):
        head = b"GET " + target + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Request-Id: " + value + b"\r\n\r\n"
        with doors.open(head) as connection:
            reply, _ = read_reply(connection)
        (ours,) = reply.headers.get_all("x-request-id", [])
        assert re.fullmatch(r"[0-9a-f]{32}", ours)
    assert all("\x1b" not in line and "\x01" not in line for line in doors.process.seen)


def test_of_two_request_ids_the_first_counts(doors: Doors) -> None:
    for ids, told in (((b"one", b"two"), "one"), ((b"not sane", b"two"), None)):
        head = b"".join(b"X-Request-Id: " + one + b"\r\n" for one in ids)
        with doors.open(b"GET /health HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n") as connection:
            (given,) = read_reply(connection)[0].headers.get_all("x-request-id", [])
        assert given == told if told else re.fullmatch(r"[0-9a-f]{32}", given)


def test_what_a_body_of_two_lengths_hides_is_no_request(doors: Doors) -> None:
    """Smuggling: what a proxy takes for a body must not be taken for a request behind it."""
    hidden = f"DELETE {PATH}/x HTTP/1.1\r\nHost: x\r\n".encode() + AUTHORIZED + b"\r\n"
    size = str(len(hidden) + 5).encode()
    for lengths in (
        b"Content-Length: " + size + b"\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: " + size + b"\r\n",
        b"Content-Length: 5\r\nContent-Length: " + size + b"\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
    ):
        request = f"POST {PATH} HTTP/1.1\r\nHost: x\r\n".encode() + AUTHORIZED + lengths + b"\r\n0\r\n\r\n" + hidden
        with doors.open(request) as connection:
            reply, body = read_reply(connection)
            assert (reply.status, reply.headers["connection"]) == (400, "close"), body
            assert not connection.recv(65536), "one answer, and no more"


# ---- who is asking

ADDRESS_LISTS = st.lists(
    st.one_of(VALUES, st.sampled_from([b"1.2.3.4", b"[::1]:80", b"10.0.0.1, 10.0.0.2", b"unknown"]))
)


@settings(max_examples=200, deadline=None)
@given(lists=ADDRESS_LISTS)
def test_a_forwarded_address_is_never_anything_else(lists: list[bytes]) -> None:
    headers = [(b"x-forwarded-for", value) for value in lists]
    assert ClientAddress().of("192.0.2.9", headers) == "192.0.2.9"
    trusting = ClientAddress(networks("192.0.2.0/24,10.0.0.0/8"))
    assert trusting.of("198.51.100.7", headers) == "198.51.100.7", "a peer that nobody trusts"
    found = trusting.of("192.0.2.9", headers)
    assert socket.inet_pton(socket.AF_INET6 if ":" in found else socket.AF_INET, found)


def test_an_invented_address_does_not_get_around_the_limit(tmp_path: Path) -> None:
    names = ["X-Forwarded-For", "Forwarded", "X-Real-IP", "X-Client-IP"] * 3
    with (
        served(tmp_path, MANAGEMENT_API_RATE_LIMIT="5/minute") as (url, _),
        httpx.Client(base_url=url, headers={"X-API-Key": KEY}) as client,
    ):
        statuses = [client.get(PATH, headers={name: f"198.51.100.{n}"}).status_code for n, name in enumerate(names)]
    assert statuses == [200] * 5 + [429] * 7


# ---- slow clients


class Impatient(GuardedHttpProtocol):
    head_seconds = 0.3


@asynccontextmanager
async def impatient() -> AsyncIterator[tuple[str, int]]:
    """A server with little patience; its app takes longer than that, and reads no body."""

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})
            while (await receive())["type"] == "websocket.receive":
                await send({"type": "websocket.send", "text": "heard"})
            return
        if scope["path"] == "/long":
            await asyncio.sleep(1)
        elif scope["path"] == "/body":
            while (await receive())["more_body"]:
                pass
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    config = uvicorn.Config(
        cast("Any", app), http=Impatient, ws="management_api.fast_websocket:FastWebSocketProtocol", lifespan="off"
    )
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        await server.startup(sockets=[listener])
        try:
            yield address
        finally:
            await server.shutdown(sockets=[listener])


async def trickle(address: tuple[str, int], first: bytes, piece: bytes) -> float:
    """Seconds until the server ends a connection that goes on with `piece` again and again."""
    reader, writer = await asyncio.open_connection(*address)
    began = time.monotonic()

    async def go_on() -> None:
        writer.write(first)
        while piece:
            await asyncio.sleep(0.05)  # the slowness is the point
            writer.write(piece)

    task = asyncio.create_task(go_on())
    try:
        async with asyncio.timeout(SECONDS):
            while await reader.read(1000):
                pass
    except ConnectionError:
        pass
    finally:
        task.cancel()
        await asyncio.wait([task])
        writer.close()
    return time.monotonic() - began


async def test_who_is_slow_with_a_head_is_left() -> None:
    post = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"
    async with impatient() as address:
        seconds = await asyncio.gather(
            trickle(address, b"", b""),  # says nothing
            trickle(address, b"GET / HTTP/1.1\r\n", b""),
            trickle(address, b"GET / HTTP/1.1\r\n", b"a: b\r\n"),
            trickle(address, b"GET / HTTP/1.1\r\nA: ", b"a"),
            trickle(address, b"\r\n", b"\r\n"),
            trickle(address, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\r\n"),  # has had its answer
            trickle(address, b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\n", b"a: b\r\n"),
            trickle(address, post, b"a"),
        )
    assert all(0.2 < one < 3 for one in seconds), seconds


async def test_who_is_slow_for_a_reason_is_not() -> None:
    async with impatient() as address, httpx.AsyncClient(base_url=f"http://{address[0]}:{address[1]}") as client:
        assert (await client.get("/long")).text == "ok"

        async def body() -> AsyncIterator[bytes]:
            for _ in range(10):
                await asyncio.sleep(0.1)
                yield b"a"

        assert (await client.post("/body", content=body())).text == "ok"

        def converse() -> list[str | bytes]:
            # On a connection that had an answer before: what follows the upgrade is no late body.
            connection = socket.create_connection(address, SECONDS)
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert read_reply(connection)[1] == b"ok"
            with connect(f"ws://{address[0]}:{address[1]}/", sock=connection) as stream:
                heard = []
                for _ in range(2):
                    time.sleep(0.5)
                    stream.send("hello")
                    heard.append(stream.recv(SECONDS))
                return heard

        assert await asyncio.to_thread(converse) == ["heard", "heard"]


def test_half_open_connections_stop_nobody(doors: Doors) -> None:
    with ExitStack() as stack:
        for n in range(200):
            started = (b"", b"GET /health HTTP/1.1\r\nHo", f"POST {PATH} HTTP/1.1\r\n".encode() + AUTHORIZED)[n % 3]
            stack.enter_context(doors.open(started))
        began = time.monotonic()
        listener = stack.enter_context(doors.listen())
        reply = doors.client.post(PATH, json={"workflow": picture()}, headers={"Prefer": f"wait={SECONDS}"})
        assert reply.json()["status"] == "completed"
        assert json.loads(listener.recv(SECONDS))["workflowId"] == reply.json()["workflowId"]
        assert time.monotonic() - began < SECONDS / 2
