"""Models and outputs over HTTP: `routes.files` and `routes.ranged` in a real Litestar app, with real files."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from email.utils import formatdate
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import uvicorn
from litestar import Litestar
from litestar.di import Provide
from msgspec import Struct

from management_api.errors import exception_handlers
from managers.clock import SystemClock, new_id
from managers.files import Files, FilesConfig, OutputOwner
from managers.workflows.outputs import OutputDoor
from managers.workflows.sqlite_store import SqliteStore
from routes.files import files_routes
from routes.ranged import RangedResponse, content_disposition, plan
from tests.serving import StartService

OUTPUT = "/v1/comfyui/output/"
OUTPUTS = "/v1/comfyui/outputs"
SOME_TIME = 1_700_000_000
ETAG = '"abc-64"'


class Owner(Struct, frozen=True):
    workflow_id: str
    node_id: str | None = None


class Record(Struct):
    """Who reported what, in memory: the port `OutputOwners`."""

    owners: dict[str, Owner]

    async def workflows_of(self, paths: Sequence[str]) -> Mapping[str, OutputOwner]:
        return {path: self.owners[path] for path in paths if path in self.owners}

    async def paths_of(self, workflow_id: str) -> Sequence[str]:
        return [path for path, owner in self.owners.items() if owner.workflow_id == workflow_id]


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    folder = tmp_path / "output"
    folder.mkdir()
    return folder


@pytest.fixture
def app(outputs: Path, tmp_path: Path) -> Iterator[Litestar]:
    record = Record({"jobs/7/new.png": Owner("w-1", "9"), "b.png": Owner("w-2")})
    files = Files(FilesConfig(outputs=outputs, models={"loras": tmp_path / "loras"}), record)
    door = OutputDoor(SqliteStore(tmp_path / "data", clock=SystemClock(), ids=new_id, aging_seconds=600), [])
    yield Litestar(
        files_routes,
        dependencies={
            "files": Provide(lambda: files, sync_to_thread=False),
            "output_door": Provide(lambda: door, sync_to_thread=False),
        },
        exception_handlers=exception_handlers(),
        logging_config=None,
    )
    files.close()


@pytest.fixture
async def client(app: Litestar) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(cast(Any, app))
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver.local") as client:
        yield client


@asynccontextmanager
async def serving(app: Any) -> AsyncIterator[tuple[int, uvicorn.Server]]:
    """The app behind a real uvicorn; yields its port, and the server itself."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="critical"))
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield int(listener.getsockname()[1]), server
        finally:
            server.should_exit = True
            await task


def put(root: Path, path: str, content: bytes = b"x", at: float | None = None) -> Path:
    place = root / path
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    if at is not None:
        os.utime(place, (at, at))
    return place


# ---- the arithmetic of ranges and conditions


def planned(headers: Mapping[str, str], method: str = "GET", size: int = 100) -> tuple[int, int, int, str | None]:
    made = plan(headers, method=method, size=size, etag=ETAG, modified_at=SOME_TIME)
    assert made.headers["etag"] == ETAG
    assert made.headers["last-modified"] == formatdate(SOME_TIME, usegmt=True)
    assert made.headers["accept-ranges"] == "bytes"
    assert ("content-length" in made.headers) == (made.status in {200, 206})
    return made.status, made.start, made.length, made.headers.get("content-range")


