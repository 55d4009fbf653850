"""Who hands work in, cancels some of it, and listens, whatever breaks meanwhile."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
from msgspec import Struct
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidHandshake, WebSocketException

from tests.chaos.plan import Job
from tests.comfy_kit import PLAIN
from tests.program import KEY

PATH = "/v1/comfyui/workflow"
HEADERS = {"X-API-Key": KEY}
CLIENTS = 4
_SECONDS = 10
"""For one request: a service that hangs is a fault, one that is dead refuses at once."""
_AGAIN = 0.1


class Told(Struct, kw_only=True):
    """What a client was told of its workflow. `cancel`: the status its DELETE was answered with."""

    marker: str
    workflow_id: str
    cancel: str | None = None
    posts: int = 1
    replays: int = 0


class Clients:
    """Several that share the jobs. `faults` are answers that nobody should get."""

    def __init__(self, url: str, jobs: Iterator[Job], due: Callable[[], int], submitting: Callable[[], None]) -> None:
        self.told: dict[str, Told] = {}
        self.submitted = 0
        self.faults: list[str] = []
        self._url = url
        self._jobs = jobs
        self._due = due
        self._submitting = submitting

    async def run(self) -> None:
        """Until every job is accepted, and every DELETE is answered."""
        async with http(self._url) as client, asyncio.TaskGroup() as tasks:
            for _ in range(CLIENTS):
                tasks.create_task(self._one(client, tasks))

    async def _one(self, client: httpx.AsyncClient, tasks: asyncio.TaskGroup) -> None:
        for job in self._jobs:
            while job.number >= self._due():  # noqa: ASYNC110 - a number of kills, looked at ten times a second
                await asyncio.sleep(_AGAIN)
            told = await self._submit(client, job)
            if told is None:
                continue
            self.told[job.marker] = told
            if job.again:
                again = await self._submit(client, job)
                if again is not None and again.workflow_id != told.workflow_id:
                    self.faults.append(
                        f"{job.marker}: the same POST gave {told.workflow_id}, then {again.workflow_id}"
                    )
            if job.cancel is not None:
                tasks.create_task(self._cancel(client, told, job.cancel))

    async def _submit(self, client: httpx.AsyncClient, job: Job) -> Told | None:
        self._submitting()
        posts = 0
        while True:
            posts += 1
            reply = await self._ask(client, "POST", PATH, json=job.body(), headers={"Idempotency-Key": job.marker})
            if reply is None or reply.status_code == 503:
                await asyncio.sleep(_AGAIN)
                continue
            self.submitted += 1
            if reply.status_code != 202 or reply.json()["status"] != "queued":
                self.faults.append(f"{job.marker}: POST was answered {reply.status_code}: {reply.text}")
                return None
            replays = int("idempotency-replayed" in reply.headers)
            return Told(marker=job.marker, workflow_id=reply.json()["workflowId"], posts=posts, replays=replays)

    async def _cancel(self, client: httpx.AsyncClient, told: Told, later: float) -> None:
        await asyncio.sleep(later)
        while True:
            reply = await self._ask(client, "DELETE", f"{PATH}/{told.workflow_id}")
            if reply is None or reply.status_code == 503:
                await asyncio.sleep(_AGAIN)
                continue
            if reply.status_code == 200:
                told.cancel = reply.json()["status"]
            elif reply.status_code == 409:
                told.cancel = reply.json()["currentStatus"]
            else:
                self.faults.append(f"{told.marker}: DELETE was answered {reply.status_code}: {reply.text}")
            return

    async def _ask(self, client: httpx.AsyncClient, method: str, path: str, **more: Any) -> httpx.Response | None:
        """The answer; None when the connection broke or could not be made."""
        try:
            return await client.request(method, path, **more)
        except httpx.TimeoutException:
            self.faults.append(f"{method} {path} was not answered in {_SECONDS} s")
            return None
        except httpx.TransportError:
            return None


class Listener:
    """One socket, opened again whenever it breaks, that asks for what it missed."""

    def __init__(self, url: str) -> None:
        self.heard: list[dict[str, Any]] = []
        self.gaps: list[str] = []
        self._url = url.replace("http:", "ws:") + "/v1/comfyui/stream"
        self._last = 0

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                # In the address: a `subscribe` may be read after the first live event has been written.
                url = f"{self._url}?since={self._last}"
                async with connect(
                    url, additional_headers=HEADERS, compression=None, proxy=None, max_size=None, close_timeout=1
                ) as connection:
                    async for frame in connection:
                        self._hear(json.loads(frame))
            except (OSError, WebSocketException, InvalidHandshake, TimeoutError):
                pass
            await asyncio.sleep(_AGAIN)

    def _hear(self, frame: dict[str, Any]) -> None:
        if frame["type"] == "gap":
            self.gaps.append(json.dumps(frame))
        if frame["type"] not in ("subscribed", "heartbeat") and "seq" in frame:
            self.heard.append({"seq": frame["seq"], "type": frame["type"], "workflowId": frame.get("workflowId")})
            self._last = max(self._last, frame["seq"])


def http(url: str) -> httpx.AsyncClient:
    """A client with the key."""
    return httpx.AsyncClient(base_url=url, headers=HEADERS, timeout=_SECONDS, **PLAIN)
