"""What breaks, and what becomes of the work: the service, ComfyUI, the socket, a POST, the history (DESIGN 2)."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from management_api.app import create_app
from management_api.settings import load
from tests.queue_kit import Comfy, Queue, Site, child, comfy, environment, house, picture, sleeper, workflow


@pytest.fixture
def simulator(tmp_path: Path) -> Iterator[Comfy]:
    """One for each test: it is going to be broken."""
    with comfy(tmp_path / "comfyui") as process:
        yield process


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy]:
    """One for all: what breaks is put right again."""
    with comfy(tmp_path_factory.mktemp("comfyui")) as process:
        yield process


@pytest.fixture(scope="module")
def site(shared: Comfy, tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("site"), shared)


@pytest.fixture
async def queue(site: Site, shared: Comfy) -> AsyncIterator[Queue]:
    """A fresh service in front of the shared ComfyUI."""
    async with site.fresh() as service:
        await service.connected()
        yield service
        await shared.faults()
        for left in (await service.list())["workflows"]:
            if left["status"] in ("queued", "running"):
                await service.cancel(left["workflowId"])
        await shared.until_queue(lambda running, pending: not running and not pending)


# ---- the service ends in the middle


async def test_kill_9_in_the_middle(simulator: Comfy, tmp_path: Path) -> None:
    """What ran runs on and is followed again; what was posted ahead is not posted twice; what waited waits."""
    environ = environment(tmp_path, simulator)
    (tmp_path / "data").mkdir()
    async with child(environ) as queue:
        await queue.connected()
        running = await queue.submit(sleeper(steps=30), priority="high")
        waiting = [await queue.submit(picture()) for _ in range(3)]
        gone = await queue.submit(picture())
        await queue.started(running)
        await simulator.until_queue(lambda running, pending: bool(pending))
        await queue.cancel(gone)
        before = {one: await queue.get(one) for one in (running, *waiting, gone)}
        queue.kill()
    assert await simulator.posts() == 2
    async with child(environ) as queue:
        found = [await queue.ended(one) for one in (running, *waiting)]
        assert [view["status"] for view in found] == ["completed"] * 4
        assert [view["attempt"] for view in found] == [1] * 4
        assert [view["promptId"] for view in found[:2]] == [before[one]["promptId"] for one in (running, waiting[0])]
        assert found[0]["startTime"] == before[running]["startTime"]
        assert found[0]["nodes"] == {"total": 3, "done": 3, "cached": 0}
        assert await queue.kinds(running) == ["queued", "started", "completed"]
        assert await queue.get(gone) == before[gone]
        assert await queue.attempts(running) == [(1, "ended")]
        queue.kill()
    assert await simulator.posts() == 4


async def test_ended_while_the_service_was_away(simulator: Comfy, tmp_path: Path) -> None:
    """The start of the second and both ends were told to nobody: the history has them."""
    settings = load(environment(tmp_path, simulator), None)
    async with house(create_app(settings)) as queue:
        await queue.connected()
        running = await queue.submit(sleeper(steps=4))
        ahead = await queue.submit(picture())
        await queue.started(running)
        await simulator.until_queue(lambda running, pending: bool(pending))
    await simulator.until_queue(lambda running, pending: not running and not pending)
    async with house(create_app(settings)) as queue:
        for one in (running, ahead):
            view = await queue.ended(one)
            assert (view["status"], view["attempt"], len(view["outputs"])) == ("completed", 1, 1)
            messages = dict((await simulator.history())[view["promptId"]]["status"]["messages"])
            assert view["startTime"] == messages["execution_start"]["timestamp"]
            assert view["completionTime"] == messages["execution_success"]["timestamp"]
            assert await queue.kinds(one) == ["queued", "started", "completed"]
    assert await simulator.posts() == 2


async def test_started_while_the_service_was_away(simulator: Comfy, tmp_path: Path) -> None:
    """It is found running: that it runs is told at once, and when it began as soon as ComfyUI says so."""
    settings = load(environment(tmp_path, simulator), None)
    async with house(create_app(settings)) as queue:
        await queue.connected()
        blocker = await queue.submit(sleeper())
        ahead = await queue.submit(sleeper())
        await queue.started(blocker)
        _, (prompt,) = await simulator.until_queue(lambda running, pending: bool(pending))
    await simulator.post("/interrupt", {})
    await simulator.until_queue(lambda running, pending: running == [prompt])
    async with house(create_app(settings)) as queue:
        await queue.started(ahead)
        view = await queue.get(ahead)
        assert (view["status"], view["attempt"], view["promptId"]) == ("running", 1, prompt)
        assert (await queue.ended(blocker))["status"] == "cancelled"
        await simulator.post("/interrupt", {})
        view = await queue.ended(ahead)
        messages = dict((await simulator.history())[prompt]["status"]["messages"])
        assert view["startTime"] == messages["execution_start"]["timestamp"]
        assert view["completionTime"] == messages["execution_interrupted"]["timestamp"]


@pytest.mark.slow
async def test_cancelled_but_still_in_comfyui_when_the_service_ended(simulator: Comfy, tmp_path: Path) -> None:
    environ = environment(tmp_path, simulator)
    (tmp_path / "data").mkdir()
    async with child(environ) as queue:
        await queue.connected()
        running = await queue.submit(sleeper())
        await queue.started(running)
        simulator.freeze()  # so that the interrupt cannot reach it before the end
        assert await queue.cancel(running) == "cancelled"
        queue.kill()
    simulator.thaw()
    async with child(environ) as queue:
        # The service lets go of it before anything else runs.
        assert (await queue.run(picture()))["status"] == "completed"
        assert (await queue.get(running))["status"] == "cancelled"
        assert await queue.kinds(running) == ["queued", "started", "cancelled"]
        assert await queue.attempts(running) == [(1, "ended")]


@pytest.mark.slow
async def test_a_deliberate_stop_leaves_the_prompt_to_comfyui(simulator: Comfy, tmp_path: Path) -> None:
    environ = environment(tmp_path, simulator)
    (tmp_path / "data").mkdir()
    async with child(environ) as queue:
        await queue.connected()
        running = await queue.submit(sleeper(steps=25))
        await queue.started(running)
        queue.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(queue.process.wait, 10) == 0
    assert len((await simulator.queue())[0]) == 1
    async with house(create_app(load(environ, None))) as queue:
        assert (await queue.ended(running))["status"] == "completed"
    assert await simulator.posts() == 1


# ---- ComfyUI is away


async def test_comfyui_appears_later(tmp_path: Path) -> None:
    with comfy(tmp_path / "comfyui") as simulator:
        simulator.kill()
        async with house(create_app(load(environment(tmp_path, simulator), None))) as queue:
            ready = await queue.client.get("/ready")
            assert (ready.status_code, ready.json()["checks"]["comfyui"]) == (200, "unreachable")
            waiting = [await queue.submit(picture()) for _ in range(2)]
            assert [(await queue.get(one))["attempt"] for one in waiting] == [0, 0]
            simulator.restart()
            found = [await queue.ended(one) for one in waiting]
            assert [(view["status"], view["attempt"]) for view in found] == [("completed", 1)] * 2
            ready = await queue.client.get("/ready")
            assert (ready.status_code, ready.json()["checks"]["comfyui"]) == (200, "ok")


async def test_comfyui_killed_in_the_middle(simulator: Comfy, tmp_path: Path) -> None:
    async with house(create_app(load(environment(tmp_path, simulator), None))) as queue:
        await queue.connected()
        async with queue.stream("workflow", "backend") as stream:
            low = await queue.submit(sleeper(steps=10), priority="low")
            await queue.started(low)
            first = (await queue.get(low))["promptId"]
            normal = await queue.submit(picture())
            await simulator.until_queue(lambda running, pending: bool(pending))
            simulator.kill()
            await stream.until("backend:disconnected")
            assert (await queue.client.get("/ready")).json()["checks"]["comfyui"] == "unreachable"
            simulator.restart()
            # Each is lost, told, and runs again: in the order of the queue, with attempts counted.
            for one in (low, normal):
                lost = await stream.until("workflow:error", workflowId=one)
                assert (lost["errorType"], lost["willRetry"]) == ("lost", True)
        found = [await queue.ended(one) for one in (normal, low)]
        assert [(view["status"], view["attempt"]) for view in found] == [("completed", 2)] * 2
        assert found[1]["promptId"] != first
        assert await queue.attempts(low) == [(1, "lost"), (2, "ended")]
        assert await queue.kinds(low) == ["queued", "started", "error", "queued", "started", "completed"]
    assert await simulator.posts() == 2


@pytest.mark.slow
async def test_lost_too_often(simulator: Comfy, tmp_path: Path) -> None:
    async with house(create_app(load(environment(tmp_path, simulator), None))) as queue:
        await queue.connected()
        running = await queue.submit(sleeper(), maxAttempts=1)
        await queue.started(running)
        simulator.restart()
        view = await queue.ended(running)
        assert (view["status"], view["errorType"], view["attempt"]) == ("failed", "lost", 1)
        assert view["completionTime"] is not None
        assert (await queue.run(picture()))["status"] == "completed"
    assert await simulator.posts() == 1


async def test_cancelled_while_comfyui_is_away(simulator: Comfy, tmp_path: Path) -> None:
    async with house(create_app(load(environment(tmp_path, simulator), None))) as queue:
        await queue.connected()
        running = await queue.submit(sleeper())
        await queue.started(running)
        async with queue.stream("backend") as stream:
            simulator.kill()
            await stream.until("backend:disconnected")
        assert await queue.cancel(running) == "cancelled"
        simulator.restart()
        assert (await queue.run(picture()))["status"] == "completed"
        assert await queue.kinds(running) == ["queued", "started", "cancelled"]
        assert (await queue.get(running))["status"] == "cancelled"
    assert await simulator.posts() == 1


@pytest.mark.slow
async def test_crash_by_a_workflow_of_its_own(simulator: Comfy, tmp_path: Path) -> None:
    """The node ends ComfyUI's process each time: lost, as often as it is allowed, and no other work suffers."""
    async with house(create_app(load(environment(tmp_path, simulator), None))) as queue:
        await queue.connected()
        crashing = await queue.submit(workflow("crash_hard_exit"), maxAttempts=2)
        other = await queue.submit(picture(), priority="low")
        for attempt in (1, 2):
            await queue.until(crashing, "started", attempt=attempt)
            await asyncio.to_thread(simulator.process.wait, 10)
            simulator.restart()
        view = await queue.ended(crashing)
        assert (view["status"], view["errorType"], view["attempt"]) == ("failed", "lost", 2)
        assert (await queue.ended(other))["status"] == "completed"


