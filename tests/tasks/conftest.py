"""A service with providers whose programs are the tests' own."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.program import KEY, served
from tests.tasks.kit import SECONDS, Desk, environment


@pytest.fixture(scope="session")
def service_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the service of `desk` lives; its HOME too."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "bin").mkdir()
    yield folder
    end_supervisors(folder)


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path) -> Iterator[None]:
    """Tasks outlive a service, and would outlive a test that fails."""
    yield
    end_supervisors(tmp_path)


def end_supervisors(folder: Path) -> None:
    """Those that watch over programs below this folder; their programs end with them."""
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if len(line) > 3 and line[3].endswith("supervisor.py") and line[-1].startswith(str(folder)):
            process.kill()


@pytest.fixture(scope="session")
def service_url(service_folder: Path) -> Iterator[str]:
    """One real process for all tests that only talk to it."""
    given = environment(service_folder) | {
        "OPENAI_API_KEY": "openai-7Kq2",
        "CUSTOM_COLOUR": "blue",
        "OTHER": "not for tasks",
        "AWS_ACCESS_KEY_ID": "AKIA-1Tq8",
        "AWS_SECRET_ACCESS_KEY": "aws-9Xw4",
        "PATH": os.pathsep.join([str(service_folder / "bin"), os.environ["PATH"]]),
    }
    with served(service_folder, **given) as (url, _):
        yield url


@pytest.fixture
async def desk(service_url: str) -> AsyncIterator[Desk]:
    """Nothing runs when the test has ended."""
    async with httpx.AsyncClient(base_url=service_url, headers={"X-API-Key": KEY}, timeout=SECONDS) as client:
        desk = Desk(client)
        yield desk
        await desk.stop_all()