WHOLE = (200, 0, 100, None)
OUTSIDE = (416, 0, 0, "bytes */100")


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ("bytes=0-0", (206, 0, 1, "bytes 0-0/100")),
        ("bytes=0-99", (206, 0, 100, "bytes 0-99/100")),
        ("bytes=10-19", (206, 10, 10, "bytes 10-19/100")),
        ("bytes=90-", (206, 90, 10, "bytes 90-99/100")),
        ("bytes=0-", (206, 0, 100, "bytes 0-99/100")),
        ("bytes=99-500", (206, 99, 1, "bytes 99-99/100")),
        ("bytes=-1", (206, 99, 1, "bytes 99-99/100")),
        ("bytes=-500", (206, 0, 100, "bytes 0-99/100")),
        ("Bytes = 5-6 ", (206, 5, 2, "bytes 5-6/100")),
        ("bytes=100-", OUTSIDE),
        ("bytes=100-200", OUTSIDE),
        ("bytes=-0", OUTSIDE),
        (f"bytes={10**30}-", OUTSIDE),
        ("bytes=9-3", WHOLE),
        ("bytes=-", WHOLE),
        ("bytes=", WHOLE),
        ("bytes", WHOLE),
        ("bytes=a-b", WHOLE),
        ("bytes=1-2-3", WHOLE),
        ("bytes=--1", WHOLE),
        ("bytes=+1-2", WHOLE),
        ("bytes=٣-٥", WHOLE),
        ("bytes=0-1,4-5", WHOLE),
        ("items=0-1", WHOLE),
        ("", WHOLE),
        ("bytes=" + "9" * 5000 + "-", WHOLE),
    ],
)
def test_ranges(asked: str, answer: tuple[int, int, int, str | None]) -> None:
    assert planned({"range": asked}) == answer
    assert planned({"range": asked}, "HEAD") == WHOLE  # a range is for GET only


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ("bytes=0-", (416, 0, 0, "bytes */0")),
        ("bytes=0-0", (416, 0, 0, "bytes */0")),
        ("bytes=-0", (416, 0, 0, "bytes */0")),
        ("bytes=-5", (200, 0, 0, None)),  # satisfiable by RFC 9110 §14.1.2, and there is nothing to name
    ],
)
def test_ranges_of_an_empty_file(asked: str, answer: tuple[int, int, int, str | None]) -> None:
    assert planned({"range": asked}, size=0) == answer


EARLIER, SAME, LATER = (formatdate(SOME_TIME + seconds, usegmt=True) for seconds in (-1, 0, 1))
NOT_MODIFIED = (304, 0, 0, None)
FAILED = (412, 0, 0, None)
PART = (206, 0, 5, "bytes 0-4/100")


@pytest.mark.parametrize(
    ("headers", "answer"),
    [
        ({"if-none-match": ETAG}, NOT_MODIFIED),
        ({"if-none-match": f"W/{ETAG}"}, NOT_MODIFIED),
        ({"if-none-match": f'"x", {ETAG} ,"y"'}, NOT_MODIFIED),
        ({"if-none-match": "*"}, NOT_MODIFIED),
        ({"if-none-match": '"other"'}, WHOLE),
        ({"if-none-match": "abc-64"}, WHOLE),
        ({"if-none-match": '"other"', "if-modified-since": LATER}, WHOLE),  # the date is not looked at
        ({"if-none-match": ETAG, "range": "bytes=0-4"}, NOT_MODIFIED),
        ({"if-modified-since": EARLIER}, WHOLE),
        ({"if-modified-since": SAME}, NOT_MODIFIED),
        ({"if-modified-since": LATER}, NOT_MODIFIED),
        ({"if-modified-since": "Tue, 14 Nov 2023 22:13:20 -0000"}, NOT_MODIFIED),  # the same moment
        ({"if-modified-since": "yesterday"}, WHOLE),
        ({"if-modified-since": "Mon, 99 Foo 2023 99:99:99 GMT"}, WHOLE),
        ({"if-match": ETAG}, WHOLE),
        ({"if-match": "*"}, WHOLE),
        ({"if-match": f"W/{ETAG}"}, FAILED),  # a weak one proves nothing
        ({"if-match": '"other"'}, FAILED),
        ({"if-match": '"other"', "if-none-match": ETAG}, FAILED),
        ({"if-unmodified-since": EARLIER}, FAILED),
        ({"if-unmodified-since": SAME}, WHOLE),
        ({"if-unmodified-since": EARLIER, "if-match": ETAG}, WHOLE),
        ({"range": "bytes=0-4", "if-range": ETAG}, PART),
        ({"range": "bytes=0-4", "if-range": SAME}, PART),
        ({"range": "bytes=0-4", "if-range": f"W/{ETAG}"}, WHOLE),
        ({"range": "bytes=0-4", "if-range": '"other"'}, WHOLE),
        ({"range": "bytes=0-4", "if-range": LATER}, WHOLE),
        ({"range": "bytes=200-", "if-range": '"other"'}, WHOLE),
        ({"if-range": ETAG}, WHOLE),
    ],
)
def test_conditions(headers: dict[str, str], answer: tuple[int, int, int, str | None]) -> None:
    assert planned(headers) == answer


