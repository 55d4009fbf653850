"""The WebSocket breaks, goes deaf, falls silent, or lies: it is a hint, and ComfyUI is asked for the truth."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import pytest

from tests.faults.kit import LATE, Owed, Site, ended, one_verdict
from tests.faults.proxy import Proxy
from tests.queue_kit import Queue, picture, sleeper

pytestmark = pytest.mark.asyncio(loop_scope="module")

FRAMES: list[tuple[str, dict[str, Any]]] = [
    ("execution_start", {}),
    ("executing", {"node": "2"}),
    ("execution_success", {}),
    ("executing", {"node": None}),
]


@pytest.mark.parametrize(("kind", "fields"), FRAMES, ids=["start", "node", "success", "end"])
async def test_cut_at(queue: Queue, site: Site, proxy: Proxy, owed: Owed, kind: str, fields: dict[str, Any]) -> None:
    """This frame and all behind it are never heard."""
    held = proxy.hold_frame(kind, **fields)
    one = await owed.submit(queue)
    await held.caught()
    proxy.cut()
    (view,) = await owed.kept(queue, site.witness)
    assert view["attempt"] == 1
    assert await queue.kinds(one) == ["queued", "started", "completed"]
    messages = dict((await site.simulator.history())[view["promptId"]]["status"]["messages"])
    assert view["startTime"] == messages["execution_start"]["timestamp"]
    assert view["completionTime"] == messages["execution_success"]["timestamp"]


@pytest.mark.slow
async def test_cut_at_every_frame(queue: Queue, site: Site, proxy: Proxy) -> None:
    for number in itertools.count(1):
        site.witness.forget()
        held = proxy.hold_frame(nth=number)
        one = await queue.submit(sleeper(steps=3, seconds=0.01))
        caught, over = asyncio.create_task(held.caught()), asyncio.create_task(ended(queue, one))
        await asyncio.wait({caught, over}, return_when=asyncio.FIRST_COMPLETED)
        proxy.cut()
        view = await over
        assert (view["status"], view["attempt"], len(view["outputs"])) == ("completed", 1, 1), number
        assert await queue.kinds(one) == ["queued", "started", "completed"]
        assert site.witness.prompts("taken") == [view["promptId"]]
        if not caught.done():  # it has no more frames
            caught.cancel()
            break
    assert number > 15


async def test_deaf_after_a_quick_reconnect(queue: Queue, site: Site, proxy: Proxy, owed: Owed) -> None:
    """ComfyUI reaps the old socket late, and unregisters the new one with it (PROTOCOL 1.7)."""
    async with queue.stream("backend") as stream:
        await stream.until("subscribed")
        proxy.cut(linger=True)
        await stream.until("backend:disconnected")
        await stream.until("backend:connected")
        proxy.reap()
        back = len(stream.frames)
        one = await owed.submit(queue)
        # It is noticed because no word follows the POST; a socket that ComfyUI knows is opened.
        await stream.until("backend:disconnected", after=back)
        await stream.until("backend:connected", after=back)
    (view,) = await owed.kept(queue, site.witness)
    assert view["attempt"] == 1
    assert await queue.kinds(one) == ["queued", "started", "completed"]


@pytest.mark.slow
async def test_silent_in_the_middle(queue: Queue, site: Site, proxy: Proxy) -> None:
    """Open, and not one frame more after its start: a running prompt is looked after all the same."""
    silence = proxy.hold_frame("progress", value=1)
    one = await queue.submit(sleeper(steps=4))
    await silence.caught()
    view = await ended(queue, one, LATE)
    assert (view["status"], view["attempt"], len(view["outputs"])) == ("completed", 1, 1)
    assert site.witness.prompts("taken") == [view["promptId"]]


async def test_it_lies(queue: Queue, site: Site, proxy: Proxy) -> None:
    """The end is told three times while it runs: nobody believes it."""
    one = await queue.submit(sleeper(steps=12))
    await queue.started(one)
    prompt = (await queue.get(one))["promptId"]
    async with queue.stream("comfyui") as stream:
        await stream.until("subscribed")
        for kind, data in (
            ("execution_success", {"timestamp": 1}),
            ("execution_interrupted", {"node_id": "3", "node_type": "SleepSteps", "executed": []}),
            ("execution_error", {"node_id": "3", "exception_message": "out of memory", "exception_type": "X"}),
            ("executing", {"node": None}),
            ("execution_start", {"timestamp": "yesterday"}),
            ("executed", {"node": "2", "output": {"images": [{"filename": "no.png", "type": "output"}]}}),
        ):
            proxy.say(json.dumps({"type": kind, "data": data | {"prompt_id": prompt}}))
        for noise in (
            "{",
            "[]",
            '{"type":7}',
            '{"type":"executing"}',
            '{"type":"status","data":{"status":0}}',
            b"no",
        ):
            proxy.say(noise)
        proxy.say('{"type":"heard","data":{}}')
        await stream.until("comfyui:heard")
    assert (await queue.get(one))["status"] == "running"
    view = await ended(queue, one)
    assert (view["status"], view["attempt"], view["errors"]) == ("completed", 1, [])
    assert [output["nodeId"] for output in view["outputs"]] == ["2"]
    assert view["outputs"][0]["filename"] != "no.png"
    assert await one_verdict(queue, one) == "completed"
    assert site.witness.prompts("taken") == [prompt]


async def test_it_lies_about_strangers(queue: Queue, site: Site, proxy: Proxy) -> None:
    """Prompts nobody knows start and end: what is ours, running or posted ahead, is not touched for it."""
    running, ahead = await queue.submit(sleeper(steps=12)), await queue.submit(picture())
    await site.simulator.until_queue(lambda running, pending: bool(running and pending))
    looking = proxy.hold("GET", "/queue", 1)
    for kind, node in (("execution_start", None), ("executing", "1"), ("executing", None)):
        proxy.say(json.dumps({"type": kind, "data": {"node": node, "prompt_id": "nobody"}}))
    (await looking.caught()).answer()
    for one in (running, ahead):
        view = await ended(queue, one)
        assert (view["status"], view["attempt"]) == ("completed", 1)
    assert site.witness.prompts("interrupted") == site.witness.prompts("deleted") == []


# ---- without a proxy between


async def test_dropped(queue: Queue, site: Site) -> None:
    async with queue.stream("workflow", "backend") as stream:
        await stream.until("subscribed")
        running = await queue.submit(sleeper(steps=20))
        await stream.until("workflow:started", workflowId=running)
        await site.simulator.faults(drop_sockets=True)
        await stream.until("backend:disconnected")
        await stream.until("backend:connected")
        back = len(stream.frames)
        await stream.until("workflow:progress", after=back, workflowId=running)
        await stream.until("workflow:completed", workflowId=running)
        progress = [frame["progress"] for frame in stream.of(running, "workflow:progress")]
    assert progress == sorted(progress)
    view = await queue.get(running)
    assert view["attempt"] == 1
    assert site.witness.prompts("taken") == [view["promptId"]]


async def test_ended_while_it_was_away(queue: Queue, site: Site) -> None:
    """Nobody says anything again: the service asks when it is back."""
    running = await queue.submit(sleeper(steps=2))
    await queue.started(running)
    await site.simulator.faults(drop_sockets=True, deaf=True)
    await site.simulator.until_queue(lambda running, pending: not running)
    await site.simulator.faults(drop_sockets=True)
    view = await ended(queue, running)
    assert (view["status"], view["attempt"]) == ("completed", 1)


@pytest.mark.slow
async def test_deaf(queue: Queue, site: Site, owed: Owed) -> None:
    """Open, but no word after a POST (PROTOCOL 1.7): a fresh one is opened, and the run is found."""
    async with queue.stream("backend") as stream:
        await stream.until("subscribed")
        await site.simulator.faults(deaf=True)
        await owed.submit(queue)
        await stream.until("backend:disconnected")
        (view,) = await owed.kept(queue, site.witness)
    assert view["attempt"] == 1
