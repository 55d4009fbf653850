"""Which death is charged to a workflow, and which is not: two of them are poison, whatever `maxAttempts` says."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from management_api.app import create_app
from management_api.settings import load
from tests.faults.watch_kit import attempts, dispatcher, impatient
from tests.queue_kit import Comfy, House, comfy, environment, house, picture, sleeper, workflow

DIED, LOST = ("lost", "lost", True), ("lost", "lost", False)


@pytest.fixture
def simulator(tmp_path: Path) -> Iterator[Comfy]:
    with comfy(tmp_path / "comfyui") as process:
        yield process


async def started(queue: House, workflow_id: str, attempt: int) -> None:
    await queue.until(workflow_id, "started", attempt=attempt)


async def test_two_deaths_are_poison(simulator: Comfy, tmp_path: Path) -> None:
    """Its node ends the process. Who was only posted ahead is charged with nothing."""
    async with impatient(tmp_path, simulator) as (queue, stream):
        poison = await queue.submit(workflow("crash_hard_exit"), maxAttempts=9)
        innocent = await queue.submit(picture(), priority="low")
        for attempt in (1, 2):
            await started(queue, poison, attempt)
            await asyncio.to_thread(simulator.process.wait, 10)
            simulator.restart()
        view = await queue.ended(poison)
        assert (view["status"], view["errorType"], view["attempt"]) == ("failed", "poison", 2)
        assert await attempts(queue, poison) == [DIED, DIED]
        told = await stream.until("workflow:error", workflowId=poison, willRetry=False)
        assert told["errorType"] == "poison"
        view = await queue.ended(innocent)
        assert view["status"] == "completed"
        assert {died for _, _, died in await attempts(queue, innocent)} == {False}


@pytest.mark.parametrize("way", ["drained", pytest.param("by our own hand", marks=pytest.mark.slow)])
async def test_a_backend_may_be_restarted(simulator: Comfy, tmp_path: Path, way: str) -> None:
    async with impatient(tmp_path, simulator) as (queue, stream):
        unlucky = await queue.submit(sleeper(steps=20))
        await started(queue, unlucky, 1)
        if way == "drained":
            dispatcher(queue).drain()
        else:
            dispatcher(queue).backend.excuse_break()
        simulator.restart()
        await stream.until("workflow:error", workflowId=unlucky)
        dispatcher(queue).resume()
        assert (await queue.ended(unlucky))["status"] == "completed"
        assert await attempts(queue, unlucky) == [LOST, ("ended", None, False)]


async def test_who_was_away_charges_nobody(simulator: Comfy, tmp_path: Path) -> None:
    """ComfyUI dies while the service is down: of what, nobody has seen."""
    settings = load(environment(tmp_path, simulator), None)
    async with house(create_app(settings)) as queue:
        unlucky = await queue.submit(sleeper(steps=20))
        await started(queue, unlucky, 1)
    simulator.restart()
    async with house(create_app(settings)) as queue:
        assert (await queue.ended(unlucky))["status"] == "completed"
        assert await attempts(queue, unlucky) == [LOST, ("ended", None, False)]


@pytest.mark.slow
async def test_who_follows_again_charges(simulator: Comfy, tmp_path: Path) -> None:
    settings = load(environment(tmp_path, simulator), None)
    async with house(create_app(settings)) as queue:
        deadly = await queue.submit(sleeper(steps=1, seconds=60), maxAttempts=1)
        await started(queue, deadly, 1)
    async with house(create_app(settings)) as queue:
        await queue.connected()
        for _ in range(1000):  # no event says that it was found again
            if dispatcher(queue).backend.silent_seconds:
                break
            await asyncio.sleep(0.01)
        simulator.restart()
        view = await queue.ended(deadly)
        assert (view["status"], view["errorType"]) == ("failed", "lost")
        assert await attempts(queue, deadly) == [DIED]


@pytest.mark.slow
async def test_a_broken_socket_is_no_death(simulator: Comfy, tmp_path: Path) -> None:
    """It breaks twice, and the run goes on."""
    async with impatient(tmp_path, simulator) as (queue, stream):
        running = await queue.submit(sleeper(steps=30))
        await started(queue, running, 1)
        for _ in range(2):
            heard = len(stream.frames)
            await simulator.faults(drop_sockets=True)
            await stream.until("backend:connected", after=heard)
            await stream.until("workflow:progress", workflowId=running, after=heard)
        assert not dispatcher(queue).backend.watchdog.died_of((await queue.get(running))["promptId"])
        assert (await queue.ended(running))["status"] == "completed"
        assert await attempts(queue, running) == [("ended", None, False)]


async def test_a_history_that_others_cleared_is_no_death(simulator: Comfy, tmp_path: Path) -> None:
    """What executes is interrupted and forgotten, and nobody says so: the socket never broke."""
    async with impatient(tmp_path, simulator, COMFYUI_STALL_SECONDS="0.3") as (queue, stream):
        running = await queue.submit(sleeper())
        await started(queue, running, 1)
        await simulator.faults(deaf=True)
        await simulator.post("/interrupt", {})
        await simulator.until_queue(lambda running, _: not running)
        await simulator.faults(clear_history=True)
        await started(queue, running, 2)
        assert (await attempts(queue, running))[0] == LOST
        assert not [frame for frame in await stream.settled() if frame["type"] == "backend:disconnected"]
        await queue.cancel(running)
