"""ComfyUI's answers as Python writes them (NaN, Infinity, half a surrogate pair), or in no shape we know.

One odd node of anybody's must not hold up a queue. A real service, a real simulator, and a proxy that bends answers.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from management_api.app import create_app
from management_api.settings import load
from tests.faults.proxy import Proxy, serving
from tests.queue_kit import Comfy, House, Queue, comfy, environment, house, picture, sleeper

pytestmark = pytest.mark.asyncio(loop_scope="module")

Bend = Callable[[bytes], bytes]
"""What becomes of the body of an answer."""


class Bent(Proxy):
    """A proxy that changes what ComfyUI answers, by the beginning of the path."""

    def __init__(self, target: str) -> None:
        super().__init__(target)
        self.bends: dict[str, Bend] = {}
        self.status = b"200 OK"
        """What bent answers have."""

    def straight(self) -> None:
        """Bend nothing any more."""
        self.mend()
        self.bends.clear()
        self.status = b"200 OK"

    async def ask(self, method: str, request: bytes) -> bytes:
        path = request.split(b" ", 2)[1].decode()
        answer = await super().ask(method, request)
        for beginning, bend in self.bends.items():
            if path.startswith(beginning):
                body = bend(answer.partition(b"\r\n\r\n")[2])
                return b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (self.status, len(body), body)
        return answer


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy]:
    with comfy(tmp_path_factory.mktemp("odd")) as process:
        yield process


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def proxy(simulator: Comfy) -> AsyncIterator[Bent]:
    async with serving(Bent(simulator.url)) as proxy:
        yield proxy


@asynccontextmanager
async def served(folder: Path, simulator: Comfy, proxy: Proxy) -> AsyncIterator[House]:
    """A service before ComfyUI by way of the proxy, connected."""
    environ = environment(folder, simulator, COMFYUI_URL=proxy.url)
    async with house(create_app(load(environ, None))) as service:
        await service.connected()
        yield service


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def standing(tmp_path_factory: pytest.TempPathFactory, simulator: Comfy, proxy: Bent) -> AsyncIterator[House]:
    async with served(tmp_path_factory.mktemp("standing"), simulator, proxy) as service:
        yield service


@pytest_asyncio.fixture(loop_scope="module")
async def queue(standing: House, simulator: Comfy, proxy: Bent) -> AsyncIterator[Queue]:
    yield standing
    proxy.straight()
    for left in (await standing.list())["workflows"]:
        if left["status"] in ("queued", "running"):
            await standing.cancel(left["workflowId"])
    await simulator.until_queue(lambda running, pending: not running and not pending)


def replaced(old: bytes, new: bytes) -> Bend:
    """Fails where there is nothing to replace, unless the answer says that there is nothing."""

    def bend(body: bytes) -> bytes:
        assert old in body or body == b"{}", body[:500]
        return body.replace(old, new)

    return bend


async def reconnected(queue: Queue, proxy: Proxy) -> None:
    """On a new connection the classes are asked for again."""
    async with queue.stream("backend") as stream:
        await stream.until("subscribed")
        proxy.cut()
        await stream.until("backend:disconnected")
        await stream.until("backend:connected")


# ---- a. what strict JSON calls malformed


@pytest.mark.parametrize("odd", [b"NaN", b"Infinity", b"-Infinity", b'"half a pair \\ud83d"'])
async def test_an_odd_value_in_the_history(queue: Queue, proxy: Bent, odd: bytes) -> None:
    proxy.bends["/history/"] = replaced(b'"images":', b'"score": [' + odd + b'], "images":')
    view = await queue.run(picture())
    assert (view["status"], len(view["outputs"])) == ("completed", 1)
    assert (await queue.client.get(view["outputs"][0]["url"])).content.startswith(b"\x89PNG")
    assert (await queue.run(picture()))["status"] == "completed"


async def test_an_odd_value_in_an_output_reaches_clients_as_json(queue: Queue, proxy: Bent) -> None:
    odd = b'"frame_rate": NaN, "note": "half \\udc00 a pair", "filename":'
    proxy.bends["/history/"] = replaced(b'"filename":', odd)
    view = await queue.run(picture())
    assert view["outputs"][0]["extra"] == {"frame_rate": None, "note": "half ? a pair"}


async def test_somebody_elses_odd_prompt_holds_nobody_up(queue: Queue, proxy: Bent) -> None:
    theirs = (
        b'"queue_running": [[NaN, "theirs", {"1": {"inputs": {"x": Infinity}}}, {"score": "\\ud800"}, []],'
        b'[5, "theirs too", {}, null, []], '
    )
    proxy.bends["/queue"] = lambda body: body.replace(b'"queue_running":[', theirs).replace(b", ],", b"],")
    running = await queue.submit(sleeper())
    await queue.started(running)
    assert await queue.cancel(running) == "cancelled"
    assert (await queue.run(picture()))["status"] == "completed"


async def test_an_infinite_bound_is_none_and_the_classes_are_known(queue: Queue, proxy: Bent) -> None:
    def bend(body: bytes) -> bytes:
        classes = json.loads(body)
        if "EmptyImage" in classes:
            classes["EmptyImage"]["input"]["required"]["width"][1]["max"] = float("inf")
            classes["EmptyImage"]["display_name"] = "Empty \ud800"
        return json.dumps(classes).encode()

    proxy.bends["/object_info"] = bend
    await reconnected(queue, proxy)
    fits = await queue.client.post("/v1/comfyui/workflow?dryRun=true", json={"workflow": picture(width=10**6)})
    assert (fits.status_code, fits.json()["errors"]) == (200, [])
    graph = picture()
    graph["1"]["class_type"] = "EmptyImag"
    (finding,) = (await queue.client.post("/v1/comfyui/workflow?dryRun=true", json={"workflow": graph})).json()[
        "errors"
    ]
    assert (finding["code"], finding["suggestions"][0]) == ("missing_node_type", "EmptyImage")


@pytest.mark.parametrize("status", ["200 OK", "400 Bad Request"])
async def test_an_odd_refusal_is_told(queue: Queue, proxy: Bent, status: str) -> None:
    refusal = {
        "error": {"type": "prompt_outputs_failed_validation", "message": "no", "details": "", "extra_info": {}},
        "node_errors": {
            "1": {
                "class_type": "EmptyImage",
                "errors": [
                    {
                        "type": "value_bigger_than_max",
                        "message": "Too big \ud800",
                        "details": "",
                        "extra_info": {"input_name": "width", "input_config": ["INT", {"max": float("inf")}]},
                    }
                ],
            }
        },
    }

    def bend(body: bytes) -> bytes:
        partly = {"prompt_id": json.loads(body)["prompt_id"], "number": float("nan")}
        return json.dumps(refusal | partly).encode()

    proxy.bends["/prompt"], proxy.status = bend, status.encode()
    view = await queue.run(picture())
    assert (view["status"], view["errorType"]) == ("failed", "validation")
    assert "Too big ?" in view["error"]
    assert view["errors"][0]["allowed"] == {"max": None}


async def test_odd_frames_are_heard_and_passed_on_as_json(queue: Queue, proxy: Bent) -> None:
    held = proxy.hold_frame("executed")
    async with queue.stream("node", "comfyui") as stream:
        one = await queue.submit(picture())
        data = (await held.caught())["data"]
        data["output"]["score"] = [float("nan"), "half \udbff"]
        data["display_node"] = 2  # as a number
        proxy.say(json.dumps({"type": "executed", "data": data}))
        held.release()
        told = await stream.until("node:executed", workflowId=one, displayNodeId="2", nodeState="finished")
        raw = await stream.until("comfyui:executed", workflowId=one)
    assert told["output"]["score"] == raw["data"]["output"]["score"] == [None, "half ?"]
    assert (await queue.ended(one))["status"] == "completed"


async def test_paths_of_that_machine_stay_there(queue: Queue, proxy: Bent) -> None:
    held = proxy.hold_frame("executed")
    async with queue.stream("workflow", "node", "comfyui") as stream:
        one = await queue.submit(picture())
        data = (await held.caught())["data"]
        data["output"]["gifs"] = [{**data["output"]["images"][0], "fullpath": "/srv/comfyui/output/a.mp4"}]
        proxy.say(json.dumps({"type": "executed", "data": data}))
        held.release()
        await stream.until("workflow:completed", workflowId=one)
        told = stream.of(one, "node:executed", "comfyui:executed", "images:generated")
    assert {frame["type"] for frame in told} == {"node:executed", "comfyui:executed", "images:generated"}
    assert [frame for frame in told if "gifs" in json.dumps(frame)]
    assert "/srv" not in json.dumps(stream.frames)


# ---- a. what cannot be understood at all


NONSENSE: dict[str, Any] = {
    "outputs": {"outputs": [1], "status": {"status_str": "success", "completed": True, "messages": []}},
    "status": {"outputs": {}, "status": "fine"},
    "entry": "done",
}


@pytest.mark.parametrize("entry", NONSENSE.values(), ids=NONSENSE)
async def test_a_history_that_means_nothing_ends_the_workflow(queue: Queue, proxy: Bent, entry: object) -> None:
    def bend(body: bytes) -> bytes:
        return json.dumps(dict.fromkeys(json.loads(body), entry)).encode()

    proxy.bends["/history/"] = bend
    view = await queue.run(picture())
    assert (view["status"], view["errorType"], view["attempt"]) == ("failed", "backend", 1)
    assert "ComfyUI's record of it cannot be understood" in view["error"]
    proxy.straight()
    assert (await queue.run(picture()))["status"] == "completed"


async def test_no_extra_data_is_said_in_two_ways(queue: Queue, simulator: Comfy) -> None:
    for body in ({}, {"extraData": None}):
        view = await queue.run(picture(), **body)
        told = (await simulator.history())[view["promptId"]]["prompt"][3]
        assert (view["status"], list(told)) == ("completed", ["client_id"])
    described = (await queue.client.get("/docs/json")).json()["components"]["schemas"]
    assert described["SubmitRequest"]["properties"]["extraData"]["type"] == ["object", "null"]
    assert (await queue.post(picture(), extraData=[])).status_code == 400
