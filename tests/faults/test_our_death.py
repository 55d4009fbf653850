"""The service is killed (kill -9) at each instant where something has just become true, or is about to.

Exact, not lucky: commits are held by a lock on the store's file, the POST and its answer by a proxy. Afterwards every
accepted workflow is there, in its order, none was posted twice, and verdicts and files are right.
"""

from __future__ import annotations

import asyncio
import json
import signal
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from management_api.app import create_app
from management_api.settings import load
from tests.faults.kit import Owed, Site, ask, doomed, ended, knocks, locked, one_verdict, posted_once, until_stored
from tests.faults.proxy import Proxy
from tests.queue_kit import PATH, Child, Queue, house, picture, sleeper
from tests.serving import KEY

pytestmark = pytest.mark.asyncio(loop_scope="module")

ATTEMPT = "SELECT 1 FROM attempt JOIN workflow ON workflow.number = attempt.workflow WHERE workflow.id = ?"


def again(environ: dict[str, str]) -> Any:
    """The service after the kill. In this process: it finds the same files."""
    return house(create_app(load(environ, None)))


async def three(queue: Queue, owed: Owed) -> list[str]:
    """Waiting, in the order in which they are to run."""
    low = await owed.submit(queue, priority="low")
    return [await owed.submit(queue, priority="high"), await owed.submit(queue), low]


