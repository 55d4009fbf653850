"""The processes and the browser, for each test anew."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:  # the kit skips whoever imports it without playwright, which is for the tests to do
    from tests.browser.kit import Browser, House, Watched


class OpenPage(Protocol):
    """`await open_page(url, color_scheme=…)`: a page that is judged at the end of the test."""

    async def __call__(self, url: str = "", **options: Any) -> Watched: ...


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    from tests.browser.kit import chromium

    async with chromium() as found:
        yield found


@pytest.fixture
def environ() -> dict[str, str]:
    """What the service is told beyond the usual; for files of tests to say."""
    return {}


@pytest.fixture
def home(tmp_path: Path, environ: dict[str, str]) -> Iterator[House]:
    from tests.browser.kit import house

    with house(tmp_path, **environ) as found:
        yield found


@pytest.fixture
async def open_page(browser: Browser, home: House) -> AsyncIterator[OpenPage]:
    from tests.browser.kit import Watched

    async with contextlib.AsyncExitStack() as stack:
        pages: list[Watched] = []

        async def make(url: str = "", **options: Any) -> Watched:
            context = await browser.new_context(**{"viewport": {"width": 1440, "height": 1000}, **options})
            stack.push_async_callback(context.close)
            pages.append(Watched(await context.new_page(), url or home.url))
            return pages[-1]

        yield make
        for page in pages:
            await page.judge()


@pytest.fixture
async def page(open_page: OpenPage) -> Watched:
    """Open, with the key."""
    watched = await open_page()
    await watched.open()
    return watched