def test_content_disposition() -> None:
    assert content_disposition("img_00001_.png", inline=True) == 'inline; filename="img_00001_.png"'
    assert content_disposition("a b.bin", inline=False) == 'attachment; filename="a b.bin"'
    assert content_disposition("é%.png", inline=True) == "inline; filename=\"__.png\"; filename*=UTF-8''%C3%A9%25.png"
    evil = content_disposition('a"; filename="b.html\r\nx: y', inline=False)
    assert evil.startswith("attachment; filename=\"a_; filename=_b.html__x_ y\"; filename*=UTF-8''a%22")
    assert "\r" not in evil
    assert "\n" not in evil


# ---- over HTTP


async def test_a_file_comes_whole_with_everything_a_client_needs(client: httpx.AsyncClient, outputs: Path) -> None:
    data = os.urandom(700_000)  # three chunks
    put(outputs, "sub/ä.png", data, at=SOME_TIME)
    reply = await client.get(OUTPUT + "sub/%C3%A4.png")
    assert (reply.status_code, reply.content) == (200, data)
    assert dict(reply.headers) == {
        "content-type": "image/png",
        "content-length": "700000",
        "content-disposition": "inline; filename=\"_.png\"; filename*=UTF-8''%C3%A4.png",
        "etag": f'"{SOME_TIME * 10**9:x}-{700_000:x}"',
        "last-modified": formatdate(SOME_TIME, usegmt=True),
        "accept-ranges": "bytes",
        "cache-control": "private, no-cache",
    }
    head = await client.head(OUTPUT + "sub/%C3%A4.png")
    assert (head.status_code, head.content, head.headers) == (200, b"", reply.headers)


async def test_an_empty_file(client: httpx.AsyncClient, outputs: Path) -> None:
    put(outputs, "empty.txt", b"")
    reply = await client.get(OUTPUT + "empty.txt")
    assert (reply.status_code, reply.content, reply.headers["content-length"]) == (200, b"", "0")


async def test_a_download_is_resumed(client: httpx.AsyncClient, outputs: Path) -> None:
    data = os.urandom(600_000)
    put(outputs, "a.mp4", data)
    url = OUTPUT + "a.mp4"
    start = await client.get(url, headers={"Range": "bytes=0-299999"})
    assert (start.status_code, start.headers["content-range"]) == (206, "bytes 0-299999/600000")
    rest = await client.get(url, headers={"Range": "bytes=300000-", "If-Range": start.headers["etag"]})
    assert (rest.status_code, rest.headers["content-length"]) == (206, "300000")
    assert start.content + rest.content == data
    assert (await client.get(url, headers={"Range": "bytes=-10"})).content == data[-10:]
    put(outputs, "a.mp4", data[::-1])
    fresh = await client.get(url, headers={"Range": "bytes=300000-", "If-Range": start.headers["etag"]})
    assert (fresh.status_code, fresh.content) == (200, data[::-1])


async def test_refusals_carry_what_the_client_needs_to_do_better(client: httpx.AsyncClient, outputs: Path) -> None:
    put(outputs, "a.png", bytes(100))
    reply = await client.get(OUTPUT + "a.png", headers={"Range": "bytes=100-"})
    assert (reply.status_code, reply.headers["content-range"]) == (416, "bytes */100")
    assert reply.headers["content-type"] == "application/problem+json"
    assert int(reply.headers["content-length"]) == len(reply.content)
    reply = await client.get(OUTPUT + "a.png", headers={"If-Match": '"other"'})
    assert (reply.status_code, "etag" in reply.headers) == (412, True)