# ---- a POST of unknown outcome


async def test_the_answer_to_the_post_is_lost(queue: Queue, shared: Comfy) -> None:
    posts = await shared.posts()
    await shared.faults(lose_prompt_response=1)
    view = await queue.run(sleeper(steps=3))
    assert (view["status"], view["attempt"]) == ("completed", 1)
    assert await shared.posts() == posts + 1


async def test_the_answer_is_lost_and_it_has_ended_already(queue: Queue, shared: Comfy) -> None:
    posts = await shared.posts()
    await shared.faults(lose_prompt_response=1)
    view = await queue.run(picture())
    assert (view["status"], view["attempt"], len(view["outputs"])) == ("completed", 1, 1)
    messages = dict((await shared.history())[view["promptId"]]["status"]["messages"])
    assert view["startTime"] == messages["execution_start"]["timestamp"]
    assert await shared.posts() == posts + 1


async def test_the_post_breaks_before_it_is_taken(queue: Queue, shared: Comfy) -> None:
    """The service cannot know that; it asks twice, calls the attempt lost, and posts another."""
    posts = await shared.posts()
    await shared.faults(refuse_prompt=1)
    view = await queue.run(picture())
    assert (view["status"], view["attempt"]) == ("completed", 2)
    assert await queue.attempts(view["workflowId"]) == [(1, "lost"), (2, "ended")]
    assert await shared.posts() == posts + 1


