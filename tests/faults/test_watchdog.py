"""A ComfyUI that answers and does not work: how it is found out, what becomes of its work, how it comes back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from managers.comfyui.backend import BackendState
from tests.faults.proxy import proxied
from tests.faults.watch_kit import (
    PATIENCE,
    attempts,
    deaf,
    dispatcher,
    impatient,
    kill_worker,
    let_go,
    metric,
    prompt_of,
    proven,
    quiet,
    taken_back,
    trusted_again,
)
from tests.queue_kit import Comfy, comfy, picture, sleeper

UNMOVED = f"ComfyUI was told to stop a workflow, and {PATIENCE} s later nothing has moved"


@pytest.fixture
def simulator(tmp_path: Path) -> Iterator[Comfy]:
    with comfy(tmp_path / "comfyui") as process:
        yield process


# ---- proven: prompts wait and none runs


async def test_prompts_wait_and_none_runs(simulator: Comfy, tmp_path: Path) -> None:
    async with impatient(tmp_path, simulator) as (queue, stream):
        backend = dispatcher(queue).backend
        await kill_worker(simulator)
        waiting = await queue.submit(picture())
        prompt = await prompt_of(queue, waiting)
        told = await proven(stream)
        assert told["reason"] == "Prompts wait in ComfyUI and none runs: its worker is dead"
        assert (backend.state, backend.stalled_since) == (BackendState.STALLED, told["timestamp"])
        # Its prompt is taken back, which costs no attempt, and it gets nothing but the probe.
        _, pending = await simulator.until_queue(lambda _, pending: prompt not in pending and len(pending) == 3)
        view = await taken_back(queue, waiting)
        assert (view["status"], view["attempt"]) == ("queued", 0)
        assert await attempts(queue, waiting) == [("withdrawn", None, False)]
        assert await metric(queue, "comfyui_backend_stalled", backend="local") == 1
        for reason, times in (("nothing_runs", 1), ("unmoved", 0)):
            assert await metric(queue, "comfyui_backend_stalls_total", backend="local", reason=reason) == times
        # A fresh process is connected, and not believed before the probe has run.
        simulator.restart()
        words = "Connected again; it gets work when a probe prompt has run"
        again = await stream.until("backend:stalled", reason=words)
        assert again["seq"] < (await trusted_again(stream))["seq"]
        view = await queue.ended(waiting)
        assert (view["status"], view["attempt"]) == ("completed", 1)
        assert (backend.state, backend.stalled_since, backend.ghosts) == (BackendState.CONNECTED, None, 0)
        assert await metric(queue, "comfyui_backend_stalled", backend="local") == 0
        probe, ours = (await simulator.history()).values()
    assert ours["prompt"][1] == view["promptId"]
    assert probe["prompt"][1] not in pending  # the one before went with the process
    assert {node["class_type"] for node in probe["prompt"][2].values()} == {"EmptyImage", "PreviewImage"}
    assert [image["type"] for image in probe["outputs"]["2"]["images"]] == ["temp"]


async def test_the_work_of_a_dead_worker_goes_elsewhere(simulator: Comfy, tmp_path: Path) -> None:
    with comfy(tmp_path / "other") as other:
        both = f"bad={simulator.url},good={other.url}"
        async with impatient(tmp_path, simulator, COMFYUI_BACKENDS=both) as (queue, stream):
            await kill_worker(simulator)
            blocker = await queue.submit(sleeper(), gpu="good")
            await queue.started(blocker)
            waiting = await queue.submit(picture())
            assert await queue.posted(waiting) == "bad"
            assert (await proven(stream))["backend"] == "bad"
            await queue.cancel(blocker)
            view = await queue.ended(waiting)
            assert (view["status"], view["backend"], view["attempt"]) == ("completed", "good", 1)
            assert dispatcher(queue, "bad").backend.stalled_since is not None
            left = await queue.submit(picture(), gpu="bad")
            assert (await queue.get(left))["attempt"] == 0


async def test_a_queue_that_moves_is_no_dead_worker(simulator: Comfy, tmp_path: Path) -> None:
    """Others' prompts go before ours for many times the patience; each look shows one that runs."""
    async with impatient(tmp_path, simulator) as (queue, stream):
        theirs = [await simulator.post_prompt(sleeper(steps=6)) for _ in range(4)]
        view = await queue.run(picture())
        assert (view["status"], view["attempt"]) == ("completed", 1)
        assert set(theirs) < set(await simulator.history())
        assert not [frame for frame in await stream.settled() if frame["type"] == "backend:stalled"]


# ---- proven: a run unmoved by an interrupt


