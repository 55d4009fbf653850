"""ComfyUI's HTTP hangs, in whole or in part, or loses an answer: work is late, never lost, never doubled."""

from __future__ import annotations

import contextlib

import pytest

from tests.faults.kit import LATE, Owed, Site, ended, one_verdict, posted_once
from tests.faults.proxy import Proxy
from tests.queue_kit import Queue, picture, sleeper

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_everything_hangs(queue: Queue, site: Site, proxy: Proxy) -> None:
    """Clients are served as ever; when it speaks again the end is read, and the rest runs."""
    running = await queue.submit(sleeper(steps=5))
    await queue.started(running)
    proxy.silence()
    waiting, gone = await queue.submit(picture()), await queue.submit(picture())
    assert await queue.cancel(gone) == "cancelled"
    await site.simulator.until_queue(lambda running, pending: not running)
    assert [(await queue.get(one))["status"] for one in (running, waiting)] == ["running", "queued"]
    proxy.speak()
    for one in (running, waiting):
        view = await ended(queue, one)
        assert (view["status"], view["attempt"], len(view["outputs"])) == ("completed", 1, 1)
        assert await one_verdict(queue, one) == "completed"
    assert len(site.witness.prompts("taken")) == 2
    posted_once(site.witness)


async def test_a_no_that_is_not_comfyuis(queue: Queue, site: Site, proxy: Proxy, owed: Owed) -> None:
    """Something between us throttles: that says nothing of the workflow, which waits and goes out again."""
    posting = proxy.hold("POST", "/prompt", 1)
    one = await owed.submit(queue)
    (await posting.caught()).say(429, "Too many requests")
    (view,) = await owed.kept(queue, site.witness)
    assert (view["attempt"], view["errors"]) == (1, [])
    assert await queue.attempts(one) == [(1, "withdrawn"), (1, "ended")]


@pytest.mark.slow
async def test_everything_hangs_for_a_minute(queue: Queue, site: Site, proxy: Proxy, owed: Owed) -> None:
    """Longer than every time limit of ours: the socket is given up, and taken up again."""
    await owed.submit(queue)
    posting = proxy.hold("POST", "/prompt", 1)
    await owed.submit(queue)
    await (await posting.caught()).ask()
    proxy.silence()
    async with queue.stream("backend") as stream:
        for _ in range(4):  # each wait has an end of its own
            with contextlib.suppress(TimeoutError):
                await stream.until("backend:disconnected")
                break
        else:
            raise AssertionError("nobody noticed")
    proxy.speak()
    views = await owed.kept(queue, site.witness, seconds=LATE)
    assert [view["attempt"] for view in views] == [1, 1]


async def test_only_the_history_hangs(queue: Queue, site: Site, proxy: Proxy, owed: Owed) -> None:
    """The verdict waits for it, the card does not: the next ones have run by then."""
    reading = proxy.hold("GET", "/history")
    ids = [await owed.submit(queue) for _ in range(3)]
    held = [await reading.caught() for _ in ids]
    assert [exchange.path for exchange in held] == [f"/history/{one}" for one in site.witness.verdicts()]
    assert {(await queue.get(one))["completionTime"] for one in ids} == {None}
    reading.release()
    await owed.kept(queue, site.witness)


async def test_only_the_queue_hangs(queue: Queue, site: Site, proxy: Proxy) -> None:
    """A cancel is told at once; nothing new is posted before its prompt is known to be gone."""
    running = await queue.submit(sleeper())
    await queue.started(running)
    asking = proxy.hold("GET", "/queue")
    assert await queue.cancel(running) == "cancelled"
    follower = await queue.submit(picture())
    await asking.caught()
    assert (await queue.get(follower))["attempt"] == 0
    asking.release()
    assert (await ended(queue, follower))["status"] == "completed"
    assert list(site.witness.verdicts().values()) == ["execution_interrupted", "execution_success"]
    assert await one_verdict(queue, running) == "cancelled"


async def test_the_question_where_it_is_breaks(queue: Queue, site: Site, proxy: Proxy, owed: Owed) -> None:
    """No answer to the POST, none to the questions after it: asked again until there is one, and not posted again."""
    posting, asking = proxy.hold("POST", "/prompt", 1), proxy.hold("GET", "/queue", 1)
    await owed.submit(queue)
    post = await posting.caught()
    await post.ask()
    post.drop()
    (await asking.caught()).drop()
    (view,) = await owed.kept(queue, site.witness)
    assert view["attempt"] == 1


@pytest.mark.slow
async def test_an_answer_to_the_post_that_never_comes(queue: Queue, site: Site, proxy: Proxy, owed: Owed) -> None:
    """Given up after half a minute; by then it has run, and that is its result."""
    posting = proxy.hold("POST", "/prompt", 1)
    await owed.submit(queue)
    await owed.submit(queue)
    await (await posting.caught()).ask()
    views = await owed.kept(queue, site.witness, seconds=LATE)
    assert [view["attempt"] for view in views] == [1, 1]


async def test_an_end_that_cannot_be_read(queue: Queue, site: Site, proxy: Proxy, owed: Owed) -> None:
    """The question about it breaks: it is asked again a second later, and not when it is looked after next."""
    reading = proxy.hold("GET", "/history", 1)
    await owed.submit(queue)
    (await reading.caught()).drop()
    await owed.kept(queue, site.witness, seconds=10)


async def test_a_slow_one(queue: Queue, site: Site, proxy: Proxy, owed: Owed) -> None:
    proxy.delay = 0.02
    for _ in range(2):
        await owed.submit(queue)
    views = await owed.kept(queue, site.witness)
    assert [view["attempt"] for view in views] == [1, 1]


# ---- a POST of unknown outcome


async def test_the_answer_to_the_post_is_lost(queue: Queue, site: Site) -> None:
    await site.simulator.faults(lose_prompt_response=1)
    view = await queue.run(sleeper(steps=3))
    assert (view["status"], view["attempt"]) == ("completed", 1)
    assert site.witness.prompts("taken") == [view["promptId"]]


async def test_the_answer_is_lost_and_it_has_ended_already(queue: Queue, site: Site, owed: Owed) -> None:
    await site.simulator.faults(lose_prompt_response=1)
    await owed.submit(queue)
    (view,) = await owed.kept(queue, site.witness)
    assert view["attempt"] == 1
    messages = dict((await site.simulator.history())[view["promptId"]]["status"]["messages"])
    assert view["startTime"] == messages["execution_start"]["timestamp"]


async def test_the_post_breaks_before_it_is_taken(queue: Queue, site: Site, owed: Owed) -> None:
    """The service cannot know that; it asks twice, calls the attempt lost, and posts another."""
    await site.simulator.faults(refuse_prompt=1)
    one = await owed.submit(queue)
    (view,) = await owed.kept(queue, site.witness)
    assert view["attempt"] == 2
    assert await queue.attempts(one) == [(1, "lost"), (2, "ended")]


async def test_a_slow_answer_is_waited_for(queue: Queue, site: Site, owed: Owed) -> None:
    await site.simulator.faults(hang_prompt=0.5)
    for _ in range(2):
        await owed.submit(queue)
    views = await owed.kept(queue, site.witness)
    assert [view["attempt"] for view in views] == [1, 1]
