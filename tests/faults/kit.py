"""What the tests of this folder share: a locked store, the witness of what ComfyUI really did, and what is owed.

Broken is what a test breaks; all else is real: a service process, a simulator process, sockets, the store's file.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from PIL import Image

from management_api.simulator.ledger import Line
from managers.workflows.sqlite_schema import FILE_NAME
from tests.comfy_kit import PATIENCE, Comfy, comfy, picture
from tests.faults.proxy import Proxy
from tests.queue_kit import Child, Queue, View, child, environment

SOON = 10
"""Seconds. What nobody tells us is looked after each 20 s: who is not that slow has reacted to something."""
LATE = 90
"""Seconds for what is found no other way."""


class Witness:
    """The simulator's own record, over all its lives."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0

    def lines(self) -> list[Line]:
        """What happened since `forget`."""
        with self._path.open("rb") as file:
            file.seek(self._read)
            return [msgspec.json.decode(line, type=Line) for line in file]

    def forget(self) -> None:
        """Begin anew."""
        self._read = self._path.stat().st_size

    def prompts(self, event: str) -> list[str]:
        """The prompts of the service to which this happened, in that order."""
        return [
            line.prompt_id or "" for line in self.lines() if line.event == event and line.client_id != "somebody else"
        ]

    def verdicts(self) -> dict[str, str]:
        """How each prompt ended that did."""
        return {line.prompt_id or "": line.verdict or "" for line in self.lines() if line.event == "ended"}


class Site:
    """A ComfyUI with a witness. The service finds it directly, or through a proxy."""

    def __init__(self, simulator: Comfy, witness: Witness) -> None:
        self.simulator = simulator
        self.witness = witness

    def environ(self, folder: Path, proxy: Proxy | None = None, **environ: str) -> dict[str, str]:
        """The variables of a service with its data below this folder."""
        (folder / "data").mkdir(exist_ok=True)
        url = proxy.url if proxy else self.simulator.url
        return environment(folder, self.simulator, COMFYUI_URL=url, **environ)

    async def tidy(self) -> None:
        """Alive, with nothing that runs, waits or is broken."""
        if self.simulator.process.poll() is not None:
            self.simulator.restart()
        await self.simulator.faults()
        await self.simulator.post("/queue", {"clear": True})
        await self.simulator.post("/interrupt", {})
        await self.simulator.until_queue(lambda running, pending: not running and not pending)
        self.witness.forget()

    async def greeted(self, queue: Queue) -> None:
        """Wait until the service has reached it. Asks again and again: what was told before is no news."""
        for _ in range(PATIENCE * 50):
            if (await queue.client.get("/ready")).json()["checks"]["comfyui"] == "ok":
                return
            await asyncio.sleep(0.02)
        raise AssertionError("the service does not reach ComfyUI")


@contextlib.contextmanager
def comfy_site(folder: Path) -> Iterator[Site]:
    """A running one."""
    folder.mkdir(exist_ok=True)
    ledger = folder / "ledger"
    with comfy(folder, "--ledger", str(ledger)) as simulator:
        yield Site(simulator, Witness(ledger))


# ---- the store, from outside