async def test_a_copy_is_kept_until_the_file_changes(client: httpx.AsyncClient, outputs: Path) -> None:
    put(outputs, "a.png", b"one", at=SOME_TIME)
    etag = (await client.get(OUTPUT + "a.png")).headers["etag"]
    kept = await client.get(OUTPUT + "a.png", headers={"If-None-Match": etag})
    assert (kept.status_code, kept.content, kept.headers["etag"]) == (304, b"", etag)
    assert kept.headers["cache-control"] == "private, no-cache"
    assert "content-length" not in kept.headers
    assert "content-type" not in kept.headers
    put(outputs, "a.png", b"two", at=SOME_TIME + 1)
    changed = await client.get(OUTPUT + "a.png", headers={"If-None-Match": etag})
    assert (changed.status_code, changed.content) == (200, b"two")


@pytest.mark.parametrize("name", ["a.html", "a.svg", "a.js", "a.xml", "a.HTML", "a.xhtml", "a.pdf", "a.unknown"])
async def test_what_could_run_is_saved_not_shown(client: httpx.AsyncClient, outputs: Path, name: str) -> None:
    put(outputs, name, b"<script>alert(1)</script>")
    headers = (await client.get(OUTPUT + name)).headers
    assert headers["content-type"] == "application/octet-stream"
    assert headers["content-disposition"] == f'attachment; filename="{name}"'


async def test_delete(client: httpx.AsyncClient, outputs: Path) -> None:
    place = put(outputs, "sub/a.png")
    reply = await client.delete(OUTPUT + "sub/a.png")
    assert (reply.status_code, reply.content, place.exists()) == (204, b"", False)
    assert (await client.delete(OUTPUT + "sub/a.png")).status_code == 404
    assert (await client.delete(OUTPUT + "sub")).status_code == 404


async def test_what_is_named_is_deleted_and_nothing_else(tmp_path: Path, start_service: StartService) -> None:
    """A name may be in the folders of every backend, and in several of one: without that the address means ours."""
    outputs = tmp_path / "shared" / "output"
    outputs.mkdir(parents=True)
    backends = "near=http://127.0.0.1:9,far=http://127.0.0.2:9"
    client = (await start_service(COMFYUI_BACKENDS=backends, COMFYUI_OUTPUTS=str(outputs))).client
    places = {kind: put(outputs.parent, f"{kind}/jobs/a.png") for kind in ("output", "temp", "input")}

    async def delete(**query: str) -> tuple[int, dict[str, Any], set[str]]:
        reply = await client.delete(OUTPUT + "jobs/a.png", params=query)
        return (
            reply.status_code,
            reply.json() if reply.content else {},
            {k for k, at in places.items() if at.exists()},
        )

    status, told, left = await delete(backend="nobody")
    assert (status, left) == (400, set(places))
    assert told["errors"][0]["input"] == "backend"
    assert told["errors"][0]["allowed"] == ["near", "far"]
    status, told, left = await delete(backend="near", type="secret")
    assert (status, left, told["errors"][0]["input"]) == (400, set(places), "type")
    for query, word in (
        ({"backend": "far"}, "far"),
        ({"backend": "far", "type": "temp"}, "far"),
        ({"type": "input"}, "input"),
        ({"backend": "near", "type": "input"}, "input"),
    ):
        status, told, left = await delete(**query)
        assert (status, left, word in told["message"]) == (409, set(places), True), query
    assert await delete(backend="near", type="temp") == (204, {}, {"output", "input"})
    assert (await delete(backend="near", type="temp"))[0] == 404
    assert await delete(backend="near") == (204, {}, {"input"})
    put(outputs, "jobs/a.png")
    assert await delete(type="output") == (204, {}, {"input"})


async def test_a_method_that_is_none_names_those_that_are(client: httpx.AsyncClient, outputs: Path) -> None:
    put(outputs, "a.png")
    reply = await client.post(OUTPUT + "a.png")
    assert reply.status_code == 405
    assert {"GET", "HEAD", "DELETE"} <= set(reply.headers["allow"].split(", "))


