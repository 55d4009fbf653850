"""DELETE against start, finish, retry, and the death of either process, each driven to one chosen interleaving.

The stored verdict is the only one, the stored events agree with it, ComfyUI is never left busy with a ghost, and the
next workflow runs.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from management_api.app import create_app
from management_api.settings import load
from tests.faults.kit import Owed, Site, at_rest, doomed, ended, knocks, locked, one_verdict
from tests.faults.proxy import Proxy
from tests.queue_kit import PATH, Queue, house, picture, sleeper, workflow

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module")
async def one_by_one(site: Site, proxy: Proxy, tmp_path: Path) -> AsyncIterator[Queue]:
    """A service that posts nothing ahead."""
    settings = load(site.environ(tmp_path, proxy, COMFYUI_PREFETCH="false"), None)
    async with house(create_app(settings)) as service:
        await service.connected()
        yield service


async def delete(queue: Queue, workflow_id: str) -> httpx.Response:
    return await queue.client.delete(f"{PATH}/{workflow_id}")


# ---- start


@pytest.mark.parametrize("first", ["claim", "cancel"])
async def test_while_it_is_handed_out(
    one_by_one: Queue, site: Site, proxy: Proxy, tmp_path: Path, first: str
) -> None:
    """Its attempt and its cancellation are written one after the other, in either order."""
    queue = one_by_one
    end, reading = proxy.hold_frame("executing", node=None), proxy.hold("GET", "/history", 1)
    async with queue.stream("workflow") as stream:
        await stream.until("subscribed")
        slow = sleeper()  # to unpack: its cancellation is on disk before it is in anybody's hands
        slow["1"]["_meta"] = {"title": "x", "fill": os.urandom(2**21).hex()}
        before, one, after = [await queue.submit(graph) for graph in (picture(), slow, picture())]
        await stream.until("images:generated", workflowId=before)
        await end.caught()
    with locked(tmp_path / "data"):
        if first == "claim":
            end.release()
            await knocks(os.getpid())
        deleting = asyncio.create_task(delete(queue, one))
        await knocks(os.getpid())
        end.release()
        await reading.caught()
    assert (await deleting).json()["status"] == "cancelled"
    reading.release()
    assert [(await ended(queue, other))["status"] for other in (before, after)] == ["completed"] * 2
    await at_rest(queue, site, before, one, after)
    assert await queue.kinds(one) == ["queued", "cancelled"]
    assert await queue.attempts(one) == ([(1, "ended")] if first == "claim" else [])


@pytest.mark.parametrize("what", ["arrives", "arrives, unanswered", "never arrives"])
async def test_while_the_post_is_on_its_way(queue: Queue, site: Site, proxy: Proxy, what: str) -> None:
    posting = proxy.hold("POST", "/prompt", 1)
    one, follower = await queue.submit(sleeper()), await queue.submit(picture())
    held = await posting.caught()
    assert await queue.cancel(one) == "cancelled"
    if what != "never arrives":
        await held.ask()
    if what == "arrives":
        held.answer()
    else:
        held.drop()
    assert (await ended(queue, follower))["status"] == "completed"
    await at_rest(queue, site, one, follower)
    assert await queue.kinds(one) == ["queued", "cancelled"]
    assert list(site.witness.verdicts().values()).count("execution_success") == 2


async def test_when_it_has_started_and_we_have_not_heard(queue: Queue, site: Site, proxy: Proxy) -> None:
    start = proxy.hold_frame("execution_start")
    one = await queue.submit(sleeper())
    prompt = (await start.caught())["data"]["prompt_id"]
    assert await queue.cancel(one) == "cancelled"
    await site.simulator.until_queue(lambda running, pending: not running)
    start.release()
    await at_rest(queue, site, one)
    assert await queue.kinds(one) == ["queued", "cancelled"]
    assert site.witness.verdicts()[prompt] == "execution_interrupted"


async def test_posted_ahead_and_starting(queue: Queue, site: Site, proxy: Proxy) -> None:
    """The word that takes it out of ComfyUI's queue comes when it runs there already."""
    blocker, one = await queue.submit(sleeper()), await queue.submit(sleeper())
    (running,), (ahead,) = await site.simulator.until_queue(lambda running, pending: bool(running and pending))
    deleting = proxy.hold("POST", "/queue", 1)
    assert await queue.cancel(one) == "cancelled"
    held = await deleting.caught()
    assert held.json == {"delete": [ahead]}
    await site.simulator.post("/interrupt", {"prompt_id": running})
    await site.simulator.until_queue(lambda running, pending: running == [ahead])
    held.answer()
    await at_rest(queue, site, blocker, one)
    assert await queue.kinds(one) == ["queued", "cancelled"]
    assert site.witness.verdicts()[ahead] == "execution_interrupted"


