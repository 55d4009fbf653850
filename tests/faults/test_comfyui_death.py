"""ComfyUI dies, comes back empty, or forgets: what was seen counts, what is lost is told and runs again."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from management_api.app import create_app
from management_api.settings import load
from tests.faults.kit import LATE, Owed, Site, ended, one_verdict
from tests.faults.proxy import Proxy
from tests.queue_kit import Queue, house, picture, sleeper, workflow

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_killed_before_its_history_was_read(queue: Queue, site: Site, proxy: Proxy, owed: Owed) -> None:
    """The socket had told the end and the files: that is the verdict, and nothing runs again."""
    reading = proxy.hold("GET", "/history", 1)
    one = await owed.submit(queue)
    held = await reading.caught()
    site.simulator.kill()
    held.drop()
    site.simulator.restart()
    (view,) = await owed.kept(queue, site.witness)
    (line,) = [line for line in site.witness.lines() if line.event == "ended"]
    assert (view["attempt"], line.verdict) == (1, "execution_success")
    assert abs(view["completionTime"] - line.at * 1000) < 100
    assert await queue.kinds(one) == ["queued", "started", "completed"]


async def test_killed_before_it_told_the_end(queue: Queue, site: Site, proxy: Proxy, owed: Owed) -> None:
    """It had ended, and not a word of that left it: lost, told, and run again."""
    end = proxy.hold_frame("execution_success")
    one = await owed.submit(queue)
    await end.caught()
    site.simulator.restart()
    proxy.cut()
    view = await ended(queue, one)
    assert (view["status"], view["attempt"]) == ("completed", 2)
    assert await queue.attempts(one) == [(1, "lost"), (2, "ended")]
    assert await queue.kinds(one) == ["queued", "started", "error", "queued", "started", "completed"]
    assert await one_verdict(queue, one) == "completed"
    assert list(site.witness.verdicts().values()) == ["execution_success"] * 2


async def test_restarted_before_it_answered_the_post(queue: Queue, site: Site, proxy: Proxy, owed: Owed) -> None:
    """Taken and forgotten; the answer comes from the one that has forgotten it. Not to be believed for long."""
    posting = proxy.hold("POST", "/prompt", 1)
    one = await owed.submit(queue)
    held = await posting.caught()
    await site.simulator.faults(kill_worker=True)  # it takes the prompt and does not begin
    await held.ask()
    site.simulator.restart()
    held.answer()
    view = await ended(queue, one)
    assert (view["status"], view["attempt"]) == ("completed", 2)
    assert await queue.attempts(one) == [(1, "lost"), (2, "ended")]
    assert site.witness.prompts("taken") == [held.json["prompt_id"], view["promptId"]]
    assert list(site.witness.verdicts()) == [view["promptId"]]


@pytest.mark.slow
async def test_restarted_behind_a_socket_that_stays(queue: Queue, site: Site, proxy: Proxy) -> None:
    """Something between us and it keeps the socket open: nothing tells, but the next look does."""
    one = await queue.submit(sleeper(steps=10))
    await queue.started(one)
    proxy.hides_death = True
    site.simulator.restart()
    view = await ended(queue, one, LATE)
    assert (view["status"], view["attempt"]) == ("completed", 2)
    assert await queue.attempts(one) == [(1, "lost"), (2, "ended")]


async def test_evicted_from_the_history_unseen(queue: Queue, site: Site, proxy: Proxy, owed: Owed) -> None:
    """It ended while nobody heard, and the history has forgotten it: ComfyUI does not know it, so it runs again."""
    start = proxy.hold_frame("execution_start")
    one = await owed.submit(queue)
    await start.caught()
    await site.simulator.until_queue(lambda running, pending: not running and not pending)
    await site.simulator.post("/history", {"clear": True})
    proxy.cut()
    view = await ended(queue, one)
    assert (view["status"], view["attempt"], len(view["outputs"])) == ("completed", 2, 1)
    assert await queue.attempts(one) == [(1, "lost"), (2, "ended")]
    assert await one_verdict(queue, one) == "completed"


async def test_a_cached_run_that_nobody_heard(queue: Queue, site: Site, proxy: Proxy, owed: Owed) -> None:
    """No frame of it arrives; the history tells that nothing new was written, and the old file has gone."""
    graph, _ = owed.picture()
    first = await queue.run(graph)
    (site.simulator.outputs / first["outputs"][0]["filename"]).unlink()
    start = proxy.hold_frame("execution_start")
    one = await queue.submit(graph)
    await start.caught()
    await site.simulator.until_queue(lambda running, pending: not running and not pending)
    proxy.cut()
    view = await ended(queue, one)
    assert (view["status"], view["attempt"], view["outputsReused"]) == ("completed", 1, True)
    assert view["nodes"] == {"total": 2, "done": 2, "cached": 2}
    assert [output["filename"] for output in view["outputs"]] == [first["outputs"][0]["filename"]]
    assert [finding["code"] for finding in view["errors"]] == ["output_missing"]
    assert (await queue.client.get(view["outputs"][0]["url"])).status_code == 404


async def test_it_appears_later(site: Site, tmp_path: Path) -> None:
    site.simulator.kill()
    async with house(create_app(load(site.environ(tmp_path), None))) as queue:
        ready = await queue.client.get("/ready")
        assert (ready.status_code, ready.json()["checks"]["comfyui"]) == (200, "unreachable")
        waiting = [await queue.submit(picture()) for _ in range(2)]
        assert [(await queue.get(one))["attempt"] for one in waiting] == [0, 0]
        site.simulator.restart()
        found = [await ended(queue, one) for one in waiting]
        assert [(view["status"], view["attempt"]) for view in found] == [("completed", 1)] * 2
        ready = await queue.client.get("/ready")
        assert (ready.status_code, ready.json()["checks"]["comfyui"]) == (200, "ok")


async def test_killed_in_the_middle(queue: Queue, site: Site) -> None:
    async with queue.stream("workflow", "backend") as stream:
        await stream.until("subscribed")
        low = await queue.submit(sleeper(steps=10), priority="low")
        await queue.started(low)
        first = (await queue.get(low))["promptId"]
        normal = await queue.submit(picture())
        await site.simulator.until_queue(lambda running, pending: bool(pending))
        site.simulator.kill()
        await stream.until("backend:disconnected")
        assert (await queue.client.get("/ready")).json()["checks"]["comfyui"] == "unreachable"
        site.simulator.restart()
        # Each is lost, told, and runs again: in the order of the queue, with attempts counted.
        for one in (low, normal):
            lost = await stream.until("workflow:error", workflowId=one)
            assert (lost["errorType"], lost["willRetry"]) == ("lost", True)
    found = [await ended(queue, one) for one in (normal, low)]
    assert [(view["status"], view["attempt"]) for view in found] == [("completed", 2)] * 2
    assert found[1]["promptId"] != first
    assert await queue.attempts(low) == [(1, "lost"), (2, "ended")]
    assert await queue.kinds(low) == ["queued", "started", "error", "queued", "started", "completed"]
    assert site.witness.prompts("taken")[2:] == [view["promptId"] for view in found]


@pytest.mark.slow
async def test_lost_too_often(queue: Queue, site: Site) -> None:
    running = await queue.submit(sleeper(), maxAttempts=1)
    await queue.started(running)
    site.simulator.restart()
    view = await ended(queue, running)
    assert (view["status"], view["errorType"], view["attempt"]) == ("failed", "lost", 1)
    assert view["completionTime"] is not None
    assert site.witness.prompts("taken") == [view["promptId"]]
    assert (await queue.run(picture()))["status"] == "completed"


@pytest.mark.slow
async def test_crash_by_a_workflow_of_its_own(queue: Queue, site: Site) -> None:
    """The node ends ComfyUI's process each time: no third one is given to it, and no other work suffers."""
    crashing = await queue.submit(workflow("crash_hard_exit"))
    other = await queue.submit(picture(), priority="low")
    for attempt in (1, 2):
        await queue.until(crashing, "started", attempt=attempt)
        await asyncio.to_thread(site.simulator.process.wait, 10)
        site.simulator.restart()
    view = await ended(queue, crashing)
    assert (view["status"], view["errorType"], view["attempt"]) == ("failed", "poison", 2)
    assert (await ended(queue, other))["status"] == "completed"


