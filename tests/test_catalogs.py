"""What each ComfyUI can run: asked for once a connection, and nobody waits long for it. By way of a proxy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from managers.comfyui.backend import Backend, BackendConfig, Signal
from managers.comfyui.catalogs import Catalogs
from managers.comfyui.object_info import Catalog
from tests.comfy_kit import PATIENCE, Comfy, comfy
from tests.faults.proxy import Hold, Proxy, proxied
from tests.store_kit import ManualClock

AT_ONCE = 1.0
"""Seconds that are no waiting, on a busy machine."""


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy]:
    with comfy(tmp_path_factory.mktemp("catalogs")) as process:
        yield process


@pytest_asyncio.fixture
async def proxy(simulator: Comfy) -> AsyncIterator[Proxy]:
    async with proxied(simulator.url) as proxy:
        yield proxy


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@asynccontextmanager
async def connected(url: str, clock: ManualClock, name: str = "local") -> AsyncIterator[Backend]:
    backend = Backend(
        BackendConfig(name=name, url=url), "client", clock=clock, publish=lambda _: None, on_event=lambda _: None
    )
    task = asyncio.create_task(backend.run(tuple))
    try:
        async with asyncio.timeout(PATIENCE):
            await backend.wait_up()
        yield backend
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await backend.client.aclose()


@pytest_asyncio.fixture
async def backend(proxy: Proxy, clock: ManualClock) -> AsyncIterator[Backend]:
    async with connected(proxy.url, clock) as backend:
        yield backend


async def reconnected(backend: Backend, proxy: Proxy) -> None:
    with backend.inbox("nobody's prompt") as inbox:
        proxy.cut()
        async with asyncio.timeout(PATIENCE):
            while await inbox.get() is not Signal.UP:
                pass


def knows(catalogs: list[Catalog], class_type: str = "EmptyImage") -> list[bool | None]:
    """Whether each has the class; None for those that count as able."""
    return [None if one.object_info is None else class_type in one.object_info for one in catalogs]


def asked(hold: Hold) -> int:
    """How many requests it has caught."""
    return len(hold._all)


async def seconds(*asking: asyncio.Task[list[Catalog]]) -> float:
    began = time.monotonic()
    await asyncio.gather(*asking)
    return time.monotonic() - began


async def test_all_share_one_question(backend: Backend, proxy: Proxy) -> None:
    catalogs = Catalogs([backend])
    hold = proxy.hold("GET", "/object_info")
    asking = [asyncio.create_task(catalogs.current(["local"])) for _ in range(5)]
    exchange = await hold.caught()
    hold.release()
    assert [knows(await one) for one in asking] == [[True]] * 5
    assert exchange.path == "/object_info"
    hold = proxy.hold("GET", "/object_info")
    assert knows(await catalogs.current(["local"])) == [True]
    assert catalogs.node_class("EmptyImage") is not None
    assert asked(hold) == 0


async def test_a_slow_one_is_waited_for_once_by_all_together(
    backend: Backend, proxy: Proxy, clock: ManualClock
) -> None:
    catalogs = Catalogs([backend])
    hold = proxy.hold("GET", "/object_info")
    asking = [asyncio.create_task(catalogs.current(["local"])) for _ in range(5)]
    exchange = await hold.caught()
    assert 1 < await seconds(*asking) < 4
    assert [knows(one.result()) for one in asking] == [[None]] * 5
    clock.now += 3_000
    later = asyncio.create_task(catalogs.current(["local"]))
    assert await seconds(later) < AT_ONCE
    assert (knows(later.result()), asked(hold)) == ([None], 1)
    # It is listened to all the same.
    exchange.answer()
    for _ in range(PATIENCE * 100):
        if knows(await catalogs.current(["local"])) == [True]:
            break
        await asyncio.sleep(0.01)
    else:
        raise AssertionError("the late answer was not taken")
    assert asked(hold) == 1


async def test_a_failure_is_remembered(backend: Backend, proxy: Proxy, clock: ManualClock) -> None:
    catalogs = Catalogs([backend])
    hold = proxy.hold("GET", "/object_info")
    first = asyncio.create_task(catalogs.current(["local"]))
    (await hold.caught()).drop()
    assert knows(await first) == [None]
    assert knows(await catalogs.current(["local"])) == [None]
    clock.now += 25_000
    assert knows(await catalogs.current(["local"])) == [None]
    assert asked(hold) == 1
    # After a while it is asked again, and nobody waits for that.
    clock.now += 10_000
    second = asyncio.create_task(catalogs.current(["local"]))
    assert await seconds(second) < AT_ONCE
    exchange = await hold.caught()
    assert (knows(second.result()), asked(hold)) == ([None], 2)
    # A new connection may be a new ComfyUI: it is asked at once, and what the old one still says is not heard.
    hold.release()
    await exchange.ask()
    await reconnected(backend, proxy)
    assert knows(await catalogs.current(["local"])) == [True]


async def test_one_backend_that_hangs_does_not_hold_up_the_other(
    backend: Backend, simulator: Comfy, proxy: Proxy, clock: ManualClock
) -> None:
    async with connected(simulator.url, clock, "other") as other:
        catalogs = Catalogs([backend, other])
        proxy.hold("GET", "/object_info")
        asking = asyncio.create_task(catalogs.current(["local", "other"]))
        assert await seconds(asking) < 4
        assert knows(asking.result()) == [None, True]
        assert [one.name for one in asking.result()] == ["local", "other"]


async def test_what_cannot_be_asked_afresh_counts_as_able(backend: Backend, proxy: Proxy, clock: ManualClock) -> None:
    """A stale cache must never refuse good work (CONTRACT 4)."""
    catalogs = Catalogs([backend])
    assert knows(await catalogs.current(["local"]), "Brand/new? 100%\n") == [False]
    hold = proxy.hold("GET", "/object_info")
    asking = asyncio.create_task(catalogs.afresh(["local"], ["Brand/new? 100%\n"]))
    exchange = await hold.caught()
    assert exchange.path == "/object_info/Brand%2Fnew%3F%20100%25%0A"
    exchange.drop()
    assert knows(await asking) == [None]
    again = asyncio.create_task(catalogs.afresh(["local"], ["Brand/new? 100%\n"]))
    assert await seconds(again) < AT_ONCE
    assert (knows(again.result()), asked(hold)) == ([None], 1)
    assert knows(await catalogs.current(["local"])) == [True]
    clock.now += 40_000
    hold.release()
    for names in (["Brand/new? 100%\n", ""], [f"Class {n}" for n in range(30)]):
        assert knows(await catalogs.afresh(["local"], names), names[0]) == [False]


async def test_nothing_is_left_behind(proxy: Proxy, clock: ManualClock) -> None:
    hold = proxy.hold("GET", "/object_info")
    async with connected(proxy.url, clock) as backend:
        before = asyncio.all_tasks()
        asking = asyncio.create_task(Catalogs([backend]).current(["local"]))
        await hold.caught()
        asking.cancel()
        (fetching,) = {task for task in asyncio.all_tasks() - before if "object_info" in task.get_name()}
    async with asyncio.timeout(PATIENCE):
        await asyncio.wait({fetching})
    assert fetching.exception() is None


async def test_a_backend_that_is_away_is_not_asked(proxy: Proxy, clock: ManualClock, tmp_path: Path) -> None:
    backend = Backend(
        BackendConfig(name="local", url=proxy.url), "c", clock=clock, publish=lambda _: None, on_event=lambda _: None
    )
    hold = proxy.hold("GET", "/object_info")
    catalogs = Catalogs([backend])
    assert knows(await catalogs.current(["local"])) == [None]
    assert knows(await catalogs.afresh(["local"], ["EmptyImage"])) == [None]
    assert asked(hold) == 0
    await backend.client.aclose()
