"""The service in front of a ComfyUI process, for the tests of templates."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.queue_kit import Comfy, House, Site, comfy


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy]:
    """One ComfyUI for a whole file: nothing here breaks it."""
    with comfy(tmp_path_factory.mktemp("comfyui")) as process:
        yield process


@pytest.fixture(scope="module")
def site(simulator: Comfy, tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("site"), simulator, GENERATE_TEMPLATE="demo")


@pytest.fixture
async def service(site: Site) -> AsyncIterator[House]:
    """A fresh service, connected."""
    async with site.fresh() as found:
        await found.connected()
        yield found
