"""The backends as an operator sees and switches them, with real ComfyUI processes behind the service."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from management_api.app import create_app
from management_api.settings import load
from tests.faults.watch_kit import impatient, kill_worker, proven, trusted_again
from tests.queue_kit import (
    PATIENCE,
    Comfy,
    Queue,
    child,
    comfy,
    environment,
    house,
    picture,
    sleeper,
)

BACKENDS = "/v1/comfyui/backends"
FIELDS = {
    "name", "url", "state", "draining", "busy", "version", "queueRemaining", "waiting", "currentWorkflow",
    "prefetchedWorkflow", "interruptsById", "connections", "ghosts", "stalledSince", "stallReason", "silentSeconds",
}  # fmt: skip


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Comfy]:
    with comfy(tmp_path / "one") as found:
        yield found


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Comfy]:
    with comfy(tmp_path / "other") as found:
        yield found


def service(tmp_path: Path, simulator: Comfy | None = None, **environ: str) -> Any:
    return house(create_app(load(environment(tmp_path, simulator, **environ), None)))


def both(one: Comfy, other: Comfy) -> str:
    return f"one={one.url},other={other.url}"


async def look(queue: Queue, name: str = "local") -> dict[str, Any]:
    reply = await queue.client.get(f"{BACKENDS}/{name}")
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    assert set(found) == FIELDS
    return found


async def switch(queue: Queue, action: str, name: str = "local") -> dict[str, Any]:
    reply = await queue.client.post(f"{BACKENDS}/{name}/{action}")
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    assert (found["name"], found["draining"]) == (name, action == "drain")
    return found


async def until(queue: Queue, name: str = "local", **fields: Any) -> dict[str, Any]:
    """Ask until the backend is like this: no event tells of it."""
    found: dict[str, Any] = {}
    for _ in range(PATIENCE * 50):
        found = await look(queue, name)
        if all(found[field] == value for field, value in fields.items()):
            return found
        await asyncio.sleep(0.02)
    raise AssertionError(f"not {fields}: {found}")


async def test_what_is_told(one: Comfy, tmp_path: Path) -> None:
    url = one.url.replace("//", "//me:secret9@")
    async with service(tmp_path, one, COMFYUI_BACKENDS=f"local={url},far=http://127.0.0.1:9") as queue:
        await queue.connected("local")
        running = await queue.submit(sleeper())
        named = [await queue.submit(picture(), gpu="far") for _ in range(2)]
        await queue.started(running)
        reply = await queue.client.get(BACKENDS)
        assert "secret9" not in reply.text
        here, far = reply.json()["backends"]
        assert set(here) == set(far) == FIELDS
        assert here == here | {
            "name": "local", "url": one.url, "state": "connected", "draining": False, "busy": True,
            "currentWorkflow": running, "prefetchedWorkflow": None, "interruptsById": True, "connections": 1,
            "ghosts": 0, "stalledSince": None, "stallReason": None,
        }  # fmt: skip
        assert here["version"] == (await one.get("/system_stats"))["system"]["comfyui_version"]
        assert here["queueRemaining"] == 1
        assert 0 <= here["silentSeconds"] < PATIENCE
        assert far == far | {
            "url": "http://127.0.0.1:9", "state": "disconnected", "busy": False, "version": None, "waiting": 2,
            "queueRemaining": None, "currentWorkflow": None, "interruptsById": False, "connections": 0,
            "silentSeconds": None,
        }  # fmt: skip
        ahead = await queue.submit(picture(), gpu="local")
        await queue.posted(ahead)
        assert (await look(queue))["prefetchedWorkflow"] == ahead
        assert (await look(queue))["currentWorkflow"] == running
        assert await look(queue, "far") == far
        await queue.cancel(running)
        assert (await queue.ended(ahead))["status"] == "completed"
        idle = await until(queue, busy=False, queueRemaining=0)
        assert (idle["currentWorkflow"], idle["prefetchedWorkflow"], idle["silentSeconds"]) == (None, None, None)
        assert [(await queue.get(one))["status"] for one in named] == ["queued"] * 2


async def test_unknown_names(tmp_path: Path) -> None:
    async with service(tmp_path, COMFYUI_BACKENDS="one=http://127.0.0.1:9,other=http://127.0.0.1:9") as queue:
        for method, path in (("GET", "nothing"), ("POST", "nothing/drain"), ("POST", "nothing/resume")):
            reply = await queue.client.request(method, f"{BACKENDS}/{path}")
            assert reply.status_code == 404
            assert reply.json()["detail"] == "There is no backend named 'nothing'; known: one, other"
        assert (await queue.client.post(f"{BACKENDS}/one/explode")).status_code == 404
        assert (await queue.client.get(f"{BACKENDS}/one/drain")).status_code == 405


async def test_a_drained_backend_ends_what_runs_and_gives_back_what_does_not(one: Comfy, tmp_path: Path) -> None:
    async with service(tmp_path, one) as queue:
        running = await queue.submit(sleeper())
        ahead = await queue.submit(picture())
        await queue.started(running)
        await queue.posted(ahead)
        drained = await switch(queue, "drain")
        assert (drained["busy"], drained["currentWorkflow"]) == (True, running)
        await until(queue, prefetchedWorkflow=None)
        assert await one.queue() == ([(await queue.get(running))["promptId"]], [])
        assert (await queue.get(running))["status"] == "running", "what executes runs on"
        await queue.cancel(running)
        await until(queue, busy=False)
        later = await queue.submit(picture())
        for waiting in (ahead, later):
            view = await queue.get(waiting)
            assert (view["status"], view["backend"]) == ("queued", None)
        assert await one.queue() == ([], [])
        await switch(queue, "resume")
        for waiting in (ahead, later):
            view = await queue.ended(waiting)
            assert (view["status"], view["attempt"]) == ("completed", 1), "what was taken back is not charged"


async def test_work_for_any_goes_to_the_others_and_work_by_name_waits(
    one: Comfy, other: Comfy, tmp_path: Path
) -> None:
    async with service(tmp_path, one, COMFYUI_BACKENDS=both(one, other)) as queue:
        await queue.connected("one", "other")
        await switch(queue, "drain", "one")
        named = await queue.submit(picture(), gpu="one")
        views = await asyncio.gather(*(queue.run(picture()) for _ in range(4)))
        assert [(view["status"], view["backend"]) for view in views] == [("completed", "other")] * 4
        assert (await queue.get(named))["status"] == "queued"
        assert (await look(queue, "one"))["waiting"] == 1
        assert (await one.history()) == {}
        await switch(queue, "resume", "one")
        view = await queue.ended(named)
        assert (view["status"], view["backend"]) == ("completed", "one")


async def test_what_was_posted_ahead_runs_at_once_on_another(one: Comfy, other: Comfy, tmp_path: Path) -> None:
    async with service(tmp_path, one, COMFYUI_BACKENDS=both(one, other)) as queue:
        await queue.connected("one", "other")
        busy = {name: await queue.submit(sleeper(), gpu=name) for name in ("one", "other")}
        await queue.started(*busy.values())
        ahead = await queue.submit(picture())
        there = await queue.posted(ahead)
        (elsewhere,) = busy.keys() - {there}
        await switch(queue, "drain", there)
        await queue.cancel(busy[elsewhere])
        view = await queue.ended(ahead)
        assert (view["status"], view["backend"]) == ("completed", elsewhere)
        assert (await queue.get(busy[there]))["status"] == "running"


async def test_switching_twice_is_switching_once(one: Comfy, tmp_path: Path) -> None:
    async with service(tmp_path, one) as queue:
        await queue.connected()
        for action in ("drain", "drain", "resume", "resume", "drain"):
            await switch(queue, action)
        waiting = await queue.submit(picture())
        await asyncio.gather(*(queue.client.post(f"{BACKENDS}/local/{action}") for action in ("drain", "resume")))
        if (await look(queue))["draining"]:  # whichever came last
            await switch(queue, "resume")
        assert (await queue.ended(waiting))["status"] == "completed"


async def test_it_stays_drained_when_the_service_dies(one: Comfy, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    environ = environment(tmp_path, one)
    async with child(environ) as queue:
        await switch(queue, "drain")
        queue.kill()
    async with child(environ) as queue:
        await queue.connected()
        assert (await look(queue))["draining"]
        waiting = await queue.submit(picture())
        assert (await queue.client.get("/ready")).status_code == 200, "it still takes work"
        assert (await queue.get(waiting))["backend"] is None
        await switch(queue, "resume")
        assert (await queue.ended(waiting))["status"] == "completed"
        queue.kill()
    async with child(environ) as queue:
        assert not (await look(queue))["draining"]
        assert (await queue.run(picture()))["status"] == "completed"


async def test_a_backend_of_another_name_is_not_drained(tmp_path: Path) -> None:
    async with service(tmp_path, COMFYUI_BACKENDS="old=http://127.0.0.1:9") as queue:
        await switch(queue, "drain", "old")
    async with service(tmp_path, COMFYUI_BACKENDS="new=http://127.0.0.1:9,old=http://127.0.0.1:9") as queue:
        found = (await queue.client.get(BACKENDS)).json()["backends"]
        assert [(each["name"], each["draining"]) for each in found] == [("new", False), ("old", True)]


async def test_no_work_is_given_out_again_while_the_service_stops(one: Comfy, tmp_path: Path) -> None:
    async with service(tmp_path, one) as queue:
        await switch(queue, "drain")
        for services in queue.app.running:
            services.workflows.drain(leaving=False)
        reply: httpx.Response = await queue.client.post(f"{BACKENDS}/local/resume")
        assert (reply.status_code, reply.json()["detail"]) == (
            503,
            "The service is about to stop and gives out no work",
        )
        assert int(reply.headers["retry-after"]) > 0
        await switch(queue, "drain")


async def test_a_stalled_backend_says_since_when_and_why(one: Comfy, tmp_path: Path) -> None:
    async with impatient(tmp_path, one) as (queue, stream):
        await kill_worker(one)
        waiting = await queue.submit(picture())
        told = await proven(stream)
        stalled = await look(queue)
        assert stalled == stalled | {
            "state": "stalled", "stallReason": told["reason"], "stalledSince": told["timestamp"], "draining": False
        }  # fmt: skip
        assert (await queue.get(waiting))["status"] == "queued"
        one.restart()
        await trusted_again(stream)
        assert (await queue.ended(waiting))["status"] == "completed"
        mended = await look(queue)
        assert (mended["state"], mended["stalledSince"], mended["stallReason"]) == ("connected", None, None)
        assert mended["connections"] == 2
