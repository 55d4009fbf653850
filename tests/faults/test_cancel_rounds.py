"""DELETE at a moment drawn by lot, many times over: what the client was told is what became of it, and stays so."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from tests.faults.kit import Site, at_rest, ended, one_verdict
from tests.faults.proxy import HeldFrame, Hold, Proxy
from tests.queue_kit import PATH, Graph, Queue, picture, sleeper

pytestmark = pytest.mark.asyncio(loop_scope="module")

MOMENTS: list[tuple[str, str]] = [
    ("POST", "/prompt"),
    ("GET", "/history"),
    ("frame", "execution_start"),
    ("frame", "progress_state"),
    ("frame", "executed"),
    ("frame", "execution_success"),
    ("", ""),
]


async def rounds(queue: Queue, site: Site, proxy: Proxy, seed: int, count: int) -> None:
    """So many workflows, each cancelled at a moment of its own; what the client was told is what became of it."""
    rng = random.Random(seed)
    told: dict[str, str] = {}
    for number in range(count):
        kind, name = rng.choice(MOMENTS)
        held: Hold | HeldFrame | None = None
        if kind == "frame":
            held = proxy.hold_frame(name, nth=1)
        elif kind:
            held = proxy.hold(kind, name, 1)
        graph: Graph = rng.choice([picture, lambda: sleeper(steps=2, seconds=0.01)])()
        one, neighbour = await queue.submit(graph), await queue.submit(picture())
        caught: Any = await held.caught() if held else None
        if kind == "POST" and rng.random() < 0.5:
            await caught.ask()
        for _ in range(rng.randrange(20)):
            await asyncio.sleep(0)  # not for an event: to meet different steps of the service
        replies = await asyncio.gather(*(queue.client.delete(f"{PATH}/{one}") for _ in range(rng.randint(1, 2))))
        if held is not None:
            held.release()
        view = await ended(queue, one)
        for reply in replies:
            right = (200, "cancelled") if view["status"] == "cancelled" else (409, view["status"])
            said = reply.json()
            assert (reply.status_code, said.get("currentStatus", said["status"])) == right, (seed, number, said)
        told[one] = await one_verdict(queue, one)
        told[neighbour] = (await ended(queue, neighbour))["status"]
        assert told[neighbour] == "completed", (seed, number)
    await at_rest(queue, site, *told)
    # What was told then is true still.
    assert {one: (await queue.get(one))["status"] for one in told} == told
    assert "cancelled" in told.values()


async def test_many_rounds(queue: Queue, site: Site, proxy: Proxy) -> None:
    await rounds(queue, site, proxy, seed=1, count=20)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3, 4])
async def test_many_more_rounds(queue: Queue, site: Site, proxy: Proxy, seed: int) -> None:
    await rounds(queue, site, proxy, seed, count=50)
