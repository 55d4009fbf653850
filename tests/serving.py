"""A service to test against, in this process and on this loop: over ASGI, or behind a real uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import socket
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, Protocol

import httpx
import uvicorn
from litestar.types import ControllerRouterHandler

from management_api.app import Application
from management_api.logging import SILENT, Logs, configure
from management_api.settings import Settings

KEY = "test-key-7Q2xW9"
DEADLINE = 30
"""Seconds that nothing in these tests should need."""


class SettingsMaker(Protocol):
    """`make_settings(NAME=value, …)`."""

    def __call__(self, **environ: str) -> Settings: ...


class Log:
    """What was logged, as JSON lines."""

    def __init__(self) -> None:
        self.stream = io.StringIO()
        self.logs = configure("info", "json", self.stream, secrets=(KEY,))

    def lines(self) -> list[dict[str, Any]]:
        """Every line so far."""
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]


class Service:
    """A running service: its app, and a client that shows the key unless told otherwise."""

    def __init__(self, app: Application, client: httpx.AsyncClient) -> None:
        self.app = app
        self.client = client


class Server(Service):
    """The same behind a real uvicorn."""

    def __init__(self, app: Application, client: httpx.AsyncClient, port: int) -> None:
        super().__init__(app, client)
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.websocket_url = f"ws://127.0.0.1:{port}"


class _Uvicorn(uvicorn.Server):
    """uvicorn that says when it is up, and leaves the signals to pytest."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def lifespan(app: Application) -> AsyncIterator[None]:
    """Start-up and shutdown on this loop, as a server would."""
    to_app: asyncio.Queue[Any] = asyncio.Queue()
    from_app: asyncio.Queue[Any] = asyncio.Queue()
    await to_app.put({"type": "lifespan.startup"})
    async with asyncio.timeout(DEADLINE):
        task = asyncio.create_task(app({"type": "lifespan", "asgi": {"version": "3.0"}}, to_app.get, from_app.put))
        started = await from_app.get()
    assert started["type"] == "lifespan.startup.complete", started.get("message")
    try:
        yield
    finally:
        await to_app.put({"type": "lifespan.shutdown"})
        async with asyncio.timeout(DEADLINE):
            stopped = await from_app.get()
            await task
        assert stopped["type"] == "lifespan.shutdown.complete", stopped.get("message")


@contextlib.asynccontextmanager
async def serve(app: Application) -> AsyncIterator[int]:
    """uvicorn as `management-api serve` sets it up, on a free port of 127.0.0.1."""
    # Named as TCP, or asyncio sends small pieces late (no TCP_NODELAY): 44 ms a request.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    config = uvicorn.Config(
        app,
        http="httptools",
        loop="none",
        ws="websockets-sansio",
        ws_per_message_deflate=False,
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=2,
    )
    server = _Uvicorn(config)
    task = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        async with asyncio.timeout(DEADLINE):
            await server.up.wait()
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        async with asyncio.timeout(DEADLINE):
            await task
        listening.close()


class StartService(Protocol):
    """`await start_service(NAME=value, …)`: the app without a socket. `headers` default to the key."""

    async def __call__(
        self,
        *,
        routes: Sequence[ControllerRouterHandler] = (),
        logs: Logs = SILENT,
        peer: str = "127.0.0.1",
        headers: Mapping[str, str] | None = None,
        **environ: str,
    ) -> Service: ...


class StartServer(Protocol):
    """`await start_server(NAME=value, …)`: the app behind a real uvicorn."""

    async def __call__(
        self, *, routes: Sequence[ControllerRouterHandler] = (), logs: Logs = SILENT, **environ: str
    ) -> Server: ...
