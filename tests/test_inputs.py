"""Inputs of workflows: named by URL or as data: URI, fetched and put in place at their turn, or uploaded by hand."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from management_api.app import create_app
from management_api.keys import add_key
from management_api.settings import load
from managers.callers import KeyScope
from managers.clock import SystemClock, new_id
from managers.comfyui.attempt import AttemptRun
from managers.comfyui.backend import Backend, BackendConfig, Signal
from managers.comfyui.fetching import FetchConfig, Fetcher
from managers.comfyui.inputs import ClassOf
from managers.comfyui.preparing import InputConfig, Inputs
from managers.comfyui.verdicts import Job, Result
from managers.events.types import LiveEvent, Output
from managers.guard import Guard
from tests.origin import Origin, bare, dripping, endless, head, held, origin, png, silent, whole
from tests.queue_kit import (
    Comfy,
    Graph,
    House,
    Queue,
    Site,
    View,
    child,
    comfy,
    environment,
    house,
    picture,
    sleeper,
)

INPUTS = "/v1/comfyui/inputs"
LIMIT = 200_000
QUICK = {
    "INPUT_ALLOW_PRIVATE": "true",
    "INPUT_MAX_BYTES": str(LIMIT),
    "DOWNLOAD_TIMEOUT_MS": "300",
    "DOWNLOAD_RETRIES": "1",
    "DOWNLOAD_RETRY_DELAY_MS": "10",
}
PATIENT = {"INPUT_ALLOW_PRIVATE": "true", "DOWNLOAD_TIMEOUT_MS": "20000"}


@asynccontextmanager
async def started(tmp_path: Path, simulator: Comfy, **environ: str) -> AsyncIterator[House]:
    """A service of its own, which has reached its ComfyUI."""
    settings = load(environment(tmp_path, simulator, GPU_SAMPLE_SECONDS="0", **environ), None)
    async with house(create_app(settings)) as service:
        await service.connected()
        yield service


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy]:
    with comfy(tmp_path_factory.mktemp("comfyui")) as process:
        yield process


@pytest.fixture
async def web() -> AsyncIterator[Origin]:
    async with origin() as found:
        yield found


@pytest.fixture(scope="module")
def site(simulator: Comfy, tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("site"), simulator, GPU_SAMPLE_SECONDS="0", **QUICK)


@pytest.fixture
async def queue(site: Site) -> AsyncIterator[House]:
    """A fresh service that is quick to give up, connected."""
    async with site.fresh() as service:
        await service.connected()
        yield service


def loads(*sources: str) -> Graph:
    """Each of these pictures is loaded and saved."""
    graph: Graph = {}
    for n, source in enumerate(sources):
        graph[f"{n}"] = {"class_type": "LoadImage", "inputs": {"image": source}}
        save = {"images": [f"{n}", 0], "filename_prefix": f"inputs{n}"}
        graph[f"{n}s"] = {"class_type": "SaveImage", "inputs": save}
    return graph


async def shown(queue: Queue, view: View, n: int = 0) -> tuple[tuple[int, int], Any]:
    """Size and first pixel of an output."""
    reply = await queue.client.get(view["outputs"][n]["url"])
    assert reply.status_code == 200
    with Image.open(io.BytesIO(reply.content)) as image:
        return image.size, image.convert("RGB").getpixel((0, 0))


def data_uri(body: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(body).decode()}"


# ---- what is fetched


async def test_a_url_is_fetched_at_its_turn_and_the_picture_runs(queue: House, web: Origin, simulator: Comfy) -> None:
    web.paths["/cat?size=2&sig=secret"] = whole(png((1, 2, 3), (7, 4)), kind="text/html")
    url = f"{web.url}/cat?size=2&sig=secret"
    view = await queue.run(loads(url))
    assert view["status"] == "completed", view
    assert await shown(queue, view) == ((7, 4), (1, 2, 3))
    kept = await queue.get(view["workflowId"], include="workflow")
    assert kept["workflow"]["0"]["inputs"]["image"] == url, "the graph is kept as it came"
    assert (simulator.directory / "input" / "jobs" / view["workflowId"] / "1.png").read_bytes() == png(
        (1, 2, 3), (7, 4)
    )
    ((_, headers),) = web.requests
    assert headers["user-agent"].startswith("comfyui-management-api/")
    assert headers["accept-encoding"] == "identity"
    assert view["attempt"] == 1


async def test_a_data_uri_is_put_in_place_and_one_source_is_fetched_once(queue: House, web: Origin) -> None:
    web.paths["/one"] = whole(png((9, 9, 9)))
    one, data = f"{web.url}/one", data_uri(png((5, 6, 7)), kind="application/x-whatever")
    view = await queue.run(loads(one, data, one))
    assert view["status"] == "completed", view
    seen = {output["nodeId"]: await shown(queue, view, n) for n, output in enumerate(view["outputs"])}
    assert seen == {"0s": ((5, 3), (9, 9, 9)), "1s": ((5, 3), (5, 6, 7)), "2s": ((5, 3), (9, 9, 9))}
    assert web.asks("/one") == 1


async def test_a_large_input_goes_through_the_disk(tmp_path: Path, simulator: Comfy, web: Origin) -> None:
    body = png() + bytes(range(256)) * 20_000
    web.paths["/large"] = whole(body)
    async with started(tmp_path, simulator, INPUT_ALLOW_PRIVATE="true") as service:
        view = await service.run(loads(f"{web.url}/large"))
        assert view["status"] == "completed", view
    there = simulator.directory / "input" / "jobs" / view["workflowId"] / "1.png"
    assert there.read_bytes() == body
    assert list((tmp_path / "data" / "inputs").iterdir()) == [], "nothing of it is left with us"


async def test_a_redirect_is_followed(queue: House, web: Origin) -> None:
    web.paths["/old"] = bare(head(302, location="/new#part", content_length=0))
    web.paths["/new"] = whole(png((4, 4, 4)))
    view = await queue.run(loads(f"{web.url}/old"))
    assert await shown(queue, view) == ((5, 3), (4, 4, 4))


async def test_what_fails_for_a_moment_is_fetched_again(queue: House, web: Origin) -> None:
    async def once(there: Origin, writer: asyncio.StreamWriter) -> None:
        there.paths["/later"] = whole(png((8, 8, 8)))
        writer.write(head(503, content_length=0))

    web.paths["/later"] = once
    view = await queue.run(loads(f"{web.url}/later"))
    assert await shown(queue, view) == ((5, 3), (8, 8, 8))
    assert web.asks("/later") == 2


REFUSED = {
    "missing": (bare(head(404, content_length=0)), "cannot be fetched: the answer was 404", 1),
    "broken": (bare(head(500, content_length=0)), "cannot be fetched: the answer was 500", 2),
    "page": (whole(b"<!doctype html><html>", "image/png"), "is no picture, film or sound that is known here", 1),
    "svg": (whole(b"<?xml version='1.0'?><svg/>", "image/svg+xml"), "is no picture, film or sound", 1),
    "nothing": (whole(b""), "is no picture, film or sound", 1),
    "lies": (bare(head(content_length=10**12) + png()), f"cannot be fetched: it is larger than {LIMIT} bytes", 1),
    "endless": (endless, f"cannot be fetched: it is larger than {LIMIT} bytes", 1),
    "short": (bare(head(content_length=5000) + png()), "cannot be fetched: the connection broke", 2),
    "no-http": (bare(b"220 mail.example.com ESMTP\r\n"), "cannot be fetched: the connection broke", 2),
    "silent": (silent, "cannot be fetched: nothing came for 0.3 s", 2),
    "dripping": (dripping, "cannot be fetched: it comes too slowly", 1),
    "metadata": (
        bare(head(302, location="http://169.254.169.254/latest/meta-data", content_length=0)),
        "cannot be fetched: the address of this host is reserved",
        1,
    ),
    "file": (bare(head(302, location="file:///etc/passwd", content_length=0)), "cannot be fetched: a URL begins", 1),
    "circle": (bare(head(307, location="circle", content_length=0)), "it was sent elsewhere more than 5 times", 6),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_cannot_be_had_fails_the_workflow_in_words(
    name: str, queue: House, web: Origin, simulator: Comfy
) -> None:
    answer, words, times = REFUSED[name]
    web.paths[f"/{name}"] = answer
    before = await simulator.posts()
    view = await queue.run(loads(f"{web.url}/{name}", data_uri(png())))
    assert (view["status"], view["errorType"]) == ("failed", "input")
    assert view["error"].startswith("LoadImage (0): image ")
    assert words in view["error"]
    assert "http" not in view["error"].replace("https:// or http://", ""), "what else the URL says is a secret"
    (finding,) = view["errors"]
    assert finding["code"] == "input_unavailable"
    assert (finding["pointer"], finding["nodeId"], finding["input"]) == ("/workflow/0/inputs/image", "0", "image")
    assert finding["message"] == view["error"]
    assert web.asks(f"/{name}") == times
    assert await simulator.posts() == before, "nothing was posted"
    assert await queue.kinds(view["workflowId"]) == ["queued", "error"]


async def test_bad_data_uris_fail_in_words(queue: House) -> None:
    for source, words in (
        ("data:image/png,rawtext", "it is no data: URI with base64"),
        ("data:image/png;base64,@@@@", "what stands behind base64, is no base64"),
        (data_uri(b"<html>"), "is no picture, film or sound"),
        (data_uri(png().ljust(LIMIT + 1, b"\0")), f"cannot be taken: It is larger than {LIMIT} bytes"),
    ):
        view = await queue.run(loads(source))
        assert (view["status"], view["errorType"]) == ("failed", "input"), view
        assert words in view["error"]


async def test_private_addresses_are_refused_unless_allowed(tmp_path: Path, simulator: Comfy, web: Origin) -> None:
    web.paths["/cat"] = whole(png())
    async with started(tmp_path, simulator) as service:
        for host in ("127.0.0.1", "localhost", "[::ffff:127.0.0.1]"):
            view = await service.run(loads(f"{web.url}/cat".replace("127.0.0.1", host)))
            assert (view["status"], view["errorType"]) == ("failed", "input")
            assert "the address of this host is private" in view["error"]
    assert not web.requests


async def test_a_comfyui_that_takes_no_such_file_is_named(tmp_path: Path) -> None:
    with comfy(tmp_path / "small", "--max-upload-size", "0.01") as simulator:
        async with started(tmp_path, simulator, INPUT_ALLOW_PRIVATE="true") as service:
            view = await service.run(loads(data_uri(png() + bytes(50_000))))
            assert (view["status"], view["errorType"]) == ("failed", "input")
            assert "cannot be given to ComfyUI: ComfyUI takes no file of" in view["error"]
            reply = await service.client.post(INPUTS, **form(png() + bytes(50_000)))
            assert reply.status_code == 413
            assert "--max-upload-size" in reply.json()["detail"]


async def test_a_comfyui_that_cannot_keep_files_holds_up_nobody(tmp_path: Path) -> None:
    with comfy(tmp_path / "full") as simulator:
        for name in ("jobs", "uploads"):
            (simulator.directory / "input" / name).write_text("no folder can be made here")
        async with started(tmp_path, simulator) as service:
            view = await service.run(loads(data_uri(png())))
            assert (view["status"], view["errorType"]) == ("failed", "input")
            assert "cannot be given to ComfyUI: ComfyUI answered 500 to POST /upload/image" in view["error"]
            assert (await service.run(picture()))["status"] == "completed"
            reply = await service.client.post(INPUTS, **form(png()))
            assert reply.status_code == 503
            assert "ComfyUI answered 500" in reply.json()["detail"]


# ---- meanwhile


async def test_a_cancel_ends_the_download(tmp_path: Path, simulator: Comfy, web: Origin) -> None:
    web.paths["/held"] = held
    before = await simulator.posts()
    async with started(tmp_path, simulator, **PATIENT) as service:
        workflow_id = await service.submit(loads(f"{web.url}/held"))
        async with asyncio.timeout(10):
            await web.asked.wait()
        assert (await service.get(workflow_id))["status"] == "queued"
        assert await service.cancel(workflow_id) == "cancelled"
        async with asyncio.timeout(10):
            await web.left.wait()
        after = await service.run(picture())
        assert after["status"] == "completed", "the backend is free"
        assert (await service.get(workflow_id))["status"] == "cancelled"
        assert await service.attempts(workflow_id) == [(1, "ended")]
    assert await simulator.posts() == before + 1, "only the other"


class Deaf:
    """Listens to an attempt, and does not mind."""

    def started(self, start_time: int) -> None: ...

    def ended(self) -> None: ...

    def produced(self, node_id: str, outputs: tuple[Output, ...]) -> None: ...

    def publish(self, event: LiveEvent) -> None: ...


@pytest.mark.parametrize(("signal", "result"), [(Signal.CANCEL, Result.GONE), (Signal.WITHDRAW, Result.WITHDRAWN)])
async def test_what_is_called_off_before_its_turn_is_not_even_fetched(
    signal: Signal, result: Result, tmp_path: Path, simulator: Comfy, web: Origin
) -> None:
    web.paths["/cat"] = whole(png())
    before = await simulator.posts()
    config = BackendConfig(name="local", url=simulator.url)
    backend = Backend(config, new_id(), clock=SystemClock(), publish=lambda _: None, on_event=lambda _: None)

    async def nothing_told(_: str) -> ClassOf:
        return lambda _: None

    fetcher = Fetcher(Guard(allow_private=True), FetchConfig())
    inputs = Inputs(InputConfig(spool=tmp_path), fetcher=fetcher, classes=nothing_told)
    job = Job(
        workflow_id=new_id(),
        prompt_id=new_id(),
        graph=json.dumps(loads(f"{web.url}/cat")).encode(),
        extra_data=None,
        nodes={},
        timeout_seconds=10,
    )
    run = AttemptRun(backend, job, Deaf(), inputs)
    run.tell(signal)
    async with asyncio.timeout(10):
        assert (await run.run()).result is result
    await backend.client.aclose()
    await inputs.aclose()
    assert not web.requests
    assert await simulator.posts() == before


async def test_the_more_urgent_does_not_wait_for_a_download(tmp_path: Path, simulator: Comfy, web: Origin) -> None:
    web.paths["/held"] = held
    async with started(tmp_path, simulator, **PATIENT) as service:
        slow = await service.submit(loads(f"{web.url}/held"), priority="low")
        async with asyncio.timeout(10):
            await web.asked.wait()
        urgent = await service.run(picture(), priority="high")
        assert urgent["status"] == "completed"
        web.release.set()
        view = await service.ended(slow)
        assert (view["status"], view["attempt"]) == ("completed", 1), "taken back costs no attempt"
        assert await shown(service, view) == ((5, 3), (200, 30, 60))


async def test_it_is_fetched_while_the_one_before_runs(tmp_path: Path, simulator: Comfy, web: Origin) -> None:
    web.paths["/held"] = held
    async with started(tmp_path, simulator, **PATIENT) as service:
        first = await service.submit(sleeper())
        await service.started(first)
        second = await service.submit(loads(f"{web.url}/held"))
        async with asyncio.timeout(10):
            await web.asked.wait()
        assert (await service.get(first))["status"] == "running"
        web.release.set()
        await simulator.until_queue(lambda running, pending: len(running) == len(pending) == 1)
        await service.cancel(first)
        assert (await service.ended(second))["status"] == "completed"


@pytest.mark.slow
async def test_comfyui_away_meanwhile_is_no_failure(tmp_path: Path, web: Origin) -> None:
    web.paths["/held"] = held
    with comfy(tmp_path / "comfyui") as simulator:
        async with started(tmp_path, simulator, **PATIENT) as service:
            workflow_id = await service.submit(loads(f"{web.url}/held"))
            async with asyncio.timeout(10):
                await web.asked.wait()
            simulator.kill()
            web.release.set()
            async with service.stream("backend", since=0) as stream:
                await stream.until("backend:disconnected")
            simulator.restart()
            view = await service.ended(workflow_id)
            assert (view["status"], view["attempt"]) == ("completed", 1), view
            assert await simulator.posts() == 1


@pytest.mark.slow
async def test_our_death_while_fetching_loses_nothing_and_posts_once(tmp_path: Path, web: Origin) -> None:
    web.paths["/held"] = held
    (tmp_path / "data").mkdir()
    with comfy(tmp_path / "comfyui") as simulator:
        environ = environment(tmp_path, simulator, GPU_SAMPLE_SECONDS="0", **PATIENT)
        async with child(environ) as service:
            workflow_id = await service.submit(loads(f"{web.url}/held"))
            async with asyncio.timeout(10):
                await web.asked.wait()
            service.kill()
        web.release.set()
        async with child(environ) as service:
            view = await service.ended(workflow_id)
            assert view["status"] == "completed", view
            assert await shown(service, view) == ((5, 3), (200, 30, 60))
        assert await simulator.posts() == 1


# ---- validation


async def test_strict_handling_takes_sources_and_nothing_else(queue: House, web: Origin) -> None:
    web.paths["/cat"] = whole(png())
    strict = {"Prefer": "handling=strict"}
    for source in (f"{web.url}/cat", data_uri(png()), f"HTTP://{web.url[7:]}/cat"):
        reply = await queue.post(loads(source), headers=strict)
        assert reply.status_code == 202, reply.text
        assert "errors" not in reply.json()
    for source in ("nowhere.png", "ftp://example.com/x.png", base64.b64encode(png()).decode()[:40].replace("/", "")):
        reply = await queue.post(loads(source), headers=strict)
        if source.startswith("ftp:"):  # a folder named `ftp:`: ComfyUI looks for itself
            assert reply.status_code == 202
        else:
            assert reply.status_code == 422, source
    reply = await queue.post(loads("https://example.com/../../x.png"))
    assert reply.json()["status"] == "failed", "what leaves a folder as a name is refused as a URL too"


# ---- by hand


def form(body: bytes, name: str = "cat.png") -> dict[str, Any]:
    return {"files": {"file": (name, body, "application/x-whatever")}}


async def test_an_upload_by_hand_can_be_used(queue: House, simulator: Comfy) -> None:
    reply = await queue.client.post(INPUTS, **form(png((7, 7, 7)), "../Mein Bild.PNG"))
    assert reply.status_code == 201, reply.text
    told = reply.json()
    assert re.fullmatch(r"uploads/[0-9a-f-]{36}/Mein_Bild\.PNG", told["name"])
    assert (told["backends"], told["size"], told["contentType"]) == (["local"], len(png((7, 7, 7))), "image/png")
    again = (await queue.client.post(INPUTS, **form(png((8, 8, 8)), "../Mein Bild.PNG"))).json()
    assert again["name"] != told["name"]
    for name, color in ((told["name"], (7, 7, 7)), (again["name"], (8, 8, 8))):
        view = await queue.run(loads(name))
        assert await shown(queue, view) == ((5, 3), color)


async def test_a_large_upload_is_counted_and_streamed(tmp_path: Path, simulator: Comfy) -> None:
    body = png() + bytes(3_000_000)
    async with started(tmp_path, simulator, MANAGEMENT_API_MAX_BODY="1KiB") as service:
        reply = await service.client.post(INPUTS, **form(body))
        assert reply.status_code == 201, reply.text
        assert (simulator.directory / "input" / reply.json()["name"]).read_bytes() == body
    assert list((tmp_path / "data" / "inputs").iterdir()) == []


async def test_too_large_is_413_announced_or_not(queue: House) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
        for _ in range(LIMIT // 1000 + 1):
            yield bytes(1000)
        yield b"\r\n--x--\r\n"

    chunked = {"content": pieces(), "headers": {"content-type": "multipart/form-data; boundary=x"}}
    for options in (form(bytes(LIMIT + 1)), form(bytes(LIMIT * 2)), chunked):
        reply = await queue.client.post(INPUTS, **options)
        assert reply.status_code == 413, reply.text
        assert "INPUT_MAX_BYTES" in reply.json()["detail"]
    assert (await queue.client.post(INPUTS, **form(bytes(LIMIT)))).status_code == 201


async def test_bad_forms_say_what_is_wrong(queue: House) -> None:
    multipart = {"content-type": "multipart/form-data; boundary=x"}
    part = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\nabc\r\n'
    field = b'--x\r\nContent-Disposition: form-data; name="text"\r\n\r\n'
    for options, status, words in (
        ({"json": {"file": "x"}}, 415, "multipart/form-data"),
        (form(b""), 400, "empty"),
        ({"files": {"text": (None, "hello")}}, 400, "no file"),
        ({"content": part + part + b"--x--\r\n", "headers": multipart}, 400, "several"),
        ({"content": part, "headers": multipart}, 400, "no form"),
        ({"content": b"hello", "headers": multipart}, 400, "no form"),
        ({"content": b"", "headers": {"content-type": "multipart/form-data"}}, 400, "no form"),
        ({"content": field + bytes(150_000) + b"\r\n" + part + b"--x--\r\n", "headers": multipart}, 400, "more in"),
    ):
        reply = await queue.client.post(INPUTS, **options)
        assert (reply.status_code, words in reply.json()["detail"]) == (status, True), reply.text
    reply = await queue.client.post(INPUTS, params={"backend": "nobody"}, **form(png()))
    assert reply.status_code == 400
    assert reply.json()["errors"][0]["allowed"] == ["local"]


async def test_it_goes_to_every_backend_that_is_up(tmp_path: Path, simulator: Comfy) -> None:
    with comfy(tmp_path / "other") as other:
        backends = f"one={simulator.url},two={other.url},away=http://127.0.0.1:9"
        settings = load(environment(tmp_path, COMFYUI_BACKENDS=backends, GPU_SAMPLE_SECONDS="0"), None)
        async with house(create_app(settings)) as service:
            await service.connected("one", "two")
            told = (await service.client.post(INPUTS, **form(png()))).json()
            assert told["backends"] == ["one", "two"]
            for folder in (simulator.directory, other.directory):
                assert (folder / "input" / told["name"]).read_bytes() == png()
            told = (await service.client.post(INPUTS, params={"backend": "two"}, **form(png()))).json()
            assert told["backends"] == ["two"]
            assert not (simulator.directory / "input" / told["name"]).exists()
            reply = await service.client.post(INPUTS, params={"backend": "away"}, **form(png()))
            assert (reply.status_code, "retry-after" in reply.headers) == (503, True)
            assert reply.json()["detail"] == "The backend away is not there now", "it was not even tried"
    settings = load(environment(tmp_path, GPU_SAMPLE_SECONDS="0"), None)
    async with house(create_app(settings)) as service:
        assert (await service.client.post(INPUTS, **form(png()))).status_code == 503


async def test_it_needs_the_scope_submit(tmp_path: Path, simulator: Comfy) -> None:
    keys = tmp_path / "keys.toml"
    reader = add_key(keys, "reader", scopes=[KeyScope.READ])
    sender = add_key(keys, "sender", scopes=[KeyScope.SUBMIT])
    async with started(tmp_path, simulator, MANAGEMENT_API_KEYS_FILE=str(keys)) as service:
        for key, status in ((reader, 403), (sender, 201), ("wrong", 401)):
            reply = await service.client.post(INPUTS, headers={"X-API-Key": key}, **form(png()))
            assert reply.status_code == status, reply.text
