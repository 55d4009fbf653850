"""ComfyUI takes a part of a workflow (200 with node_errors) and would call half a result a success (CONTRACT 4)."""

from __future__ import annotations

from pathlib import Path

import pytest

from management_api.app import create_app
from management_api.settings import load
from tests.faults.kit import Site, doomed, ended, one_verdict
from tests.faults.proxy import Proxy
from tests.queue_kit import Queue, View, house, picture, workflow

pytestmark = pytest.mark.asyncio(loop_scope="module")

PARTIAL = workflow("partial_one_output_invalid")


def refused(view: View) -> bool:
    return (view["status"], view["errorType"], view["outputs"]) == ("failed", "validation", [])


async def test_it_has_ended_when_we_hear_of_it(queue: Queue, site: Site, proxy: Proxy) -> None:
    posting = proxy.hold("POST", "/prompt", 1)
    one = await queue.submit(PARTIAL)
    held = await posting.caught()
    await held.ask()
    await site.simulator.until_queue(lambda running, pending: not running and not pending)
    held.answer()
    assert refused(await ended(queue, one))
    assert await one_verdict(queue, one) == "failed"
    assert (await queue.run(picture()))["status"] == "completed"


async def test_the_answer_that_says_so_is_lost(queue: Queue, site: Site, proxy: Proxy) -> None:
    posting = proxy.hold("POST", "/prompt", 1)
    one = await queue.submit(PARTIAL)
    held = await posting.caught()
    await held.ask()
    held.drop()
    assert refused(await ended(queue, one))


@pytest.mark.slow
async def test_we_die_before_the_answer(site: Site, proxy: Proxy, tmp_path: Path) -> None:
    environ = site.environ(tmp_path, proxy)
    posting = proxy.hold("POST", "/prompt", 1)
    async with doomed(environ) as queue:
        one = await queue.submit(PARTIAL)
        held = await posting.caught()
        await held.ask()
        queue.kill()
        held.drop()
    async with house(create_app(load(environ, None))) as again:
        assert refused(await ended(again, one))
