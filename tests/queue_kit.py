"""The whole service in front of a ComfyUI process (`comfy_kit`): start, hand work in, wait for what it tells.

Waiting is done on the service's own words (server-sent events, WebSocket, `Prefer: wait`). ComfyUI has no event for
"the queue now holds …", so `Comfy.until_queue` asks again and again, with an end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import IO, Any

import httpx
import uvicorn
from websockets.asyncio.client import ClientConnection, connect

from management_api.app import Application, create_app
from management_api.settings import load
from tests.comfy_kit import PATIENCE, PLAIN, Comfy, Graph, comfy, picture, sleeper, workflow
from tests.serving import DEADLINE, KEY
from tests.simulator_process import end

__all__ = ["PATIENCE", "Comfy", "Graph", "comfy", "picture", "sleeper", "workflow"]

ROOT = Path(__file__).parent.parent
PATH = "/v1/comfyui/workflow"

View = dict[str, Any]


class Stream:
    """What one client hears. `until` looks through what came and then waits for more."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self.frames: list[dict[str, Any]] = []

    async def until(self, kind: str, *, after: int = 0, **fields: Any) -> dict[str, Any]:
        """The first frame of this type and with these fields from frame number `after` on."""
        number = after
        async with asyncio.timeout(PATIENCE):
            while True:
                while number == len(self.frames):
                    frame = await self._connection.recv()
                    if isinstance(frame, str):
                        self.frames.append(json.loads(frame))
                found = self.frames[number]
                if found["type"] == kind and all(found.get(name) == value for name, value in fields.items()):
                    return found
                number += 1

    async def send(self, frame: str) -> None:
        await self._connection.send(frame)

    async def settled(self) -> list[dict[str, Any]]:
        """All frames, after everything that was on its way has come."""
        start = len(self.frames)
        await self._connection.send('{"type":"ping"}')
        await self.until("pong", after=start)
        return self.frames

    def of(self, workflow_id: str, *kinds: str) -> list[dict[str, Any]]:
        """What was heard about one workflow."""
        return [
            frame
            for frame in self.frames
            if frame.get("workflowId") == workflow_id and (not kinds or frame["type"] in kinds)
        ]