async def test_a_late_run_that_no_interrupt_moves(simulator: Comfy, tmp_path: Path) -> None:
    """Its verdict is stored when it is proven, and not when the node ends some day."""
    async with impatient(tmp_path, simulator) as (queue, stream):
        late = await queue.submit(deaf(60), timeoutSeconds=1)
        await queue.started(late)
        ahead = await queue.submit(picture())
        prompt, posted = (await queue.get(late))["promptId"], await prompt_of(queue, ahead)
        view = await queue.ended(late)
        assert (view["status"], view["errorType"], view["attempt"]) == ("failed", "timeout", 1)
        assert view["error"] == "The workflow ran longer than its time limit of 1 s, and ComfyUI does not stop it"
        running, _ = await simulator.until_queue(lambda _, pending: posted not in pending)
        assert running == [prompt]
        assert (await proven(stream))["reason"] == UNMOVED
        assert await metric(queue, "comfyui_backend_stalls_total", backend="local", reason="unmoved") == 1
        assert await attempts(queue, late) == [("ended", "timeout", False)]
        await taken_back(queue, ahead)
        assert await attempts(queue, ahead) == [("withdrawn", None, False)]
        simulator.restart()
        await trusted_again(stream)
        view = await queue.ended(ahead)
        assert (view["status"], view["attempt"]) == ("completed", 1)


async def test_a_cancelled_run_that_no_interrupt_moves(simulator: Comfy, tmp_path: Path) -> None:
    """Nobody has to restart ComfyUI: the node ends, and the probe behind it runs. The verdict stays what it was."""
    async with impatient(tmp_path, simulator) as (queue, stream):
        cancelled = await queue.submit(deaf(2))
        await queue.started(cancelled)
        prompt = (await queue.get(cancelled))["promptId"]
        await queue.cancel(cancelled)
        follower = await queue.submit(picture())
        assert (await proven(stream))["reason"] == UNMOVED
        running, _ = await simulator.until_queue(lambda _, pending: len(pending) == 1)  # the probe
        assert running == [prompt]
        assert await let_go(queue, cancelled) == [("ended", None, False)]
        assert (await queue.get(follower))["attempt"] == 0
        await trusted_again(stream)
        assert (await queue.ended(follower))["status"] == "completed"
        assert (await queue.get(cancelled))["status"] == "cancelled"
        assert await queue.kinds(cancelled) == ["queued", "started", "cancelled"]
        assert (await simulator.history())[prompt]["status"]["messages"][-1][0] == "execution_interrupted"


async def test_what_moves_is_not_stalled(simulator: Comfy, tmp_path: Path) -> None:
    """A node that does not look at the flag for many times the patience, and tells of its work meanwhile."""
    async with (
        proxied(simulator.url) as proxy,
        impatient(tmp_path, simulator, COMFYUI_URL=proxy.url) as (queue, stream),
    ):
        running = await queue.submit(deaf(2))
        await queue.started(running)
        step = {"node": "2", "value": 1, "max": 9, "prompt_id": (await queue.get(running))["promptId"]}
        await queue.cancel(running)
        while (await simulator.queue())[0]:
            proxy.say(json.dumps({"type": "progress", "data": step}))
            await asyncio.sleep(0.05)  # it works
        assert (await queue.run(picture()))["status"] == "completed"
        assert not [frame for frame in await stream.settled() if frame["type"] == "backend:stalled"]


# ---- mere silence


async def test_silence_is_told_and_trusted(simulator: Comfy, tmp_path: Path) -> None:
    async with impatient(tmp_path, simulator, COMFYUI_STALL_SECONDS="0.3") as (queue, stream):
        silent = await queue.submit(quiet(1.2))
        told = await stream.until("backend:stalled")
        assert (told["proven"], told["backend"]) == (False, "local")
        words = "ComfyUI has said nothing about the workflow it runs for 0.3 s; it is trusted still"
        assert told["reason"] == words
        assert await metric(queue, "comfyui_backend_silent_seconds", backend="local") >= 0.3
        assert await metric(queue, "comfyui_backend_stalled", backend="local") == 0
        assert dispatcher(queue).backend.state is BackendState.CONNECTED
        ahead = await queue.submit(picture())  # it gets work as before
        assert await queue.posted(ahead) == "local"
        assert [(await queue.ended(one))["status"] for one in (silent, ahead)] == ["completed"] * 2
        assert await metric(queue, "comfyui_backend_silent_seconds", backend="local") == 0
        assert len([frame for frame in await stream.settled() if frame["type"] == "backend:stalled"]) == 1


async def test_silence_is_ended_where_that_is_wanted(simulator: Comfy, tmp_path: Path) -> None:
    wanted = {"COMFYUI_STALL_SECONDS": "0.3", "COMFYUI_STALL_INTERRUPT": "true"}
    async with impatient(tmp_path, simulator, **wanted) as (queue, stream):
        view = await queue.run(quiet(60))
        assert (view["status"], view["errorType"]) == ("failed", "timeout")
        words = "ComfyUI has said nothing about the workflow it runs for 0.3 s"
        assert view["error"] == f"{words}, and was told to stop then (COMFYUI_STALL_INTERRUPT)"
        assert (await stream.until("backend:stalled"))["proven"] is False
        assert (await queue.run(picture()))["status"] == "completed"


async def test_a_word_now_and_then_is_no_silence(simulator: Comfy, tmp_path: Path) -> None:
    async with impatient(tmp_path, simulator, COMFYUI_STALL_SECONDS="0.4") as (queue, stream):
        assert (await queue.run(sleeper(steps=8, seconds=0.15)))["status"] == "completed"
        assert not [frame for frame in await stream.settled() if frame["type"] == "backend:stalled"]
