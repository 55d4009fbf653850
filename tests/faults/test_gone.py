"""A ComfyUI that is not reached for COMFYUI_GONE_SECONDS: others take its work over; its ghosts are swept later."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from management_api.app import create_app
from management_api.settings import load
from tests.faults.proxy import Proxy, proxied
from tests.faults.watch_kit import attempts, dispatcher, impatient, prompt_of
from tests.queue_kit import Comfy, comfy, environment, house, picture, sleeper

GONE = "0.5"
TAKEN_OVER = ("lost", "backend", False)
ENDED = ("ended", None, False)


@pytest.fixture
def simulator(tmp_path: Path) -> Iterator[Comfy]:
    with comfy(tmp_path / "comfyui") as process:
        yield process


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Comfy]:
    with comfy(tmp_path / "other") as process:
        yield process


@pytest.fixture
async def way(simulator: Comfy) -> AsyncIterator[Proxy]:
    """The way to `simulator`, which can be closed."""
    async with proxied(simulator.url) as proxy:
        yield proxy
        proxy.speak()


def close(way: Proxy) -> None:
    """Nothing gets through any more, in any direction."""
    way.silence()
    way.cut()


async def test_others_take_over(simulator: Comfy, other: Comfy, way: Proxy, tmp_path: Path) -> None:
    both = f"far={way.url},near={other.url}"
    async with impatient(tmp_path, simulator, COMFYUI_BACKENDS=both, COMFYUI_GONE_SECONDS=GONE) as (queue, stream):
        blocker = await queue.submit(sleeper(), gpu="near")
        await queue.started(blocker)
        moved = await queue.submit(sleeper(steps=6))
        await queue.started(moved)
        bound = await queue.submit(picture(), gpu="far")
        prompts = {one: await prompt_of(queue, one) for one in (moved, bound)}
        assert (await queue.get(moved))["backend"] == "far"
        simulator.freeze()  # it would end there otherwise, which is the price
        close(way)
        lost = await stream.until("workflow:error", workflowId=moved)
        assert (lost["errorType"], lost["willRetry"]) == ("backend", True)
        assert lost["error"] == f"ComfyUI far has not been reached for {GONE} s, and others can run it"
        await queue.cancel(blocker)
        view = await queue.ended(moved)
        assert (view["status"], view["backend"], view["attempt"]) == ("completed", "near", 2)
        assert await attempts(queue, moved) == [TAKEN_OVER, ENDED]
        # Who may run nowhere else waits for it, with the attempt that is there.
        assert await attempts(queue, bound) == [("posted", None, False)]
        simulator.thaw()
        way.speak()
        view = await queue.ended(bound)
        assert (view["status"], view["attempt"], view["promptId"]) == ("completed", 1, prompts[bound])
        # The run that was taken over was found there, and stopped.
        found = (await simulator.history())[prompts[moved]]
        assert found["status"]["messages"][-1][0] == "execution_interrupted"
        assert dispatcher(queue, "far").backend.ghosts == 1
        assert (await queue.get(moved))["status"] == "completed"


async def test_it_waits_until_somebody_else_is_there(simulator: Comfy, other: Comfy, tmp_path: Path) -> None:
    """Gone since before the start, and the other one comes only later."""
    alone = environment(tmp_path, simulator, COMFYUI_BACKENDS=f"far={simulator.url}")
    async with house(create_app(load(alone, None))) as queue:
        moved = await queue.submit(sleeper())
        await queue.started(moved)
    simulator.kill()
    other.kill()
    both = {"COMFYUI_BACKENDS": f"far={simulator.url},near={other.url}", "COMFYUI_GONE_SECONDS": "0.2"}
    async with house(create_app(load(alone | both, None))) as queue:
        other.restart()
        await queue.until(moved, "started", attempt=2)
        view = await queue.get(moved)
        assert (view["status"], view["backend"]) == ("running", "near")
        assert await attempts(queue, moved) == [TAKEN_OVER, ("running", None, False)]
        await queue.cancel(moved)


@pytest.mark.slow
async def test_with_0_nobody_takes_over(simulator: Comfy, other: Comfy, way: Proxy, tmp_path: Path) -> None:
    both = f"far={way.url},near={other.url}"
    async with impatient(tmp_path, simulator, COMFYUI_BACKENDS=both, COMFYUI_GONE_SECONDS="0") as (queue, stream):
        blocker = await queue.submit(sleeper(), gpu="near")
        await queue.started(blocker)
        patient = await queue.submit(sleeper(steps=20))
        await queue.started(patient)
        close(way)
        await stream.until("backend:disconnected", backend="far")
        await queue.cancel(blocker)
        # The near one has had time for much else.
        assert [(await queue.run(picture()))["backend"] for _ in range(20)] == ["near"] * 20
        way.speak()
        assert (await queue.ended(patient))["status"] == "completed"
        assert await attempts(queue, patient) == [ENDED]
