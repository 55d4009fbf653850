"""The witness: what a simulator writes down, and that it is there when the process is not."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from websockets.asyncio.client import connect

from management_api.simulator.ledger import Line
from tests.comfy_kit import PATIENCE, Comfy, Graph, picture, sleeper


class Watched(Comfy):
    """A simulator with a ledger, and a client of it."""

    def __init__(self, folder: Path) -> None:
        self.ledger = folder / "ledger"
        super().__init__(folder / "comfyui", "--faults", "--ledger", str(self.ledger))

    def lines(self) -> list[Line]:
        return [msgspec.json.decode(line, type=Line) for line in self.ledger.read_bytes().splitlines()]

    def of(self, prompt_id: str) -> list[str]:
        return [line.event for line in self.lines() if line.prompt_id == prompt_id]

    async def submit(self, graph: Graph, marker: str) -> str:
        prompt_id = str(uuid.uuid4())
        body = {"prompt": graph, "client_id": "me", "prompt_id": prompt_id, "extra_data": {"queue_id": marker}}
        await self.post("/prompt", body)
        return prompt_id

    async def written(self, prompt_id: str, event: str) -> Line:
        """The first line of this kind about it. Asks again and again: a file tells nobody."""
        async with asyncio.timeout(PATIENCE):
            while True:
                for line in self.lines():
                    if (line.prompt_id, line.event) == (prompt_id, event):
                        return line
                await asyncio.sleep(0.01)


@pytest.fixture
async def comfy(tmp_path: Path) -> AsyncIterator[Watched]:
    process = Watched(tmp_path)
    try:
        yield process
    finally:
        process.kill()


@contextlib.asynccontextmanager
async def socket(comfy: Watched) -> AsyncIterator[Any]:
    url = comfy.url.replace("http:", "ws:") + "/ws?clientId=me"
    async with connect(url, compression=None, proxy=None, close_timeout=0.5) as connection:
        yield connection


async def test_a_prompt_from_its_post_to_its_history(comfy: Watched) -> None:
    async with socket(comfy):
        prompt_id = await comfy.submit(picture(), "blue")
        told = await comfy.written(prompt_id, "told")
        await comfy.until_queue(lambda running, pending: not running and not pending)
        await comfy.get(f"/history/{prompt_id}")
    assert comfy.of(prompt_id) == ["taken", "begun", "ended", "told", "told"]
    taken, begun, ended, _, read = (line for line in comfy.lines() if line.prompt_id == prompt_id)
    assert {(line.marker, line.client_id) for line in (taken, begun, ended)} == {("blue", "me")}
    assert ended.verdict == "execution_success"
    connected = next(line for line in comfy.lines() if line.event == "socket")
    assert (told.socket, read.socket) == (connected.socket, None)
    assert connected.client_id == "me"
    assert taken.at <= begun.at <= ended.at <= told.at <= read.at


async def test_what_fails_and_what_is_taken_away(comfy: Watched) -> None:
    failing = await comfy.submit(sleeper(steps=1, fail="value_error", fail_at_step=1), "red")
    assert (await comfy.written(failing, "ended")).verdict == "execution_error"
    running = await comfy.submit(sleeper(), "green")
    await comfy.written(running, "begun")
    deleted, cleared = await comfy.submit(picture(), "a"), await comfy.submit(picture(), "b")
    await comfy.post("/queue", {"delete": [deleted]})
    await comfy.post("/queue", {"clear": True})
    await comfy.post("/interrupt", {"prompt_id": running})
    assert (await comfy.written(running, "ended")).verdict == "execution_interrupted"
    assert comfy.of(running) == ["taken", "begun", "interrupted", "ended"]
    assert comfy.of(deleted) == comfy.of(cleared) == ["taken", "deleted"]


async def test_a_death_is_a_start_after_a_beginning_without_an_end(comfy: Watched) -> None:
    prompt_id = await comfy.submit(sleeper(), "x")
    begun = await comfy.written(prompt_id, "begun")
    comfy.restart()
    starts = [line for line in comfy.lines() if line.event == "start"]
    assert [line.pid for line in starts] == [begun.pid, comfy.process.pid]
    assert [line.event for line in comfy.lines()] == ["start", "taken", "begun", "start"]


async def test_it_is_written_before_it_is_told(comfy: Watched) -> None:
    """The process ends right after it has accepted a prompt, before it answers."""
    await comfy.faults(die_after_accept=True)
    with pytest.raises(Exception, match="disconnected"):
        await comfy.submit(picture(), "x")
    await asyncio.to_thread(comfy.process.wait, PATIENCE)
    assert "taken" in [line.event for line in comfy.lines()]


async def test_a_connection_can_still_be_cut(comfy: Watched) -> None:
    """The watched sender has not lost what the faults need of it."""
    async with socket(comfy) as connection:
        await connection.recv()
        await comfy.faults(drop_sockets=True)
        async with asyncio.timeout(PATIENCE):
            await connection.wait_closed()
    assert connection.close_code == 1006


def test_without_a_file_nothing_is_written(tmp_path: Path) -> None:
    process = Comfy(tmp_path / "comfyui")
    try:
        asyncio.run(process.post_prompt(picture()))
        asyncio.run(process.until_queue(lambda running, pending: not running and not pending))
    finally:
        process.kill()
    assert [path.name for path in tmp_path.iterdir()] == ["comfyui"]
