"""What everybody says about a run when it is over: the clients, the API, the store's file, ComfyUI's ledger.

Values and how they are collected; whether they are right is for the judge. They are kept as JSON with a failed run.
"""

from __future__ import annotations

import asyncio
import io
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
from msgspec import Struct
from PIL import Image

from management_api.simulator.ledger import Line
from managers.workflows.sqlite_schema import FILE_NAME
from tests.chaos.clients import PATH, Told
from tests.chaos.plan import Job, Plan
from tests.chaos.processes import Life

View = dict[str, Any]
_AT_ONCE = 4


class Event(Struct, frozen=True, kw_only=True):
    """A stored event, as far as it matters here. `again`: an error after which it waits again."""

    seq: int
    type: str
    workflow_id: str | None
    again: bool = False

    @staticmethod
    def of(event: dict[str, Any]) -> Event:
        return Event(
            seq=event["seq"],
            type=event["type"],
            workflow_id=event.get("workflowId"),
            again=bool(event.get("willRetry")),
        )


class Store(Struct, frozen=True, kw_only=True):
    """The store's file after the end: its own check, its log, how many workflows it holds."""

    integrity: str
    log: tuple[Event, ...]
    workflows: int


class Evidence(Struct, frozen=True, kw_only=True):
    """All of it. By marker: `told`, `views` (with attempts), `events`, `files` (what is wrong with each, or "")."""

    plan: Plan
    lives: tuple[Life, ...]
    ledgers: dict[str, tuple[Line, ...]]
    told: dict[str, Told]
    views: dict[str, View]
    events: dict[str, tuple[Event, ...]]
    files: dict[str, tuple[str, ...]]
    heard: tuple[Event, ...]
    store: Store
    faults: tuple[str, ...] = ()
    """What was seen to be wrong on the way."""


async def ask(client: httpx.AsyncClient, job: Job, told: Told) -> tuple[View, tuple[Event, ...], tuple[str, ...]]:
    """The workflow, its events, its files."""
    path = f"{PATH}/{told.workflow_id}"
    view = (await client.get(path, params={"include": "attempts"})).raise_for_status().json()
    events = (await client.get(f"{path}/events")).raise_for_status().json()["events"]
    files = [await _file(client, job, output["url"]) for output in view["outputs"]]
    return view, tuple(map(Event.of, events)), tuple(files)


async def ask_all(
    client: httpx.AsyncClient, plan: Plan, told: dict[str, Told]
) -> dict[str, tuple[View, tuple[Event, ...], tuple[str, ...]]]:
    """The same for every job that was accepted."""
    found = {}
    few = asyncio.Semaphore(_AT_ONCE)

    async def one(job: Job) -> None:
        async with few:
            found[job.marker] = await ask(client, job, told[job.marker])

    async with asyncio.TaskGroup() as tasks:
        for job in plan.jobs:
            if job.marker in told:
                tasks.create_task(one(job))
    return found


async def _file(client: httpx.AsyncClient, job: Job, url: str) -> str:
    """What is wrong with a file, by its bound url; nothing: empty."""
    reply = await client.get(url)
    if reply.status_code != 200:
        return f"{url} answers {reply.status_code}"
    try:
        with Image.open(io.BytesIO(reply.content)) as image:
            kind, size = image.format, image.size
            colors = image.convert("RGB").getcolors()
    except (OSError, SyntaxError) as error:
        return f"{url} is no picture: {error}"
    if (kind, size) != ("PNG", (job.width, job.height)):
        return f"{url} is {kind} of {size}, not PNG of {(job.width, job.height)}"
    if colors != [(job.width * job.height, job.rgb)]:
        return f"{url} has the colours {colors}, not {job.rgb} alone"
    return ""


def read_store(folder: Path) -> Store:
    """The file of a service that has ended."""
    path = folder / FILE_NAME
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
        integrity = "; ".join(row[0] for row in connection.execute("PRAGMA integrity_check"))
        rows = connection.execute("SELECT seq, type, workflow_id, data FROM event ORDER BY seq").fetchall()
        (workflows,) = connection.execute("SELECT count(*) FROM workflow").fetchone()
    log = tuple(
        Event.of({"seq": seq, "type": kind, "workflowId": id_} | _will_retry(data)) for seq, kind, id_, data in rows
    )
    return Store(integrity=integrity, log=log, workflows=workflows)


def _will_retry(data: bytes) -> dict[str, Any]:
    return {"willRetry": json.loads(data).get("willRetry", False)}


def own_faults(log: Path) -> list[str]:
    """Lines of the service's log that say it went wrong: errors, and what is no line of the log at all."""
    found = []
    for number, line in enumerate(log.read_text(errors="replace").splitlines(), 1):
        try:
            entry = json.loads(line)
        except ValueError:
            if not line.startswith("{"):  # a line cut off by kill -9 is no fault
                found.append(f"{log.name}:{number}: {line}")
            continue
        if entry.get("level") in ("error", "critical") or "exception" in entry:
            found.append(f"{log.name}:{number}: {line}")
    return found