async def test_outputs_are_listed_in_pages_with_urls_that_work(client: httpx.AsyncClient, outputs: Path) -> None:
    put(outputs, "jobs/7/new.png", b"12345", at=SOME_TIME)
    put(outputs, "b.png", at=SOME_TIME - 1)
    put(outputs, "sub/ä #1?.png", b"strange", at=SOME_TIME - 2)
    first = (await client.get(OUTPUTS, params={"limit": 1})).json()
    assert first["outputs"] == [
        {
            "filename": "new.png",
            "subfolder": "jobs/7",
            "workflowId": "w-1",
            "nodeId": "9",
            "type": "png",
            "size": 5,
            "createdAt": SOME_TIME * 1000,
            "url": "/v1/comfyui/output/jobs/7/new.png",
        }
    ]
    rest = (await client.get(OUTPUTS, params={"cursor": first["nextCursor"]})).json()
    assert [entry["filename"] for entry in rest["outputs"]] == ["b.png", "ä #1?.png"]
    assert rest["nextCursor"] is None
    assert "nodeId" not in rest["outputs"][0]
    assert rest["outputs"][1]["workflowId"] == "unknown"
    assert (await client.get(rest["outputs"][1]["url"])).content == b"strange"
    filtered = (await client.get(OUTPUTS, params={"workflowId": "w-2", "limit": 1})).json()
    assert [entry["filename"] for entry in filtered["outputs"]] == ["b.png"]


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x", "cursor=x", "cursor="])
async def test_a_wrong_question_for_outputs_is_refused(client: httpx.AsyncClient, query: str) -> None:
    assert (await client.get(f"{OUTPUTS}?{query}")).status_code == 400


async def test_models(client: httpx.AsyncClient, tmp_path: Path) -> None:
    put(tmp_path, "loras/style/a.safetensors", b"1234", at=SOME_TIME)
    expected = {
        "name": "style/a.safetensors",
        "type": "loras",
        "size": 4,
        "hash": None,
        "modifiedAt": SOME_TIME * 1000,
    }
    for query in ("", "?type=loras"):
        reply = await client.get("/v1/comfyui/models" + query)
        assert (reply.status_code, reply.json()) == (200, {"models": [expected]})
    assert (await client.get("/v1/comfyui/models?type=vae")).json() == {"models": []}
    assert (await client.get("/v1/comfyui/models?type=clip")).status_code == 400


def test_the_documentation_tells_every_reply(app: Litestar) -> None:
    paths = app.openapi_schema.to_schema()["paths"]
    read = paths[OUTPUT + "{path}"]["get"]
    assert {"200", "206", "304", "404", "410", "412", "416", "503"} <= set(read["responses"])
    assert set(paths[OUTPUT + "{path}"]) >= {"get", "head", "delete"}
    assert [parameter["name"] for parameter in read["parameters"]] == ["path", "backend", "type"]
    removed = paths[OUTPUT + "{path}"]["delete"]
    assert [parameter["name"] for parameter in removed["parameters"]] == ["path", "backend", "type"]
    listed = {parameter["name"]: parameter for parameter in paths[OUTPUTS]["get"]["parameters"]}
    assert set(listed) == {"workflowId", "limit", "cursor"}
    assert listed["limit"]["schema"]["maximum"] == 1000
    assert [parameter["name"] for parameter in paths["/v1/comfyui/models"]["get"]["parameters"]] == ["type"]


# ---- over real sockets


