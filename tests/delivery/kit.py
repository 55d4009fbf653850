"""The service with its webhooks, as somebody uses them who has the key."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx

from management_api.app import create_app
from management_api.settings import load
from tests.delivery.receiver import PATIENCE, Call, Receiver
from tests.queue_kit import Comfy, House, Queue, environment, house
from tests.store_kit import ManualClock

Delivery = dict[str, Any]


class Clock(ManualClock):
    """Time that the test owns, for everything that asks what time it is; what is measured goes on."""

    def monotonic(self) -> float:
        return time.monotonic()


class Post:
    """Webhooks and deliveries of a service, over HTTP."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.client: httpx.AsyncClient = queue.client

    async def webhook(self, url: str, *events: str, **body: Any) -> dict[str, Any]:
        """Make one; its reply, with the secret."""
        if events:
            body["events"] = list(events)
        reply = await self.client.post("/v1/webhooks", json={"url": url, **body})
        assert reply.status_code == 201, reply.text
        found: dict[str, Any] = reply.json()
        return found

    async def deliveries(self, **query: Any) -> list[Delivery]:
        """Newest first."""
        reply = await self.client.get("/v1/deliveries", params=query)
        assert reply.status_code == 200, reply.text
        found: list[Delivery] = reply.json()["deliveries"]
        return found

    async def until(self, right: Callable[[list[Delivery]], bool], **query: Any) -> list[Delivery]:
        """Ask for the delivery log until it is right: no event tells of its changes."""
        found: list[Delivery] = []
        for _ in range(PATIENCE * 50):
            found = await self.deliveries(limit=1000, **query)
            if right(found):
                return found
            await asyncio.sleep(0.02)
        raise AssertionError(f"the deliveries stayed {found}")

    async def retry(self, delivery_id: str) -> httpx.Response:
        return await self.client.post(f"/v1/deliveries/{delivery_id}/retry")


async def calls(receiver: Receiver, right: Callable[[list[Call]], bool]) -> list[Call]:
    """What a receiver has heard, when it is right."""
    return await asyncio.to_thread(receiver.wait, right)


def settled(deliveries: list[Delivery]) -> bool:
    """Nothing waits."""
    return bool(deliveries) and all(one["state"] != "pending" for one in deliveries)


def lab(tmp_path: Path, comfy: Comfy | None = None, **environ: str) -> dict[str, str]:
    """The variables of a service whose webhooks may go to this machine."""
    return environment(tmp_path, comfy, WEBHOOK_ALLOW_PRIVATE="true", GPU_SAMPLE_SECONDS="0", **environ)


@contextlib.asynccontextmanager
async def served(
    tmp_path: Path, comfy: Comfy | None = None, clock: Clock | None = None, **environ: str
) -> AsyncIterator[tuple[House, Post]]:
    """A running service in this process."""
    settings = load(lab(tmp_path, comfy) | environ, None)
    async with house(create_app(settings, clock=clock)) as service:
        yield service, Post(service)


def tick(service: House, clock: Clock, seconds: float) -> None:
    """So much time passes, and everybody looks at the clock."""
    clock.now += round(seconds * 1000)
    service.app.running[0].deliveries.wake()