@pytest.mark.slow
async def test_it_dies_right_after_it_took_the_prompt(queue: Queue, site: Site) -> None:
    await site.simulator.faults(die_after_accept=True)
    one = await queue.submit(picture())
    await asyncio.to_thread(site.simulator.process.wait, 10)
    site.simulator.restart()
    view = await ended(queue, one)
    assert (view["status"], view["attempt"]) == ("completed", 2)
    assert len(site.witness.prompts("taken")) == 2


@pytest.mark.slow
async def test_the_history_is_cleared_before_it_was_read(queue: Queue, site: Site) -> None:
    """Somebody forgets the runs in the moment of the end: what the socket has shown is the verdict."""
    running = await queue.submit(sleeper(steps=3))
    await queue.started(running)
    await site.simulator.faults(http_delay=0.3)  # the service asks for the history, and is answered late
    deleting = (await queue.get(running))["promptId"]
    async with queue.stream("comfyui") as stream:
        await stream.until("comfyui:execution_success", workflowId=running)
        await site.simulator.faults(http_delay=0.3, clear_history=True)
        await site.simulator.faults(http_delay=0.0, clear_history=True)
    view = await ended(queue, running)
    assert deleting not in await site.simulator.history()
    assert (view["status"], view["attempt"], len(view["outputs"])) == ("completed", 1, 1)
    assert view["outputs"][0]["size"] > 0
    assert site.witness.prompts("taken") == [deleting]


@pytest.mark.slow
async def test_the_queue_is_cleared_by_somebody_else(queue: Queue, site: Site) -> None:
    """What was posted ahead is gone without a trace: lost, and posted again under another id."""
    blocker = await queue.submit(sleeper())
    ahead = await queue.submit(picture())
    _, (prompt,) = await site.simulator.until_queue(lambda running, pending: bool(pending))
    await site.simulator.post("/queue", {"clear": True})
    await queue.cancel(blocker)
    view = await ended(queue, ahead)
    assert (view["status"], view["attempt"]) == ("completed", 2)
    assert view["promptId"] != prompt


async def test_out_of_memory_has_one_more_try(queue: Queue, site: Site) -> None:
    view = await queue.run(workflow("fail_oom_torch"))
    assert (view["status"], view["errorType"], view["attempt"]) == ("failed", "oom", 2)
    errors = [event for event in await queue.events(view["workflowId"]) if event["type"] == "workflow:error"]
    assert [event["willRetry"] for event in errors] == [True, False]
    assert {event["errorType"] for event in errors} == {"oom"}
    assert len(site.witness.prompts("taken")) == 2
    once = await queue.run(workflow("fail_oom_runtime"), maxAttempts=1)
    assert (once["status"], once["errorType"], once["attempt"]) == ("failed", "oom", 1)