class Queue:
    """The service as a client sees it."""

    def __init__(self, client: httpx.AsyncClient, url: str) -> None:
        self.client = client
        self.url = url

    async def post(self, graph: Any, *, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
        return await self.client.post(PATH, json={"workflow": graph, **body}, headers=headers)

    async def submit(self, graph: Graph, **body: Any) -> str:
        """Hand a workflow in; its id."""
        reply = await self.post(graph, **body)
        assert reply.status_code == 202, reply.text
        workflow_id: str = reply.json()["workflowId"]
        return workflow_id

    async def run(self, graph: Graph, **body: Any) -> View:
        """Hand a workflow in and wait for its end."""
        return await self.ended(await self.submit(graph, **body))

    async def get(self, workflow_id: str, **query: str) -> View:
        reply = await self.client.get(f"{PATH}/{workflow_id}", params=query)
        assert reply.status_code == 200, reply.text
        found: View = reply.json()
        return found

    async def attempts(self, workflow_id: str) -> list[tuple[int, str]]:
        """Number and state of each attempt."""
        found = await self.get(workflow_id, include="attempts")
        return [(attempt["attempt"], attempt["state"]) for attempt in found["attempts"]]

    async def events(self, workflow_id: str) -> list[dict[str, Any]]:
        """Its stored events."""
        reply = await self.client.get(f"{PATH}/{workflow_id}/events")
        assert reply.status_code == 200, reply.text
        found: list[dict[str, Any]] = reply.json()["events"]
        return found

    async def kinds(self, workflow_id: str) -> list[str]:
        """What became of it: the types of its stored events `workflow:*`, without that."""
        kinds = [event["type"] for event in await self.events(workflow_id)]
        return [kind.removeprefix("workflow:") for kind in kinds if kind.startswith("workflow:")]

    async def follow(self, workflow_id: str, last: int | None = None) -> AsyncGenerator[dict[str, Any], None]:
        """Its stored events as they come, until it ends."""
        headers = {"accept": "text/event-stream"} | ({} if last is None else {"last-event-id": str(last)})
        async with self.client.stream("GET", f"{PATH}/{workflow_id}/events", headers=headers) as reply:
            assert reply.status_code == 200
            assert reply.headers["content-type"].startswith("text/event-stream")
            seq = ""
            async for line in reply.aiter_lines():
                if line.startswith("id:"):
                    seq = line.removeprefix("id:").strip()
                elif line.startswith("data:"):
                    event = json.loads(line.removeprefix("data:"))
                    assert str(event["seq"]) == seq
                    yield event

    async def until(self, workflow_id: str, kind: str, **fields: Any) -> dict[str, Any]:
        """The first stored event of this kind (`started`, `error`, …) with these fields."""
        async with asyncio.timeout(PATIENCE):
            async with contextlib.aclosing(self.follow(workflow_id)) as events:
                async for event in events:
                    right = all(event.get(name) == value for name, value in fields.items())
                    if event["type"] == f"workflow:{kind}" and right:
                        return event
        raise AssertionError(f"{workflow_id} ended without {kind} {fields}: {await self.get(workflow_id)}")

    async def started(self, *workflow_ids: str) -> None:
        for workflow_id in workflow_ids:
            await self.until(workflow_id, "started")

    async def posted(self, workflow_id: str) -> str:
        """The backend that it was posted to. Asks again and again: no event tells of it."""
        for _ in range(PATIENCE * 50):
            backend: str | None = (await self.get(workflow_id))["backend"]
            if backend is not None:
                return backend
            await asyncio.sleep(0.02)
        raise AssertionError(f"{workflow_id} is posted to no backend")

    async def ended(self, workflow_id: str) -> View:
        """The workflow when it is final."""
        async with asyncio.timeout(PATIENCE):
            async for _ in self.follow(workflow_id):
                pass
        return await self.get(workflow_id)

    async def cancel(self, workflow_id: str) -> str:
        reply = await self.client.delete(f"{PATH}/{workflow_id}")
        assert reply.status_code == 200, reply.text
        status: str = reply.json()["status"]
        return status

    async def set_priority(self, workflow_id: str, priority: str) -> httpx.Response:
        return await self.client.patch(f"{PATH}/{workflow_id}", json={"priority": priority})

    async def switch(self, action: str) -> dict[str, Any]:
        """`pause` or `resume`."""
        reply = await self.client.post(f"/v1/comfyui/queue/{action}")
        assert reply.status_code == 200, reply.text
        found: dict[str, Any] = reply.json()
        return found

    async def list(self, **query: Any) -> dict[str, Any]:
        reply = await self.client.get(PATH, params=query)
        assert reply.status_code == 200, reply.text
        found: dict[str, Any] = reply.json()
        return found

    async def connected(self, *backends: str) -> None:
        """Wait until the service has reached its ComfyUI; with names, each of them."""
        wanted = set(backends or ["local"])
        async with self.stream("backend", since=0) as stream:
            async with asyncio.timeout(PATIENCE):
                while wanted:
                    frame = await stream.until("backend:connected", after=len(stream.frames))
                    wanted.discard(frame["backend"])

    @contextlib.asynccontextmanager
    async def stream(self, *channels: str, since: int | None = None) -> AsyncIterator[Stream]:
        """The WebSocket, subscribed to these channels for all workflows."""
        url = self.url.replace("http:", "ws:") + "/v1/comfyui/stream"
        async with connect(
            url, additional_headers={"X-API-Key": KEY}, compression=None, proxy=None, max_size=None, close_timeout=0.5
        ) as connection:
            stream = Stream(connection)
            subscription: dict[str, Any] = {"type": "subscribe", "channels": list(channels or ["workflow"])}
            if since is not None:
                subscription["since"] = since
            await connection.send(json.dumps(subscription))
            yield stream


class House(Queue):
    """The service in this process, behind a real uvicorn."""

    app: Application


@contextlib.asynccontextmanager
async def house(app: Application) -> AsyncIterator[House]:
    """A running service. Leaving the block stops it as a shutdown does; the app can be started again."""
    # With the protocol named asyncio sets TCP_NODELAY; else each reply would wait 40 ms for an acknowledgement.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(
            app,
            http="httptools",
            ws="management_api.fast_websocket:FastWebSocketProtocol",
            ws_per_message_deflate=False,
            log_config=None,
            access_log=False,
            proxy_headers=False,
            timeout_graceful_shutdown=2,
        )
        # What `serve` does, without its ticks of 0.1 s.
        config.load()
        server = uvicorn.Server(config)
        server.lifespan = config.lifespan_class(config)
        await server.startup(sockets=[listener])
        assert server.started
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            async with httpx.AsyncClient(
                base_url=url, headers={"X-API-Key": KEY}, timeout=DEADLINE, **PLAIN
            ) as client:
                found = House(client, url)
                found.app = app
                yield found
        finally:
            for services in app.running:
                await services.close_doors()
            await server.shutdown(sockets=[listener])