@pytest.mark.parametrize("cancelled", [False, True], ids=["runs", "cancelled"])
async def test_taken_back_and_starting(queue: Queue, site: Site, proxy: Proxy, cancelled: bool) -> None:
    """More urgent work takes its place, but it runs already: then it runs, and is cancelled as what runs."""
    blocker, one = await queue.submit(sleeper()), await queue.submit(sleeper(steps=600 if cancelled else 6))
    (running,), (ahead,) = await site.simulator.until_queue(lambda running, pending: bool(running and pending))
    withdrawing = proxy.hold("POST", "/queue", 1)
    urgent = await queue.submit(picture(), priority="high")
    held = await withdrawing.caught()
    await site.simulator.post("/interrupt", {"prompt_id": running})
    await site.simulator.until_queue(lambda running, pending: running == [ahead])
    if cancelled:
        assert await queue.cancel(one) == "cancelled"
    held.answer()
    assert (await ended(queue, urgent))["status"] == "completed"
    await at_rest(queue, site, blocker, one, urgent)
    assert site.witness.verdicts()[ahead] == ("execution_interrupted" if cancelled else "execution_success")
    assert await queue.attempts(one) == [(1, "ended")]


# ---- finish


async def test_it_has_ended_and_we_do_not_know_how(queue: Queue, site: Site, proxy: Proxy) -> None:
    """Cancelled, because that was written first; that it succeeded comes too late."""
    reading = proxy.hold("GET", "/history", 1)
    one = await queue.submit(picture())
    held = await reading.caught()
    assert await queue.cancel(one) == "cancelled"
    held.answer()
    await at_rest(queue, site, one)
    assert (await queue.get(one))["status"] == "cancelled"
    assert await queue.kinds(one) == ["queued", "started", "cancelled"]


@pytest.mark.parametrize("first", ["finish", "cancel"])
async def test_both_verdicts_wait_for_the_disk(
    queue: Queue, site: Site, proxy: Proxy, data: Path, first: str
) -> None:
    """Whichever came first is the verdict, and the other is refused."""
    reading = proxy.hold("GET", "/history", 1)
    async with queue.stream("workflow") as stream:
        await stream.until("subscribed")
        one = await queue.submit(picture())
        await stream.until("images:generated", workflowId=one)
    held = await reading.caught()
    with locked(data):
        if first == "finish":
            held.answer()
            await knocks(os.getpid())
        deleting = asyncio.create_task(delete(queue, one))
        await knocks(os.getpid())
        held.answer()
        assert (await queue.get(one))["status"] == "running"
    reply = await deleting
    if first == "finish":
        assert (reply.status_code, reply.json()["currentStatus"]) == (409, "completed")
    else:
        assert (reply.status_code, reply.json()["status"]) == (200, "cancelled")
    await at_rest(queue, site, one)
    assert await one_verdict(queue, one) == ("completed" if first == "finish" else "cancelled")
    assert len((await queue.get(one))["outputs"]) == (first == "finish")


async def test_the_interrupt_comes_when_the_next_one_runs(queue: Queue, site: Site, proxy: Proxy) -> None:
    """It names its prompt, which has succeeded meanwhile: the neighbour is not hit, the verdict stays."""
    interrupting = proxy.hold("POST", "/interrupt", 1)
    one, neighbour = await queue.submit(sleeper(steps=8)), await queue.submit(sleeper(steps=8))
    (first,), (second,) = await site.simulator.until_queue(lambda running, pending: bool(running and pending))
    assert await queue.cancel(one) == "cancelled"
    held = await interrupting.caught()
    assert held.json == {"prompt_id": first}
    await site.simulator.until_queue(lambda running, pending: running == [second])
    held.answer()
    assert (await ended(queue, neighbour))["status"] == "completed"
    await at_rest(queue, site, one, neighbour)
    assert await one_verdict(queue, one) == "cancelled"
    assert list(site.witness.verdicts().values())[:2] == ["execution_success"] * 2


async def test_it_runs_out_of_time(queue: Queue, site: Site, proxy: Proxy) -> None:
    interrupting = proxy.hold("POST", "/interrupt", 1)
    one = await queue.submit(sleeper(), timeoutSeconds=0.2)
    held = await interrupting.caught()
    assert await queue.cancel(one) == "cancelled"
    held.answer()
    await at_rest(queue, site, one)
    view = await queue.get(one)
    assert (view["status"], view["errorType"], view["error"]) == ("cancelled", None, None)


# ---- retry


async def test_it_is_about_to_be_tried_again(queue: Queue, site: Site, proxy: Proxy) -> None:
    """Out of memory: between its first failure and its second attempt."""
    freeing = proxy.hold("POST", "/free", 1)
    one = await queue.submit(workflow("fail_oom_torch"))
    held = await freeing.caught()
    assert await queue.cancel(one) == "cancelled"
    held.answer()
    await at_rest(queue, site, one)
    assert len(site.witness.prompts("taken")) == 2  # the second is that of `at_rest`
    assert await queue.kinds(one) == ["queued", "started", "cancelled"]


