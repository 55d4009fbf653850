"""Bad input gets a clear problem that names the place, and leaves nothing behind: over the whole service."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.queue_kit import PATH, House, Queue, Site, picture, workflow
from tests.serving import KEY

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """ComfyUI is away: what is taken waits, so that all that was stored can be counted."""
    return Site(tmp_path_factory.mktemp("site"))


@pytest.fixture
async def queue(site: Site) -> AsyncIterator[House]:
    async with site.fresh() as service:
        yield service


def problem(reply: httpx.Response, status: int) -> dict[str, Any]:
    assert reply.status_code == status, reply.text[:2000]
    assert reply.headers["content-type"] == "application/problem+json"
    found: dict[str, Any] = reply.json()
    assert found["status"] == status
    assert found["detail"]
    assert "Traceback" not in reply.text
    assert "/site-packages/" not in reply.text
    return found


async def nothing_stored(queue: Queue) -> None:
    """No workflow, no event."""
    assert await queue.list() == {"workflows": [], "nextCursor": None}
    async with queue.stream(since=0) as stream:
        assert (await stream.until("subscribed"))["seq"] == 0


def nested(levels: int) -> bytes:
    """A graph with a value of so many levels."""
    return b'{"workflow":{"1":{"class_type":"X","inputs":{"a":' + b"[" * levels + b"]" * levels + b"}}}}"


def spoiled(change: Callable[[dict[str, Any]], object], **fields: Any) -> bytes:
    """A good body that something was done to."""
    body: dict[str, Any] = {"workflow": picture()} | fields
    change(body)
    return json.dumps(body).encode()


GOOD = json.dumps({"workflow": workflow("empty_save")})
CASES: dict[str, tuple[bytes, int, str | None]] = {
    # what: body, status, the pointer or None where there is no place to name
    "no JSON": (b"hello", 400, ""),
    "nothing": (b"", 400, ""),
    "half": (GOOD[:-7].encode(), 400, ""),
    "two bodies": ((GOOD + GOOD).encode(), 400, ""),
    "a list": (b"[]", 400, ""),
    "a text": (b'"workflow"', 400, ""),
    "null": (b"null", 400, ""),
    "no workflow": (b"{}", 400, "/workflow"),
    "a workflow that is null": (b'{"workflow":null}', 400, "/workflow"),
    "a workflow that is a text": (b'{"workflow":"{}"}', 400, "/workflow"),
    "a workflow that is a list": (b'{"workflow":[1]}', 400, "/workflow"),
    "a workflow of the editor": (b'{"workflow":{"nodes":[],"links":[]}}', 400, "/workflow"),
    "a whole prompt request": (f'{{"workflow":{{"prompt":{json.dumps(picture())}}}}}'.encode(), 400, "/workflow"),
    "unknown priority": (spoiled(lambda body: body, priority="urgent"), 400, "/priority"),
    "a priority that is a number": (spoiled(lambda body: body, priority=1), 400, "/priority"),
    "unknown gpu": (spoiled(lambda body: body, gpu="salad"), 400, "/gpu"),
    "an id that is none": (spoiled(lambda body: body, id="../../etc/passwd"), 400, "/id"),
    "metadata that is a text": (spoiled(lambda body: body, metadata="x"), 400, "/metadata"),
    "metadata that is large": (spoiled(lambda body: body, metadata={"x": "y" * 5000}), 400, "/metadata"),
    "extraData that is a list": (spoiled(lambda body: body, extraData=[1]), 400, "/extraData"),
    "no attempts": (spoiled(lambda body: body, maxAttempts=0), 400, "/maxAttempts"),
    "no time": (spoiled(lambda body: body, timeoutSeconds=0), 400, "/timeoutSeconds"),
    "time that is a text": (spoiled(lambda body: body, timeoutSeconds="1"), 400, "/timeoutSeconds"),
    "endless time": (spoiled(lambda body: body, timeoutSeconds=1e308), 400, "/timeoutSeconds"),
    "NaN": (spoiled(lambda body: body["workflow"]["1"]["inputs"].update(width=float("nan"))), 400, ""),
    "Infinity": (spoiled(lambda body: body, timeoutSeconds=float("inf")), 400, ""),
    "a lone surrogate in a value": (b'{"workflow":{"1":{"class_type":"\\ud800","inputs":{}}}}', 400, None),
    "a lone surrogate in metadata": (GOOD[:-1].encode() + b',"metadata":{"a":"\\ud800"}}', 400, None),
    "a lone surrogate in extraData": (GOOD[:-1].encode() + b',"extraData":{"a":"\\udc00"}}', 400, None),
    "no UTF-8": (b'{"workflow":{"1":{"class_type":"\xff\xfe","inputs":{}}}}', 400, ""),
    "no UTF-8 in what is ignored": (b'{"workflow":{},"more":"\xc3\x28"}', 400, ""),
    "10,000 levels": (nested(10_000), 400, None),
    "10,000 levels in what is ignored": (b'{"more":' + b"[" * 10_000 + b"]" * 10_000 + b"}", 400, None),
    "65 levels": (nested(65), 400, "/workflow"),
    "10,001 nodes": (
        spoiled(lambda body: body["workflow"].update({str(n): {} for n in range(10, 10_009)})), 400, "/workflow"
    ),
    "11 MiB": (b'{"workflow":"' + b"x" * (11 * 2**20) + b'"}', 413, None),
}  # fmt: skip


@pytest.mark.parametrize("what", CASES)
async def test_a_body_that_is_refused(queue: House, what: str) -> None:
    body, status, pointer = CASES[what]
    found = problem(await queue.client.post(PATH, content=body, headers=JSON), status)
    if pointer is not None:
        assert [finding.get("pointer", "") for finding in found["errors"]] == [pointer], found
    await nothing_stored(queue)
    # And the service goes on.
    assert (await queue.post(picture())).status_code == 202


def graph_with(change: Callable[[dict[str, Any]], object]) -> bytes:
    return spoiled(lambda body: change(body["workflow"]))


LIMITS: dict[str, tuple[bytes, str, int]] = {
    # what: body, the place that is named, the limit that is named
    "nodes": (graph_with(lambda graph: graph.update({str(n): {} for n in range(10, 10_009)})), "/workflow", 10_000),
    "levels": (nested(65), "/workflow", 64),
    "the id of a node": (graph_with(lambda graph: graph.update({"x" * 1001: graph["1"]})), "/workflow", 1000),
    "a class": (graph_with(lambda graph: graph["1"].update(class_type="x" * 1001)), "/workflow/1/class_type", 1000),
    "the name of an input": (graph_with(lambda graph: graph["1"]["inputs"].update({"x" * 1001: 1})),
                             "/workflow/1/inputs", 1000),
    "a text": (graph_with(lambda graph: graph["1"]["inputs"].update(a=[{"b": "x" * (2**23 + 1)}])),
               "/workflow/1", 2**23),
    "a name in a text's place": (graph_with(lambda graph: graph["1"]["inputs"].update(a={"x" * (2**23 + 1): 1})),
                                 "/workflow/1", 2**23),
    "metadata": (spoiled(lambda body: body, metadata={"x": "y" * 5000}), "/metadata", 4096),
    "gpu": (spoiled(lambda body: body, gpu="x" * 65), "/gpu", 64),
}  # fmt: skip


@pytest.mark.parametrize("what", LIMITS)
async def test_a_limit_is_named(queue: House, what: str) -> None:
    body, pointer, limit = LIMITS[what]
    reply = await queue.client.post(PATH, content=body, headers=JSON)
    found = problem(reply, 400)
    (finding,) = found["errors"]
    assert finding["pointer"] == pointer
    assert str(limit) in finding["message"]
    assert finding["message"] in found["detail"]
    assert len(reply.content) < 8000, "what was too long is not sent back"
    await nothing_stored(queue)


async def test_up_to_the_limit_all_is_well(queue: House) -> None:
    graph = picture() | {"x" * 1000: {"class_type": "y" * 1000, "inputs": {"z" * 1000: "t" * 2**23}}}
    graph["1"]["_meta"] = {"title": "a title has no limit, but what is shown of it has " * 100}
    reply = await queue.post(graph, gpu="local")
    assert reply.status_code == 202, reply.text[:1000]
    assert (await queue.get(reply.json()["workflowId"], include="workflow"))["workflow"] == graph


@pytest.mark.parametrize("field", ["priority", "id", "gpu", "maxAttempts"])
async def test_a_long_value_is_not_sent_back(queue: House, field: str) -> None:
    reply = await queue.client.post(PATH, content=spoiled(lambda body: body, **{field: "x" * 2**20}), headers=JSON)
    assert problem(reply, 400)["errors"][0]["pointer"] == f"/{field}"
    assert len(reply.content) < 4000


async def test_a_body_without_a_length_is_limited_too(queue: House) -> None:
    async def body() -> AsyncIterator[bytes]:
        for _ in range(11):
            yield b" " * 2**20

    try:
        reply = await queue.client.post(PATH, content=body(), headers=JSON)
    except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError):
        pass  # the door may be shut while we still speak
    else:
        problem(reply, 413)
    await nothing_stored(queue)


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
)
async def test_a_body_of_another_type(queue: House, kind: str) -> None:
    problem(await queue.client.post(PATH, content=GOOD, headers={"content-type": kind}), 415)
    await nothing_stored(queue)


async def test_wrong_methods(queue: House) -> None:
    for method, path, allowed in (
        ("PUT", PATH, {"GET", "POST"}),
        ("DELETE", PATH, {"GET", "POST"}),
        ("POST", f"{PATH}/{uuid.uuid4()}", {"GET", "DELETE", "PATCH"}),
        ("GET", f"{PATH}/{uuid.uuid4()}/retry", {"POST"}),
        ("DELETE", "/v1/comfyui/queue/pause", {"POST"}),
    ):
        reply = await queue.client.request(method, path)
        problem(reply, 405)
        assert allowed <= {name.strip() for name in reply.headers["allow"].split(",")}
    problem(await queue.client.get("/v1/comfyui/nothing"), 404)
    await nothing_stored(queue)


async def test_without_the_key(queue: House) -> None:
    for headers in ({"x-api-key": "wrong"}, {"x-api-key": ""}, {"authorization": f"Basic {KEY}"}):
        async with httpx.AsyncClient(base_url=queue.url, headers=headers, trust_env=False) as stranger:
            reply = await stranger.post(PATH, content=GOOD, headers=JSON)
            problem(reply, 401)
            assert reply.headers["www-authenticate"] == "Bearer"
    await nothing_stored(queue)


UGLY = [
    "..",
    "../..",
    "..%2f..%2fetc%2fpasswd",
    "%2e%2e",
    "%00",
    "a%00b",
    "%2fetc%2fpasswd",
    "....//",
    "x" * 5000,
    "%ff",
    "~",
    " ",
]


async def untidied(queue: House, method: str, path: str) -> httpx.Response:
    """The path as it is on the wire: a client would resolve the dots itself."""
    reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(queue.url).port)
    head = f"{method} {path} HTTP/1.1\r\nHost: service\r\nX-API-Key: {KEY}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode())
    async with asyncio.timeout(10):
        raw = await reader.read()
    writer.close()
    head, _, body = raw.decode().partition("\r\n\r\n")
    status, *lines = head.split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    headers.pop("content-length", None)
    return httpx.Response(int(status.split()[1]), headers=headers, text=body)


@pytest.mark.parametrize("ugly", UGLY)
async def test_traversal_in_every_path(queue: House, ugly: str) -> None:
    one = await queue.submit(picture())
    before = await queue.get(one)
    paths = [
        ("GET", f"{PATH}/{ugly}"), ("DELETE", f"{PATH}/{ugly}"), ("GET", f"{PATH}/{ugly}/events"),
        ("POST", f"{PATH}/{ugly}/retry"), ("GET", f"{PATH}/{ugly}/outputs/0"),
        ("GET", f"{PATH}/{one}/outputs/{ugly}"), ("GET", f"{PATH}/{one}/outputs/{'9' * 40}"),
        ("POST", f"/v1/comfyui/queue/{ugly}"), ("GET", f"/v1/comfyui/output/{ugly}"),
        ("DELETE", f"/v1/comfyui/output/{ugly}"), ("GET", f"/v1/comfyui/output/x/{ugly}/y.png"),
    ]  # fmt: skip
    for method, path in paths:
        reply = await untidied(queue, method, path.replace(" ", "%20"))
        assert reply.status_code in (400, 404, 405), (method, path, reply.status_code, reply.text[:300])
        problem(reply, reply.status_code)
    assert await queue.get(one) == before


@pytest.mark.parametrize(
    "query",
    [{"status": "x"}, {"limit": "ten"}, {"limit": "-1"}, {"since": "1.5"}, {"since": "-1"}, {"since": "9" * 30},
     {"cursor": "%00"}, {"cursor": "A" * 5000}, {"errorType": "sad"}, {"gpu": "\x00"}],
)  # fmt: skip
async def test_odd_queries(queue: House, query: dict[str, str]) -> None:
    reply = await queue.client.get(PATH, params=query)
    if reply.status_code == 200:
        assert reply.json() == {"workflows": [], "nextCursor": None}
        assert "gpu" in query
    else:
        problem(reply, 400)


@pytest.mark.parametrize(
    "headers",
    [{"prefer": "wait=-1"}, {"prefer": "wait=99999999999999999999"}, {"prefer": "wait=;;,=,"}, {"prefer": "\xff"},
     {"last-event-id": "-1"}],
)  # fmt: skip
async def test_odd_headers_are_ignored(queue: House, headers: dict[str, str]) -> None:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in (JSON | headers).items()]
    reply = await queue.client.post(PATH, content=GOOD, headers=raw)
    assert reply.status_code == 202


async def test_broken_frames_on_the_stream(queue: House) -> None:
    async with queue.stream() as stream:
        await stream.until("subscribed")
        frames = [
            "", "{", "[]", "null", '{"type":"nothing"}', '{"type":"subscribe","workflowId":7}', nested(500).decode(),
            '{"type":"subscribe","channels":["sad"]}', '{"type":"subscribe","since":-1}',
            f'{{"type":"subscribe","since":{"9" * 40}}}',
        ]  # fmt: skip
        for frame in frames:
            await stream.send(frame)
        await stream.settled()
        errors = [frame for frame in stream.frames if frame["type"] == "error"]
        assert len(errors) == len(frames)
        assert all(frame["code"] and frame["message"] for frame in errors)
        one = await queue.submit(picture())
        await stream.until("workflow:queued", workflowId=one)


# ---- whatever is sent


TEXTS = st.text(max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
CLASSES = st.sampled_from(["EmptyImage", "SaveImage", "LoadImage", "KSampler", "NoSuchClass", ""])
LINKS = st.tuples(st.sampled_from(["1", "2", "3", "9"]), st.integers(-1, 2)).map(list)
INPUTS = st.dictionaries(
    st.sampled_from(["images", "image", "width", "filename_prefix", "x"]), LINKS | VALUES, max_size=3
)
NODES = st.fixed_dictionaries(
    {}, optional={"class_type": CLASSES | VALUES, "inputs": INPUTS | VALUES, "_meta": VALUES}
)
GRAPHS = st.dictionaries(st.sampled_from(["1", "2", "3", "nodes", "prompt"]) | TEXTS, NODES | VALUES, max_size=4)
BODIES = VALUES | st.fixed_dictionaries(
    {"workflow": GRAPHS | VALUES},
    optional={
        "priority": st.sampled_from(["low", "high"]) | VALUES,
        "gpu": st.just("local") | VALUES,
        "id": st.uuids().map(str) | VALUES,
        "metadata": VALUES,
        "extraData": VALUES,
        "maxAttempts": VALUES,
        "timeoutSeconds": VALUES,
        "more": VALUES,
    },
)


@given(body=BODIES, query=st.sampled_from(["", "?dryRun=true"]), strict=st.booleans())
@settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
async def test_whatever_is_sent(queue: House, body: Any, query: str, strict: bool) -> None:
    """Never a 5xx; what is refused is not stored, what is taken is stored as it was sent."""
    before = (await queue.list(limit=1))["workflows"]
    content = json.dumps(body).encode()
    headers = JSON | ({"prefer": "handling=strict"} if strict else {})
    reply = await queue.client.post(PATH + query, content=content, headers=headers)
    assert reply.status_code in (200, 202, 400, 409, 422), (content, reply.status_code, reply.text)
    after = (await queue.list(limit=1))["workflows"]
    if reply.status_code != 202:
        assert [one["workflowId"] for one in after] == [one["workflowId"] for one in before]
        if reply.status_code == 200:
            assert query
        else:
            problem(reply, reply.status_code)
        return
    (view,) = after
    assert view["workflowId"] == reply.json()["workflowId"]
    assert view["status"] == reply.json()["status"] in ("queued", "failed")
    stored = await queue.get(view["workflowId"], include="workflow")
    assert stored["workflow"] == body["workflow"]
    assert stored["metadata"] == body.get("metadata")
    if view["status"] == "failed":
        assert view["error"]
        assert view["errors"]
    await queue.cancel(view["workflowId"])


@given(content=st.binary(max_size=60) | st.text(alphabet='{}[]":,0truefalsnw \\u"', max_size=60).map(str.encode))
@settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
async def test_whatever_bytes_are_sent(queue: House, content: bytes) -> None:
    problem(await queue.client.post(PATH, content=content, headers=JSON), 400)
    problem(await queue.client.patch(f"{PATH}/{uuid.uuid4()}", content=content, headers=JSON), 400)
    assert (await queue.list())["workflows"] == []