async def test_a_slow_answer_is_waited_for(queue: Queue, shared: Comfy) -> None:
    posts = await shared.posts()
    await shared.faults(hang_prompt=0.5)
    found = [await queue.ended(one) for one in [await queue.submit(picture()) for _ in range(2)]]
    assert [(view["status"], view["attempt"]) for view in found] == [("completed", 1)] * 2
    await shared.faults()
    assert await shared.posts() == posts + 2


@pytest.mark.slow
async def test_comfyui_dies_right_after_it_took_the_prompt(simulator: Comfy, tmp_path: Path) -> None:
    async with house(create_app(load(environment(tmp_path, simulator), None))) as queue:
        await queue.connected()
        await simulator.faults(die_after_accept=True)
        one = await queue.submit(picture())
        await asyncio.to_thread(simulator.process.wait, 10)
        simulator.restart()
        view = await queue.ended(one)
        assert (view["status"], view["attempt"]) == ("completed", 2)
    assert await simulator.posts() == 1


# ---- the socket, the history


async def test_a_dropped_socket(queue: Queue, shared: Comfy) -> None:
    posts = await shared.posts()
    async with queue.stream("workflow", "backend") as stream:
        running = await queue.submit(sleeper(steps=20))
        await stream.until("workflow:started", workflowId=running)
        await shared.faults(drop_sockets=True)
        await stream.until("backend:disconnected")
        await stream.until("backend:connected")
        back = len(stream.frames)
        await stream.until("workflow:progress", after=back, workflowId=running)
        await stream.until("workflow:completed", workflowId=running)
        progress = [frame["progress"] for frame in stream.of(running, "workflow:progress")]
    assert progress == sorted(progress)
    assert (await queue.get(running))["attempt"] == 1
    assert await shared.posts() == posts + 1


