"""Prompts under our client id that belong to no attempt (a POST that came late): they do not run, ever."""

from __future__ import annotations

from pathlib import Path

import pytest

from management_api.app import create_app
from management_api.settings import load
from tests.faults.kit import Site, ended
from tests.faults.proxy import Proxy
from tests.queue_kit import Queue, house, picture, sleeper

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def client_id(queue: Queue, site: Site) -> str:
    """The address under which the service hears of its prompts."""
    first = await queue.run(picture())
    found: str = (await site.simulator.history())[first["promptId"]]["prompt"][3]["client_id"]
    return found


async def test_found_at_the_start(site: Site, tmp_path: Path) -> None:
    settings = load(site.environ(tmp_path), None)
    async with house(create_app(settings)) as queue:
        await queue.connected()
        ours = await client_id(queue, site)
    ghosts = [await site.simulator.post_prompt(sleeper(), client_id=ours) for _ in range(2)]
    theirs = await site.simulator.post_prompt(picture())
    async with house(create_app(settings)):
        await site.simulator.until_queue(lambda running, pending: not running and not pending)
        history = await site.simulator.history()
        assert history[theirs]["status"]["status_str"] == "success"
        assert ghosts[1] not in history
        assert history[ghosts[0]]["status"]["messages"][-1][0] == "execution_interrupted"


async def test_found_when_it_starts(queue: Queue, site: Site) -> None:
    ghost = await site.simulator.post_prompt(sleeper(), client_id=await client_id(queue, site))
    # It would run for half a minute; no reconnect and no other work is needed to find it.
    await site.simulator.until_queue(lambda running, pending: not running and not pending)
    assert (await site.simulator.history())[ghost]["status"]["messages"][-1][0] == "execution_interrupted"
    assert (await queue.run(picture()))["status"] == "completed"


async def test_a_post_that_was_given_up_and_arrives(queue: Queue, site: Site, proxy: Proxy) -> None:
    """Something held it back for longer than both looks: by then another attempt is the workflow's own."""
    posting = proxy.hold("POST", "/prompt", 1)
    one = await queue.submit(sleeper(steps=12))
    held = await posting.caught()
    held.drop()
    view = await ended(queue, one)
    assert (view["status"], view["attempt"]) == ("completed", 2)
    other = await queue.run(picture())  # ComfyUI keeps the results of the last prompt: the late one is to run anew
    await held.ask()
    await site.simulator.until_queue(lambda running, pending: not running and not pending)
    assert site.witness.verdicts() == {
        view["promptId"]: "execution_success",
        other["promptId"]: "execution_success",
        held.json["prompt_id"]: "execution_interrupted",
    }
    assert await queue.get(one) == view