async def say(queue: Child, body: dict[str, Any], **headers: str) -> asyncio.StreamWriter:
    """Hand a workflow in, and never read the answer."""
    parts = urlsplit(queue.url)
    _, writer = await asyncio.open_connection(parts.hostname, parts.port)
    content = json.dumps(body).encode()
    head = {"Host": parts.netloc, "X-API-Key": KEY, "Content-Type": "application/json"} | headers
    lines = [f"POST {PATH} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items())]
    lines.append(f"Content-Length: {len(content)}\r\n\r\n")
    writer.write("\r\n".join(lines).encode() + content)
    await writer.drain()
    return writer


# ---- the row


async def test_before_the_row_is_stored(site: Site, owed: Owed, tmp_path: Path) -> None:
    """It was never accepted: nothing of it is there, and the same request is taken as a new one."""
    environ = site.environ(tmp_path)
    graph, color = owed.picture()
    body: dict[str, Any] = {"workflow": graph, "id": str(uuid.uuid4())}
    async with doomed(environ) as queue:
        await queue.switch("pause")
        waiting = await three(queue, owed)
        with locked(tmp_path / "data"):
            writer = await say(queue, body)
            await knocks(queue.process.pid)
            queue.kill()
        writer.close()
    async with again(environ) as queue:
        assert (await queue.client.get(f"{PATH}/{body['id']}")).status_code == 404
        assert len((await queue.list())["workflows"]) == 3
        assert await queue.submit(graph, id=body["id"]) == body["id"]
        owed.color[body["id"]] = color
        await queue.switch("resume")
        await owed.kept(queue, site.witness, *waiting[:2], body["id"], waiting[2])


async def test_after_the_row_is_stored(site: Site, owed: Owed, tmp_path: Path) -> None:
    """Accepted, though the client never heard so: it asks again under its id or key, and learns it."""
    environ = site.environ(tmp_path)
    graph, color = owed.picture()
    body: dict[str, Any] = {"workflow": graph, "id": str(uuid.uuid4())}
    async with doomed(environ) as queue:
        await queue.switch("pause")
        waiting = await three(queue, owed)
        writer = await say(queue, body, **{"Idempotency-Key": "once"})
        await until_stored(tmp_path / "data", "SELECT 1 FROM workflow WHERE id = ?", body["id"])
        queue.kill()
        writer.close()
    async with again(environ) as queue:
        owed.color[body["id"]] = color
        same = {"Idempotency-Key": "once", "Content-Type": "application/json"}
        replayed = await queue.client.post(PATH, content=json.dumps(body), headers=same)
        assert (replayed.status_code, replayed.headers.get("idempotency-replayed")) == (202, "true")
        assert (await queue.post(graph, id=body["id"])).status_code == 409
        order = [*waiting[:2], body["id"], waiting[2]]
        assert [(await queue.get(one))["queuePosition"] for one in order] == [0, 1, 2, 3]
        await queue.switch("resume")
        views = await owed.kept(queue, site.witness, *order)
        assert [view["attempt"] for view in views] == [1] * 4


# ---- the attempt


async def test_before_the_attempt_is_stored(site: Site, proxy: Proxy, owed: Owed, tmp_path: Path) -> None:
    """The next one is being handed out. ComfyUI has not heard of it, so it simply waits again."""
    environ = site.environ(tmp_path, proxy, COMFYUI_PREFETCH="false")
    end, history = proxy.hold_frame("executing", node=None), proxy.hold("GET", "/history")
    async with doomed(environ) as queue, queue.stream("workflow") as stream:
        await stream.until("subscribed")
        first, second = await owed.submit(queue), await owed.submit(queue)
        await stream.until("images:generated", workflowId=first)
        await end.caught()
        with locked(tmp_path / "data"):
            end.release()
            await history.caught()  # the first has ended, and its verdict is not known yet
            await knocks(queue.process.pid)
            assert len(proxy.posted) == 1
            queue.kill()
            assert ask(tmp_path / "data", ATTEMPT, first)
            assert not ask(tmp_path / "data", ATTEMPT, second)
    history.release()
    async with again(environ) as queue:
        views = await owed.kept(queue, site.witness)
        assert [view["attempt"] for view in views] == [1, 1]
        assert await queue.attempts(second) == [(1, "ended")]


async def test_after_the_attempt_is_stored(site: Site, proxy: Proxy, owed: Owed, tmp_path: Path) -> None:
    """The POST has left us and never arrives: lost after two looks, and posted under another id."""
    environ = site.environ(tmp_path, proxy)
    posting = proxy.hold("POST", "/prompt", 1)
    async with doomed(environ) as queue:
        first, second = await owed.submit(queue), await owed.submit(queue)
        held = await posting.caught()
        queue.kill()
        held.drop()
    async with again(environ) as queue:
        views = await owed.kept(queue, site.witness)
        assert [view["attempt"] for view in views] == [2, 1]
        assert await queue.attempts(first) == [(1, "lost"), (2, "ended")]
        assert await queue.attempts(second) == [(1, "ended")]
    assert held.json["prompt_id"] not in site.witness.prompts("taken")


async def test_the_post_arrives_when_it_is_looked_for(site: Site, proxy: Proxy, owed: Owed, tmp_path: Path) -> None:
    """Not found at the first look, there at the second: not lost, not posted again."""
    environ = site.environ(tmp_path, proxy)
    posting = proxy.hold("POST", "/prompt", 1)
    async with doomed(environ) as queue:
        one = await owed.submit(queue)
        held = await posting.caught()
        queue.kill()
    looking = proxy.hold("GET", "/history", 1)
    async with again(environ) as queue:
        look = await looking.caught()
        assert (await look.ask()).endswith(b"{}")
        look.answer()
        await held.ask()
        (view,) = await owed.kept(queue, site.witness)
        assert (view["attempt"], view["promptId"]) == (1, held.json["prompt_id"])
        assert await queue.kinds(one) == ["queued", "started", "completed"]


# ---- the POST


async def test_before_the_post_answers(site: Site, proxy: Proxy, owed: Owed, tmp_path: Path) -> None:
    """ComfyUI has taken it, and we never knew."""
    environ = site.environ(tmp_path, proxy)
    posting = proxy.hold("POST", "/prompt", 1)
    async with doomed(environ) as queue:
        await owed.submit(queue)
        await owed.submit(queue)
        held = await posting.caught()
        await held.ask()
        queue.kill()
        held.drop()
    async with again(environ) as queue:
        views = await owed.kept(queue, site.witness)
        assert [view["attempt"] for view in views] == [1, 1]
        assert views[0]["promptId"] == held.json["prompt_id"]


async def test_after_the_post_answers(site: Site, proxy: Proxy, owed: Owed, tmp_path: Path) -> None:
    """Known to be there, and nothing heard since."""
    environ = site.environ(tmp_path, proxy)
    posting, start = proxy.hold("POST", "/prompt", 1), proxy.hold_frame("execution_start")
    async with doomed(environ) as queue:
        one = await owed.submit(queue)
        await owed.submit(queue)
        (await posting.caught()).answer()
        await start.caught()
        assert (await queue.get(one))["status"] == "queued"
        queue.kill()
    async with again(environ) as queue:
        views = await owed.kept(queue, site.witness)
        assert [view["attempt"] for view in views] == [1, 1]


# ---- the verdict


async def test_before_the_verdict_is_stored(site: Site, proxy: Proxy, owed: Owed, tmp_path: Path) -> None:
    """It has ended and we know how; nothing of that is on disk. ComfyUI's history has it still."""
    environ = site.environ(tmp_path, proxy)
    reading = proxy.hold("GET", "/history", 1)
    async with doomed(environ) as queue, queue.stream("workflow") as stream:
        await stream.until("subscribed")
        one = await owed.submit(queue)
        await stream.until("images:generated", workflowId=one)
        held = await reading.caught()
        with locked(tmp_path / "data"):
            held.answer()
            await knocks(queue.process.pid)
            assert (await queue.get(one))["status"] == "running"
            queue.kill()
    async with again(environ) as queue:
        await owed.submit(queue)
        views = await owed.kept(queue, site.witness)
        assert [view["attempt"] for view in views] == [1, 1]
        messages = dict((await site.simulator.history())[views[0]["promptId"]]["status"]["messages"])
        assert views[0]["completionTime"] == messages["execution_success"]["timestamp"]


async def test_after_the_verdict_is_stored(site: Site, owed: Owed, tmp_path: Path) -> None:
    """It stands, word for word, and whoever asks for events hears of it once."""
    environ = site.environ(tmp_path)
    async with doomed(environ) as queue:
        one = await owed.submit(queue)
        await until_stored(tmp_path / "data", "SELECT 1 FROM workflow WHERE id = ? AND status = 'completed'", one)
        queue.kill()
    stored = ask(tmp_path / "data", "SELECT * FROM workflow WHERE id = ?", one)
    await site.simulator.post("/history", {"clear": True})  # nobody needs it any more
    async with again(environ) as queue:
        await owed.submit(queue)
        await owed.kept(queue, site.witness)
        async with queue.stream("workflow", since=0) as stream:
            await stream.until("subscribed")
            await stream.until("workflow:completed", workflowId=one)
            assert len((await stream.settled(), stream.of(one, "workflow:completed"))[1]) == 1
        assert await one_verdict(queue, one) == "completed"
    assert ask(tmp_path / "data", "SELECT * FROM workflow WHERE id = ?", one) == stored


# ---- what we were doing to it


async def test_while_it_is_stopped_for_its_time_limit(site: Site, proxy: Proxy, tmp_path: Path) -> None:
    """The interrupt has come, the verdict is not written: it ran too long all the same."""
    environ = site.environ(tmp_path, proxy)
    interrupting = proxy.hold("POST", "/interrupt", 1)
    async with doomed(environ) as queue:
        one = await queue.submit(sleeper(), timeoutSeconds=0.3)
        await (await interrupting.caught()).ask()
        await site.simulator.until_queue(lambda running, pending: not running)
        queue.kill()
    async with again(environ) as queue:
        view = await ended(queue, one)
        assert (view["status"], view["errorType"]) == ("failed", "timeout")


@pytest.mark.slow
@pytest.mark.parametrize("attempts", [3, 1])
async def test_while_it_is_taken_back(site: Site, proxy: Proxy, owed: Owed, tmp_path: Path, attempts: int) -> None:
    """Posted ahead, and deleted to let another go first; that is not written yet. It has not run, so it runs."""
    environ = site.environ(tmp_path, proxy)
    withdrawing = proxy.hold("POST", "/queue", 1)
    async with doomed(environ) as queue:
        blocker = await queue.submit(sleeper(steps=10))
        one = await owed.submit(queue, maxAttempts=attempts)
        await queue.posted(one)
        urgent = await owed.submit(queue, priority="high")
        await (await withdrawing.caught()).ask()
        queue.kill()
    async with again(environ) as queue:
        owed.color = {urgent: owed.color[urgent], one: owed.color[one]}
        assert (await ended(queue, blocker))["status"] == "completed"
        for each in owed.color:
            assert (await ended(queue, each))["status"] == "completed"
            assert await one_verdict(queue, each) == "completed"
        posted_once(site.witness)


# ---- at no instant in particular


@pytest.mark.slow
async def test_killed_in_the_middle(site: Site, tmp_path: Path) -> None:
    """What ran runs on and is followed again; what was posted ahead is not posted twice; what waited waits."""
    environ = site.environ(tmp_path)
    async with doomed(environ) as queue:
        running = await queue.submit(sleeper(steps=30), priority="high")
        waiting = [await queue.submit(picture()) for _ in range(3)]
        gone = await queue.submit(picture())
        await queue.started(running)
        await site.simulator.until_queue(lambda running, pending: bool(pending))
        await queue.cancel(gone)
        before = {one: await queue.get(one) for one in (running, *waiting, gone)}
        queue.kill()
    assert len(site.witness.prompts("taken")) == 2
    async with doomed(environ) as queue:
        found = [await ended(queue, one) for one in (running, *waiting)]
        assert [view["status"] for view in found] == ["completed"] * 4
        assert [view["attempt"] for view in found] == [1] * 4
        assert [view["promptId"] for view in found[:2]] == [before[one]["promptId"] for one in (running, waiting[0])]
        assert found[0]["startTime"] == before[running]["startTime"]
        assert found[0]["nodes"] == {"total": 3, "done": 3, "cached": 0}
        assert await queue.kinds(running) == ["queued", "started", "completed"]
        assert await queue.get(gone) == before[gone]
        assert await queue.attempts(running) == [(1, "ended")]
        queue.kill()
    assert site.witness.prompts("taken") == [view["promptId"] for view in found]


# ---- a stop in order leaves the prompt to ComfyUI


@pytest.mark.slow
async def test_a_deliberate_stop(site: Site, tmp_path: Path) -> None:
    environ = site.environ(tmp_path)
    async with doomed(environ) as queue:
        running = await queue.submit(sleeper(steps=25))
        await queue.started(running)
        queue.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(queue.process.wait, 10) == 0
    assert len((await site.simulator.queue())[0]) == 1
    async with again(environ) as queue:
        assert (await ended(queue, running))["status"] == "completed"
    assert len(site.witness.prompts("taken")) == 1


async def test_it_ended_while_we_were_away(site: Site, tmp_path: Path) -> None:
    """The start of the second and both ends were told to nobody: the history has them."""
    environ = site.environ(tmp_path)
    async with again(environ) as queue:
        await queue.connected()
        running = await queue.submit(sleeper(steps=4))
        ahead = await queue.submit(picture())
        await queue.started(running)
        await site.simulator.until_queue(lambda running, pending: bool(pending))
    await site.simulator.until_queue(lambda running, pending: not running and not pending)
    async with again(environ) as queue:
        for one in (running, ahead):
            view = await ended(queue, one)
            assert (view["status"], view["attempt"], len(view["outputs"])) == ("completed", 1, 1)
            messages = dict((await site.simulator.history())[view["promptId"]]["status"]["messages"])
            assert view["startTime"] == messages["execution_start"]["timestamp"]
            assert view["completionTime"] == messages["execution_success"]["timestamp"]
            assert await queue.kinds(one) == ["queued", "started", "completed"]
    assert len(site.witness.prompts("taken")) == 2


async def test_it_started_while_we_were_away(site: Site, tmp_path: Path) -> None:
    """It is found running: that it runs is told at once, and when it began as soon as ComfyUI says so."""
    environ = site.environ(tmp_path)
    async with again(environ) as queue:
        await queue.connected()
        blocker = await queue.submit(sleeper())
        ahead = await queue.submit(sleeper())
        await queue.started(blocker)
        _, (prompt,) = await site.simulator.until_queue(lambda running, pending: bool(pending))
    await site.simulator.post("/interrupt", {})
    await site.simulator.until_queue(lambda running, pending: running == [prompt])
    async with again(environ) as queue:
        await queue.started(ahead)
        view = await queue.get(ahead)
        assert (view["status"], view["attempt"], view["promptId"]) == ("running", 1, prompt)
        assert (await ended(queue, blocker))["status"] == "cancelled"
        await site.simulator.post("/interrupt", {})
        view = await ended(queue, ahead)
        messages = dict((await site.simulator.history())[prompt]["status"]["messages"])
        assert view["startTime"] == messages["execution_start"]["timestamp"]
        assert view["completionTime"] == messages["execution_interrupted"]["timestamp"]
