"""Tasks that do what a test wants: their text is a Python program, run by a provider of its own."""

from __future__ import annotations

import asyncio
import json
import os
import select
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from msgspec import Struct

TASKS = "/v1/tasks"
SECONDS = 20
"""That nothing here should need."""

PROVIDERS = f"""
[providers.python]
argv = ["{sys.executable}", "-I", "-S", "-u", "-c", "{{task}}", "{{agent}}", "{{task_id}}", "{{task_dir}}"]
env = ["OPENAI_API_KEY", "CUSTOM_*"]
max_concurrent = 3

[providers.small]
argv = ["{sys.executable}", "-I", "-S", "-u", "-c", "{{task}}"]
max_log_bytes = 16384

[providers.short]
argv = ["{sys.executable}", "-I", "-S", "-u", "-c", "{{task}}"]
timeout_seconds = 0.3

[providers.absent]
argv = ["no-such-program-4711", "{{task}}"]
"""
FOREVER = "import signal; print('ready'); signal.pause()"


class Told(Struct):
    """One server-sent event."""

    event: str
    id: int
    data: dict[str, Any]


def environment(folder: Path) -> dict[str, str]:
    """For a service with these providers."""
    file = folder / "providers.toml"
    file.write_text(PROVIDERS)
    return {"MANAGEMENT_API_PROVIDERS_FILE": str(file), "PATH": os.environ["PATH"], "HOME": str(folder)}


class Desk:
    """Hands tasks in and follows them, as a client does."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client

    async def start(self, program: str, *, provider: str = "python", agent: str = "tester") -> str:
        """The id of a task that was accepted."""
        reply = await self.client.post(TASKS, json={"agent": agent, "task": program, "provider": provider})
        assert reply.status_code == 202, reply.text
        return str(reply.json()["taskId"])

    async def get(self, task_id: str) -> dict[str, Any]:
        reply = await self.client.get(f"{TASKS}/{task_id}")
        assert reply.status_code == 200, reply.text
        return dict(reply.json())

    async def run(self, program: str, *, provider: str = "python", agent: str = "tester") -> dict[str, Any]:
        """A task from its start to its end."""
        task_id = await self.start(program, provider=provider, agent=agent)
        await self.ended(task_id)
        return await self.get(task_id)

    async def ended(self, task_id: str) -> list[Told]:
        """All that its log stream tells, to the end."""
        async with self.following(task_id) as stream:
            return [told async for told in stream]

    @asynccontextmanager
    async def following(self, task_id: str, after: int | None = None) -> AsyncIterator[AsyncIterator[Told]]:
        """Its log stream; it must come to its end in time."""
        async with asyncio.timeout(SECONDS), followed(self.client, f"{TASKS}/{task_id}/logs/stream", after) as stream:
            yield stream

    async def stop_all(self) -> None:
        """Leave nothing behind."""
        for task in (await self.client.get(TASKS)).json()["activeTasks"]:
            await self.client.delete(f"{TASKS}/{task['taskId']}")
            await self.ended(task["taskId"])


@asynccontextmanager
async def followed(
    client: httpx.AsyncClient, path: str, after: int | None = None
) -> AsyncIterator[AsyncIterator[Told]]:
    """A stream of server-sent events."""
    headers = {"Accept": "text/event-stream"} | ({} if after is None else {"Last-Event-ID": str(after)})
    async with client.stream("GET", path, headers=headers, timeout=SECONDS) as reply:
        assert reply.status_code == 200, await reply.aread()
        assert reply.headers["content-type"].startswith("text/event-stream")
        yield _events(reply)


async def _events(reply: httpx.Response) -> AsyncIterator[Told]:
    fields: dict[str, str] = {}
    async for line in reply.aiter_lines():
        name, _, value = line.partition(": ")
        if name:
            fields[name] = value
        elif "data" in fields:
            yield Told(fields.get("event", "message"), int(fields["id"]), json.loads(fields["data"]))
            fields = {}


def lines_of(events: list[Told]) -> list[str]:
    """What was said."""
    return [told.data["line"] for told in events if told.event == "message"]


class Gate:
    """A task passes `gate.wait` (Python, for its text) when the test opens it."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = path
        self.wait = f"open({str(path)!r}).read()"

    async def open(self) -> None:
        """Returns when it waits there, and lets it through."""
        async with asyncio.timeout(SECONDS):
            await asyncio.to_thread(self.path.write_text, "")

    def open_now(self) -> None:
        """The same without a loop."""
        self.path.write_text("")


class Watched:
    """A process by its pid, until it is gone. It must live when this is made."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._file = os.pidfd_open(pid)

    def wait(self) -> bool:
        """Whether it has gone in time."""
        try:
            return bool(select.select([self._file], [], [], SECONDS)[0])
        finally:
            os.close(self._file)

    async def gone(self) -> bool:
        """The same, while the loop runs."""
        return await asyncio.to_thread(self.wait)