class Site:
    """An app made once for a file of tests, started again for each of them on an empty data folder: quicker."""

    def __init__(self, folder: Path, comfy: Comfy | None = None, **environ: str) -> None:
        self.data = folder / "data"
        self._app = create_app(load(environment(folder, comfy, **environ), None))

    @contextlib.asynccontextmanager
    async def fresh(self) -> AsyncIterator[House]:
        """Started, with nothing in it."""
        shutil.rmtree(self.data, ignore_errors=True)
        async with house(self._app) as service:
            yield service


def environment(tmp_path: Path, comfy: Comfy | None = None, **environ: str) -> dict[str, str]:
    """The variables of a service in front of this ComfyUI."""
    base = {
        "MANAGEMENT_API_KEY": KEY,
        "MANAGEMENT_API_DATA_DIR": str(tmp_path / "data"),
        "MANAGEMENT_API_RATE_LIMIT": "100000/minute",
        "MANAGEMENT_API_PORT": "0",
        "MANAGEMENT_API_HOST": "127.0.0.1",
        "COMFY_PATH": str(comfy.directory if comfy else tmp_path / "comfyui"),
        "COMFYUI_URL": comfy.url if comfy else "http://127.0.0.1:9",
    }
    return base | environ


class Child(Queue):
    """The service as a process of its own, which can be killed."""

    process: subprocess.Popen[str]

    def kill(self) -> None:
        """kill -9: nothing is said, nothing is written."""
        end(self.process)


@contextlib.asynccontextmanager
async def child(environ: dict[str, str]) -> AsyncIterator[Child]:
    """`management-api serve` on a free port; killed at the end of the block if it still lives."""
    url, process = await asyncio.to_thread(_serve, environ)
    try:
        async with httpx.AsyncClient(base_url=url, headers={"X-API-Key": KEY}, timeout=DEADLINE, **PLAIN) as client:
            found = Child(client, url)
            found.process = process
            yield found
    finally:
        end(process)


def _serve(environ: dict[str, str]) -> tuple[str, subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "management_api", "serve"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "LOG_FORMAT": "json", "LOG_LEVEL": "info", **environ},
        cwd=environ["MANAGEMENT_API_DATA_DIR"],  # no .env there
    )
    log = process.stderr
    assert log is not None
    told = []
    for line in log:
        told.append(line)
        entry = json.loads(line) if line.startswith("{") else {}
        if entry.get("event") == "ready":
            threading.Thread(target=_drain, args=(log,), daemon=True).start()  # a full pipe would stop it
            return str(entry["url"]), process
    end(process)
    raise AssertionError(f"the service did not start: {''.join(told)}")


def _drain(log: IO[str]) -> None:
    with log:
        log.read()
