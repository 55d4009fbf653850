"""COMFYUI_FREE_WHEN_IDLE_SECONDS: memory is given back once after idleness; and what a dry run foretells."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.queue_kit import PATH, PATIENCE, picture
from tests.serving import StartService
from tests.simulator_process import simulator


class Wire:
    """Passes bytes between the service and a ComfyUI, and counts the times it was asked to free memory."""

    def __init__(self, port: int) -> None:
        self.asked = asyncio.Event()
        self.times = 0
        self._port = port

    async def pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to, back = await asyncio.open_connection("127.0.0.1", self._port)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._copy(reader, back))
            tasks.create_task(self._copy(to, writer))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                if data.startswith(b"POST /free"):
                    self.times += 1
                    self.asked.set()
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()


@asynccontextmanager
async def wire(url: str) -> AsyncIterator[tuple[str, Wire]]:
    passing = Wire(urlsplit(url).port or 0)
    server = await asyncio.start_server(passing.pass_on, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", passing
    server.close()


async def test_memory_is_freed_once_after_the_last_workflow(tmp_path: Path, start_service: StartService) -> None:
    with simulator(tmp_path / "sim") as (url, _):
        async with wire(url) as (address, passing):
            service = await start_service(COMFYUI_URL=address, COMFYUI_FREE_WHEN_IDLE_SECONDS="0.3")

            async def run() -> None:
                reply = await service.client.post(
                    PATH, json={"workflow": picture()}, headers={"Prefer": f"wait={PATIENCE}"}
                )
                assert reply.json()["status"] == "completed"

            await run()
            for times in (1, 2):
                async with asyncio.timeout(PATIENCE):
                    await passing.asked.wait()
                assert passing.times == times  # an idle service asks once for each time it was busy
                passing.asked.clear()
                await run()


async def test_a_dry_run_foretells_the_place(start_service: StartService) -> None:
    service = await start_service()  # ComfyUI is away: everything waits

    async def place(priority: str, **query: str) -> int:
        reply = await service.client.post(
            PATH, json={"workflow": picture(), "priority": priority}, params=query, timeout=PATIENCE
        )
        found: dict[str, Any] = reply.json()
        return int(found["queuePosition"])

    for priority in ("low", "normal", "high", "normal", "low"):
        foretold = await place(priority, dryRun="true")
        assert await place(priority) == foretold, priority
    assert [await place(priority, dryRun="true") for priority in ("high", "normal", "low")] == [1, 3, 5]
