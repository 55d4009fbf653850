"""One simulator for this folder, one proxy and one service for each file: what breaks is put right between tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from management_api.app import create_app
from management_api.settings import load
from tests.faults.kit import Owed, Site, comfy_site
from tests.faults.proxy import Proxy, proxied
from tests.queue_kit import Queue, house

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Faults wait for time limits: all of them are for `make test-all`."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with comfy_site(tmp_path_factory.mktemp("faults") / "comfyui") as site:
        yield site


@pytest_asyncio.fixture(loop_scope="module")
async def site(running: Site) -> Site:
    """ComfyUI, idle, and its witness, with nothing to tell yet."""
    await running.tidy()
    return running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def door(running: Site) -> AsyncIterator[Proxy]:
    async with proxied(running.simulator.url) as proxy:
        yield proxy


@pytest.fixture
def proxy(door: Proxy) -> Iterator[Proxy]:
    """What stands between the service and ComfyUI."""
    yield door
    door.mend()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("standing")


@pytest.fixture
def data(folder: Path) -> Path:
    """The data folder of `queue`."""
    return folder / "data"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def standing(running: Site, door: Proxy, folder: Path) -> AsyncIterator[Queue]:
    async with house(create_app(load(running.environ(folder, door), None))) as service:
        yield service


@pytest_asyncio.fixture(loop_scope="module")
async def queue(standing: Queue, site: Site, proxy: Proxy) -> AsyncIterator[Queue]:
    """A service in this process, before ComfyUI by way of the proxy, connected, with nothing to do."""
    await site.greeted(standing)
    yield standing
    proxy.mend()
    for status in ("running", "queued"):
        for left in (await standing.list(status=status))["workflows"]:
            await standing.cancel(left["workflowId"])


@pytest.fixture
def owed() -> Owed:
    return Owed()