async def test_ended_while_the_socket_was_away(queue: Queue, shared: Comfy) -> None:
    """Nobody says anything again: the service asks when it is back."""
    running = await queue.submit(sleeper(steps=2))
    await queue.started(running)
    await shared.faults(drop_sockets=True, deaf=True)
    await shared.until_queue(lambda running, pending: not running)
    await shared.faults(drop_sockets=True)
    view = await queue.ended(running)
    assert (view["status"], view["attempt"]) == ("completed", 1)


async def test_a_deaf_socket(queue: Queue, shared: Comfy) -> None:
    """Open, but no word after a POST (PROTOCOL 1.7): a fresh one is opened, and the run is found."""
    posts = await shared.posts()
    async with queue.stream("backend") as stream:
        await shared.faults(deaf=True)
        one = await queue.submit(picture())
        await stream.until("backend:disconnected")
        view = await queue.ended(one)
    assert (view["status"], view["attempt"], len(view["outputs"])) == ("completed", 1, 1)
    await shared.faults()
    assert await shared.posts() == posts + 1


async def test_the_history_is_cleared_before_it_was_read(queue: Queue, shared: Comfy) -> None:
    """Somebody forgets the runs in the moment of the end: what the socket has shown is the verdict."""
    posts = await shared.posts()
    running = await queue.submit(sleeper(steps=3))
    await queue.started(running)
    await shared.faults(http_delay=0.3)  # the service asks for the history, and is answered late
    deleting = (await queue.get(running))["promptId"]
    async with queue.stream("comfyui") as stream:
        await stream.until("comfyui:execution_success", workflowId=running)
        await shared.faults(http_delay=0.3, clear_history=True)
        await shared.faults(http_delay=0.0, clear_history=True)
    view = await queue.ended(running)
    assert deleting not in await shared.history()
    assert (view["status"], view["attempt"], len(view["outputs"])) == ("completed", 1, 1)
    assert view["outputs"][0]["size"] > 0
    assert await shared.posts() == posts + 1


@pytest.mark.slow
async def test_the_queue_is_cleared_by_somebody_else(queue: Queue, shared: Comfy) -> None:
    """What was posted ahead is gone without a trace: lost, and posted again under another id."""
    blocker = await queue.submit(sleeper())
    ahead = await queue.submit(picture())
    _, (prompt,) = await shared.until_queue(lambda running, pending: bool(pending))
    await shared.post("/queue", {"clear": True})
    await queue.cancel(blocker)
    view = await queue.ended(ahead)
    assert (view["status"], view["attempt"]) == ("completed", 2)
    assert view["promptId"] != prompt


async def test_ghosts_are_swept(simulator: Comfy, tmp_path: Path) -> None:
    """Prompts under our client id that belong to no attempt (a POST that came late) do not run, ever."""
    settings = load(environment(tmp_path, simulator), None)
    async with house(create_app(settings)) as queue:
        await queue.connected()
        first = await queue.run(picture())
        client_id = (await simulator.history())[first["promptId"]]["prompt"][3]["client_id"]
    ghosts = [await simulator.post_prompt(sleeper(), client_id=client_id) for _ in range(2)]
    theirs = await simulator.post_prompt(picture())
    async with house(create_app(settings)):
        await simulator.until_queue(lambda running, pending: not running and not pending)
        history = await simulator.history()
        assert history[theirs]["status"]["status_str"] == "success"
        assert ghosts[1] not in history
        assert history[ghosts[0]]["status"]["messages"][-1][0] == "execution_interrupted"


async def test_a_ghost_that_comes_later_is_swept_too(queue: Queue, shared: Comfy) -> None:
    first = await queue.run(picture())
    client_id = (await shared.history())[first["promptId"]]["prompt"][3]["client_id"]
    ghost = await shared.post_prompt(sleeper(), client_id=client_id)
    # It would run for half a minute; no reconnect and no other work is needed to find it.
    await shared.until_queue(lambda running, pending: not running and not pending)
    assert (await shared.history())[ghost]["status"]["messages"][-1][0] == "execution_interrupted"
    assert (await queue.run(picture()))["status"] == "completed"


async def test_out_of_memory_has_one_more_try(queue: Queue, shared: Comfy) -> None:
    posts = await shared.posts()
    view = await queue.run(workflow("fail_oom_torch"))
    assert (view["status"], view["errorType"], view["attempt"]) == ("failed", "oom", 2)
    errors = [event for event in await queue.events(view["workflowId"]) if event["type"] == "workflow:error"]
    assert [event["willRetry"] for event in errors] == [True, False]
    assert {event["errorType"] for event in errors} == {"oom"}
    assert await shared.posts() == posts + 2
    once = await queue.run(workflow("fail_oom_runtime"), maxAttempts=1)
    assert (once["status"], once["errorType"], once["attempt"]) == ("failed", "oom", 1)