async def test_it_is_about_to_be_called_lost(queue: Queue, site: Site, proxy: Proxy) -> None:
    """ComfyUI has come back empty, and has denied it once."""
    one = await queue.submit(sleeper())
    await queue.started(one)
    looking = proxy.hold("GET", "/history", 2)
    site.simulator.restart()
    (await looking.caught()).answer()
    held = await looking.caught()
    assert await queue.cancel(one) == "cancelled"
    held.answer()
    await at_rest(queue, site, one)
    assert len(site.witness.prompts("taken")) == 2
    assert await queue.kinds(one) == ["queued", "started", "cancelled"]


async def test_retried_while_its_prompt_is_still_there(queue: Queue, site: Site, proxy: Proxy) -> None:
    """A new workflow that waits until the old prompt has gone."""
    one = await queue.submit(sleeper(steps=4))
    await queue.started(one)
    interrupting = proxy.hold("POST", "/interrupt", 1)
    assert await queue.cancel(one) == "cancelled"
    held = await interrupting.caught()
    reply = await queue.client.post(f"{PATH}/{one}/retry")
    assert reply.status_code == 202
    retry = reply.json()["workflowId"]
    for _ in range(2):  # two commits: a claim would have been among them
        await queue.switch("resume")
    assert (await queue.get(retry))["attempt"] == 0
    held.answer()
    view = await ended(queue, retry)
    assert (view["status"], view["attempt"], view["retryOf"]) == ("completed", 1, one)
    await at_rest(queue, site, one, retry)
    assert await one_verdict(queue, one) == "cancelled"


# ---- death


async def test_we_die_before_it_is_written(site: Site, owed: Owed, tmp_path: Path) -> None:
    """Nobody was told that it is cancelled, so it is not."""
    environ = site.environ(tmp_path)
    async with doomed(environ) as queue:
        one = await queue.submit(sleeper(steps=6))
        await queue.started(one)
        with locked(tmp_path / "data"):
            deleting = asyncio.create_task(delete(queue, one))
            await knocks(queue.process.pid)
            queue.kill()
        with pytest.raises(httpx.TransportError):
            await deleting
    async with house(create_app(load(environ, None))) as queue:
        view = await ended(queue, one)
        assert (view["status"], view["attempt"]) == ("completed", 1)
        await at_rest(queue, site, one)


@pytest.mark.parametrize("comfyui_too", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["we", "both"])
async def test_we_die_before_comfyui_hears(site: Site, proxy: Proxy, tmp_path: Path, comfyui_too: bool) -> None:
    environ = site.environ(tmp_path, proxy)
    async with doomed(environ) as queue:
        one = await queue.submit(sleeper())
        await queue.started(one)
        follower = await queue.submit(picture())
        interrupting = proxy.hold("POST", "/interrupt", 1)
        assert await queue.cancel(one) == "cancelled"
        held = await interrupting.caught()
        queue.kill()
        held.drop()
    if comfyui_too:
        site.simulator.restart()
    async with house(create_app(load(environ, None))) as queue:
        assert (await ended(queue, follower))["status"] == "completed"
        await at_rest(queue, site, one, follower)
        assert await queue.kinds(one) == ["queued", "started", "cancelled"]
        assert await queue.attempts(one) == [(1, "lost" if comfyui_too else "ended")]


async def test_comfyui_dies_of_it(queue: Queue, site: Site, proxy: Proxy) -> None:
    """It ends in the moment of the interrupt, and comes back."""
    one = await queue.submit(sleeper())
    await queue.started(one)
    interrupting = proxy.hold("POST", "/interrupt", 1)
    assert await queue.cancel(one) == "cancelled"
    held = await interrupting.caught()
    site.simulator.restart()
    held.drop()
    await at_rest(queue, site, one)
    assert await queue.kinds(one) == ["queued", "started", "cancelled"]


@pytest.mark.slow
async def test_we_die_and_comfyui_is_frozen(site: Site, tmp_path: Path) -> None:
    """The interrupt never left us: after the restart it does, before anything else runs."""
    environ = site.environ(tmp_path)
    async with doomed(environ) as queue:
        running = await queue.submit(sleeper())
        await queue.started(running)
        site.simulator.freeze()
        assert await queue.cancel(running) == "cancelled"
        queue.kill()
    site.simulator.thaw()
    async with house(create_app(load(environ, None))) as queue:
        await at_rest(queue, site, running)
        assert await queue.kinds(running) == ["queued", "started", "cancelled"]
        assert await queue.attempts(running) == [(1, "ended")]


async def test_comfyui_is_away(queue: Queue, site: Site) -> None:
    running = await queue.submit(sleeper())
    await queue.started(running)
    async with queue.stream("backend") as stream:
        await stream.until("subscribed")
        site.simulator.kill()
        await stream.until("backend:disconnected")
    assert await queue.cancel(running) == "cancelled"
    site.simulator.restart()
    await at_rest(queue, site, running)
    assert await queue.kinds(running) == ["queued", "started", "cancelled"]
    assert len(site.witness.prompts("taken")) == 2
