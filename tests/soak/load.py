"""Somebody who uses the service all the time: hands in, looks, cancels, listens, and goes away without a word.

Steady: so many rounds a second, each round the same; what a round left open is closed in a later one.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections import Counter

import httpx
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

from tests.comfy_kit import PLAIN, picture, sleeper
from tests.program import KEY

HEADERS = {"X-API-Key": KEY}
PATH = "/v1/comfyui/workflow"
_STREAMS = 4
_SECONDS = 10


class Load:
    """One run of it. `done` counts what was asked and answered as it should, `wrong` what was not."""

    def __init__(self, url: str, rounds_a_second: float) -> None:
        self.done: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()
        self._url = url
        self._pause = 1 / rounds_a_second
        self._streams: list[tuple[ClientConnection, asyncio.Task[None]]] = []
        self._ids: list[str] = []

    async def run(self) -> None:
        """Until cancelled; then nothing of it is open any more."""
        async with httpx.AsyncClient(base_url=self._url, headers=HEADERS, timeout=_SECONDS, **PLAIN) as client:
            try:
                for number in itertools.count():
                    due = time.monotonic() + self._pause
                    await self._round(client, number)
                    await asyncio.sleep(max(0.0, due - time.monotonic()))
            finally:
                while self._streams:
                    await self._leave(cut=False)

    async def _round(self, client: httpx.AsyncClient, number: int) -> None:
        graph = sleeper(steps=3) if number % 4 == 0 else picture()
        reply = await self._ask(
            client, "POST", PATH, json={"workflow": graph}, headers={"Idempotency-Key": str(number)}
        )
        if reply is not None:
            self._ids.append(reply.json()["workflowId"])
            del self._ids[:-20]
        if self._ids:
            workflow_id = self._ids[number % len(self._ids)]
            await self._ask(client, "GET", f"{PATH}/{workflow_id}", params={"include": "attempts"})
            await self._ask(client, "GET", f"{PATH}/{workflow_id}/events")
        await self._ask(client, "GET", PATH, params={"limit": 20})
        if number % 4 == 0 and self._ids:
            await self._ask(client, "DELETE", f"{PATH}/{self._ids[-1]}", also=(409,))
        if number % 5 == 0:
            await self._ask(client, "GET", "/ready")
            await self._ask(client, "GET", "/nothing/here", also=(404,))
        await self._listen(number)
        if number % 3 == 0 and self._ids:
            await self._follow(client, self._ids[-1])

    async def _ask(
        self, client: httpx.AsyncClient, method: str, path: str, *, also: tuple[int, ...] = (), **more: object
    ) -> httpx.Response | None:
        what = f"{method} {path.split('/')[3] if path.startswith('/v1/comfyui') else path}"
        try:
            reply = await client.request(method, path, **more)  # type: ignore[arg-type]
        except httpx.HTTPError as error:
            self.wrong[f"{what}: {type(error).__name__}"] += 1
            return None
        if reply.is_success or reply.status_code in also:
            self.done[what] += 1
            return reply if reply.is_success else None
        self.wrong[f"{what}: {reply.status_code}"] += 1
        return None

    async def _listen(self, number: int) -> None:
        """One more stream, which reads all it is told; the oldest is closed, each third one by cutting it."""
        try:
            stream = await connect(
                self._url.replace("http:", "ws:") + "/v1/comfyui/stream",
                additional_headers=HEADERS,
                compression=None,
                proxy=None,
                max_size=None,
                close_timeout=1,
            )
            self._streams.append((stream, asyncio.create_task(_read(stream))))
            await stream.send(json.dumps({"type": "subscribe", "channels": ["workflow", "node", "queue", "comfyui"]}))
            if len(self._streams) > _STREAMS:
                await self._leave(cut=number % 3 == 0)
            self.done["stream"] += 1
        except (OSError, WebSocketException, TimeoutError) as error:
            self.wrong[f"stream: {type(error).__name__}"] += 1

    async def _leave(self, *, cut: bool) -> None:
        """The oldest stream ends."""
        stream, reading = self._streams.pop(0)
        if cut:
            stream.transport.abort()
        await stream.close()
        await reading

    async def _follow(self, client: httpx.AsyncClient, workflow_id: str) -> None:
        """Server-sent events, left after the first one."""
        headers = {"accept": "text/event-stream"}
        try:
            async with client.stream("GET", f"{PATH}/{workflow_id}/events", headers=headers) as reply:
                async for _ in reply.aiter_lines():
                    break
            self.done["events"] += 1
        except httpx.HTTPError as error:
            self.wrong[f"events: {type(error).__name__}"] += 1


async def _read(stream: ClientConnection) -> None:
    with contextlib.suppress(WebSocketException):
        async for _ in stream:
            pass