async def raw(port: int, method: str, target: str) -> tuple[int, bytes]:
    """A request line exactly as given: no client library tidies the path."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        reply = await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()
        await writer.wait_closed()
    return int(reply.split(b" ", 2)[1]), reply


ESCAPES = [
    "../secret.png",
    "%2e%2e/secret.png",
    "%2e%2e%2fsecret.png",
    "%2E%2E%2Fsecret.png",
    ".%2e/secret.png",
    "..%2fsecret.png",
    "..%5csecret.png",
    "%2e%2e%5csecret.png",
    "..\\secret.png",
    "sub/../../secret.png",
    "sub/%2e%2e/%2e%2e/secret.png",
    "sub%2f..%2f..%2fsecret.png",
    "%252e%252e%252fsecret.png",
    "..%c0%afsecret.png",
    "%c0%ae%c0%ae/secret.png",
    "%ff%fe.png",
    "%00",
    "a.png%00",
    "a.png%00.txt",
    "/a.png",
    "//a.png",
    "%2fa.png",
    "sub//a.png",
    "sub/%2fa.png",
    "./a.png",
    "%2e/a.png",
    "a.png/",
    "a.png%2f",
    "sub",
    "sub/",
    "",
    "leaves.png",
    "leaves/secret.png",
    "%0d%0aset-cookie:x",
    "x" * 4000,
    "x%2f" * 1000,
]


async def test_no_encoding_leads_out(app: Litestar, outputs: Path, tmp_path: Path) -> None:
    put(outputs, "a.png", b"fine")
    put(outputs, "sub/a.png", b"fine")
    put(outputs, "\ufffd\ufffd.png", b"not for %ff%fe")
    put(tmp_path, "secret.png", b"not for you")
    (outputs / "leaves.png").symlink_to(tmp_path / "secret.png")
    (outputs / "leaves").symlink_to(tmp_path)
    escapes = [*ESCAPES, f"{tmp_path}/secret.png", str(outputs / "a.png"), f"%2f{tmp_path.name}"]
    async with serving(app) as (port, _):
        assert (await raw(port, "GET", OUTPUT + "sub%2fa.png"))[0] == 200
        for method in ("GET", "HEAD", "DELETE"):
            for escape in escapes:
                status, reply = await raw(port, method, OUTPUT + escape)
                assert status in {404, 405} if escape == "" else status == 404, (method, escape)
                assert b"not for you" not in reply
    assert (tmp_path / "secret.png").exists()
    assert (outputs / "a.png").exists()


async def test_a_file_cut_short_underneath_breaks_the_connection(app: Litestar, outputs: Path) -> None:
    place = put(outputs, "film.mp4", b"")
    os.truncate(place, 256 * 1024 * 1024)  # sparse, and more than any socket buffer holds
    async with serving(app) as (port, _), httpx.AsyncClient(timeout=10) as client:
        async with client.stream("GET", f"http://127.0.0.1:{port}{OUTPUT}film.mp4") as reply:
            assert reply.status_code == 200
            chunks = reply.aiter_raw()
            await anext(chunks)
            os.truncate(place, 1024)
            with pytest.raises(httpx.RemoteProtocolError, match="without sending complete message body"):
                async for _ in chunks:
                    pass
        assert (await client.get(f"http://127.0.0.1:{port}{OUTPUT}film.mp4")).content == bytes(1024)


async def test_a_source_that_ends_too_early_breaks_the_connection() -> None:
    """As a backend may, halfway through its own answer."""

    async def short(start: int, length: int) -> AsyncGenerator[bytes, None]:
        yield bytes(length - 1)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        decided = plan({}, method="GET", size=100, etag=ETAG, modified_at=SOME_TIME)
        await RangedResponse(decided, short, headers={}, head=False)(scope, receive, send)

    async with serving(app) as (port, _), httpx.AsyncClient(timeout=10) as client:
        with pytest.raises(httpx.RemoteProtocolError, match="without sending complete message body"):
            await client.get(f"http://127.0.0.1:{port}/")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only Linux tells which files are open")
async def test_a_client_that_goes_away_ends_the_reading(app: Litestar, outputs: Path) -> None:
    place = put(outputs, "film.mp4", b"")
    os.truncate(place, 1024**4)  # sparse; reading it to its end would take minutes

    def is_open() -> bool:
        return any(os.path.realpath(descriptor) == str(place) for descriptor in Path("/proc/self/fd").iterdir())

    async with serving(app) as (port, server):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"GET {OUTPUT}film.mp4 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        await reader.readexactly(1024)
        assert is_open()
        writer.transport.abort()
        _, reading = await asyncio.wait(server.server_state.tasks, timeout=10)
        assert not reading
        assert not is_open()