@contextlib.contextmanager
def locked(data: Path) -> Iterator[None]:
    """Hold the right to write: every commit of the service waits at its beginning, for five seconds at most."""
    with contextlib.closing(sqlite3.connect(data / FILE_NAME, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            connection.rollback()


async def knocks(pid: int) -> None:
    """Wait until the service stands before the locked store: of its threads only one that wants the lock naps.

    The system tells nobody, so it is asked again and again. Skips the test where the system does not know.
    """
    seen: set[str] = set()
    for number in range(PATIENCE * 500):
        waiting = waits(pid)
        if any("nanosleep" in where for where in waiting):
            return
        seen |= waiting
        if number > 100 and seen <= {"0"}:
            pytest.skip("this system does not tell where a thread waits")
        await asyncio.sleep(0.002)
    raise AssertionError(f"nobody waits for the store: {seen}")


def waits(pid: int) -> set[str]:
    """Where in the kernel the threads of a process wait."""
    found = set()
    for path in Path("/proc").glob(f"{pid}/task/*/wchan"):
        with contextlib.suppress(OSError):
            found.add(path.read_text())
    return found


def ask(data: Path, statement: str, *values: Any) -> list[tuple[Any, ...]]:
    """What is on disk, read beside the service."""
    address = f"file:{data / FILE_NAME}?mode=ro"
    with contextlib.closing(sqlite3.connect(address, uri=True)) as connection:
        return connection.execute(statement, values).fetchall()


async def until_stored(data: Path, statement: str, *values: Any) -> None:
    """Wait until this finds something on disk."""
    for _ in range(PATIENCE * 500):
        if ask(data, statement, *values):
            return
        await asyncio.sleep(0.002)
    raise AssertionError(f"never stored: {statement}")


# ---- what is owed


class Owed:
    """What clients were promised: each workflow has a color of its own, so that its file can be told from others."""

    def __init__(self) -> None:
        self.color: dict[str, int] = {}
        """By workflow id, in the order of submission."""

    def picture(self) -> tuple[dict[str, Any], int]:
        """A graph and its color."""
        graph = picture()
        return graph, int(graph["1"]["inputs"]["color"])

    async def submit(self, queue: Queue, **body: Any) -> str:
        """Hand a picture in."""
        graph, color = self.picture()
        workflow_id = await queue.submit(graph, **body)
        self.color[workflow_id] = color
        return workflow_id

    async def kept(self, queue: Queue, witness: Witness, *order: str, seconds: float = SOON) -> list[View]:
        """Wait until all of them have ended, and check every promise; in this order, or that of submission."""
        views = [await ended(queue, one, seconds) for one in order or self.color]
        assert [view["status"] for view in views] == ["completed"] * len(self.color)
        for view in views:
            await self._right(queue, view)
        # Each was executed to its end once, under the last of its prompt ids, in the order of the queue.
        succeeded = [prompt for prompt, verdict in witness.verdicts().items() if verdict == "execution_success"]
        assert succeeded == [view["promptId"] for view in views]
        assert witness.prompts("begun") == succeeded
        posted_once(witness)
        return views

    async def _right(self, queue: Queue, view: View) -> None:
        (output,) = view["outputs"]
        reply = await queue.client.get(output["url"])
        assert reply.status_code == 200, reply.text
        with Image.open(io.BytesIO(reply.content)) as image:
            red, green, blue = image.convert("RGB").getpixel((0, 0))  # type: ignore[misc]
        assert red << 16 | green << 8 | blue == self.color[view["workflowId"]]
        await one_verdict(queue, view["workflowId"])
        assert (await queue.attempts(view["workflowId"]))[-1][1] == "ended"


async def ended(queue: Queue, workflow_id: str, seconds: float = SOON) -> View:
    """The workflow when it is final. Fails where it is so only because it was looked after for want of a word."""
    async with asyncio.timeout(seconds):
        while True:
            with contextlib.suppress(httpx.ReadTimeout):
                async for _ in queue.follow(workflow_id):
                    pass
                return await queue.get(workflow_id)


def posted_once(witness: Witness) -> None:
    """No prompt id came to ComfyUI twice."""
    assert [count for count in Counter(witness.prompts("taken")).values() if count > 1] == []


async def one_verdict(queue: Queue, workflow_id: str) -> str:
    """The stored verdict and the stored events say the same, once. What they say."""
    view = await queue.get(workflow_id)
    final = [
        event["type"].removeprefix("workflow:").replace("error", "failed")
        for event in await queue.events(workflow_id)
        if event["type"] in ("workflow:completed", "workflow:cancelled")
        or (event["type"] == "workflow:error" and not event["willRetry"])
    ]
    assert final == [view["status"]], (view, await queue.events(workflow_id))
    # Nothing is told of it after its verdict.
    assert (await queue.kinds(workflow_id))[-1].replace("error", "failed") == view["status"]
    return str(final[0])


@contextlib.asynccontextmanager
async def doomed(environ: dict[str, str]) -> AsyncIterator[Child]:
    """The service as a process that is going to be killed, connected."""
    async with child(environ) as queue:
        await queue.connected()
        yield queue


async def at_rest(queue: Queue, site: Site, *workflow_ids: str) -> None:
    """All of them are final and say so once, no attempt is open, and the next one runs.

    No prompt was ever without its attempt: the sweep of ghosts is there for worse than this.
    """
    follower = await queue.submit(picture())
    for one in (*workflow_ids, follower):
        await ended(queue, one)
    assert (await queue.get(follower))["status"] == "completed"
    await site.simulator.until_queue(lambda running, pending: not running and not pending)
    for one in workflow_ids:
        await one_verdict(queue, one)
        assert {state for _, state in await queue.attempts(one)} <= {"ended", "withdrawn", "lost"}
    posted_once(site.witness)
    (backend,) = (await queue.client.get("/v1/comfyui/backends")).json()["backends"]
    assert backend["ghosts"] == 0
