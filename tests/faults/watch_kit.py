"""For the tests of distrust: a service with little patience, and ways to kill a worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from management_api.app import create_app
from management_api.settings import load
from managers.workflows.dispatcher import Dispatcher
from tests.comfy_kit import PLAIN
from tests.queue_kit import Comfy, Graph, House, Queue, Stream, View, environment, house, picture, sleeper, workflow

PATIENCE = "0.4"


@asynccontextmanager
async def impatient(tmp_path: Path, simulator: Comfy, **environ: str) -> AsyncIterator[tuple[House, Stream]]:
    """A service that is connected to its one backend or to those named, and somebody who listens."""
    variables = environment(tmp_path, simulator, COMFYUI_INTERRUPT_SECONDS=PATIENCE) | environ
    settings = load(variables, None)
    async with house(create_app(settings)) as queue:
        await queue.connected(*(backend.name for backend in settings.comfyui.backends))
        async with queue.stream("workflow", "backend") as stream:
            yield queue, stream


def dispatcher(queue: House, name: str = "local") -> Dispatcher:
    return next(one for one in queue.app.running[0].workflows.dispatchers if one.name == name)


def deaf(seconds: float) -> Graph:
    """Its node says nothing and does not look at the interrupt flag."""
    graph = workflow("deaf_sleep")
    graph["1"]["inputs"] |= picture()["1"]["inputs"]
    graph["2"]["inputs"]["seconds"] = seconds
    return graph


def quiet(seconds: float) -> Graph:
    """Its node says nothing, and looks at the flag."""
    return sleeper(steps=1, seconds=seconds)


async def kill_worker(simulator: Comfy) -> None:
    """As PROTOCOL 1.10: entries with equal number and equal id, which cannot be compared. Two of them stay."""
    blocker = await simulator.post_prompt(sleeper())
    async with httpx.AsyncClient(base_url=simulator.url, **PLAIN) as client:
        for _ in range(3):
            body = {"prompt": picture(), "client_id": "somebody else", "prompt_id": blocker, "number": 10}
            await client.post("/prompt", json=body)
    await simulator.post("/interrupt", {"prompt_id": blocker})
    await simulator.until_queue(lambda running, pending: not running and len(pending) == 2)


async def proven(stream: Stream) -> dict[str, Any]:
    return await stream.until("backend:stalled", proven=True)


async def trusted_again(stream: Stream, backend: str = "local") -> dict[str, Any]:
    return await stream.until("backend:connected", backend=backend, reason="A probe prompt has run to its end")


async def prompt_of(queue: House, workflow_id: str) -> str:
    """The prompt of the attempt in hand, as soon as there is one."""
    await queue.posted(workflow_id)
    prompt: str = (await queue.get(workflow_id))["promptId"]
    return prompt


async def taken_back(queue: Queue, workflow_id: str) -> View:
    """The workflow when it waits again without an attempt. Asks again and again: no event tells of it."""
    for _ in range(1000):
        view = await queue.get(workflow_id)
        if view["promptId"] is None:
            return view
        await asyncio.sleep(0.01)
    raise AssertionError(f"{workflow_id} is not taken back")


async def attempts(queue: House, workflow_id: str) -> list[tuple[str, str | None, bool]]:
    """State, error type and `died` of each attempt."""
    found = await queue.get(workflow_id, include="attempts")
    return [(one["state"], one["errorType"], one["died"]) for one in found["attempts"]]


async def let_go(queue: House, workflow_id: str) -> list[tuple[str, str | None, bool]]:
    """Its attempts when none is open any more, which is a moment after its verdict."""
    for _ in range(1000):
        found = await attempts(queue, workflow_id)
        if not {"posted", "running"} & {state for state, _, _ in found}:
            return found
        await asyncio.sleep(0.01)
    raise AssertionError(f"{workflow_id} has an open attempt")


async def metric(queue: House, name: str, **labels: str) -> float:
    text = (await queue.client.get("/metrics")).text
    (value,) = (
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and sample.labels == labels
    )
    return value
