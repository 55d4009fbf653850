"""A house with nothing but the stream in it: the real store, hub, session and server, and real sockets.

Twice: with the fast frames of `management_api.fast_websocket`, and over plain ASGI as any other server would do it.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import uvicorn
from litestar import Litestar, Request, get
from litestar.di import Provide
from litestar.response import Stream
from prometheus_client import CollectorRegistry
from websockets.asyncio.client import ClientConnection, connect

from management_api.cors import Cors
from management_api.errors import exception_handlers
from management_api.fast_websocket import FastWebSocketProtocol
from management_api.keys import KeyRing
from management_api.limits import ClientAddress
from management_api.logging import SILENT
from management_api.open_streams import OpenStreams
from management_api.outer import Outer
from management_api.route_names import RouteNames
from management_api.security import Authenticator
from managers.clock import SystemClock, new_id
from managers.events.hub import Hub
from managers.events.session import StreamConfig
from managers.events.tickets import Tickets
from managers.events.types import ImagesGenerated, Output
from managers.workflows.model import NewWorkflow, Priority
from managers.workflows.sqlite_store import SqliteStore
from managers.workflows.views import WorkflowView, view
from metrics.http import HttpMetrics
from routes.access import caller_of
from routes.sse import SseEvent, sse
from routes.stream import Streams, stream_routes

KEY = "the-key"
PATH = "/v1/comfyui/stream"


class House:
    """`store` and `hub` to make events with, `url` and `hear` to listen at."""

    def __init__(
        self,
        directory: Path,
        config: StreamConfig,
        *,
        fast: bool,
        origins: tuple[str, ...],
        keys: KeyRing | None = None,
    ) -> None:
        clock = SystemClock()
        self.keys = keys
        self.fast = fast
        self.store = SqliteStore(directory, clock=clock, ids=new_id, aging_seconds=600)
        self.hub = Hub(self.store)
        self.tickets = Tickets(clock)
        self.streams = Streams(
            hub=self.hub,
            log=self.store,
            source=self,
            tickets=self.tickets,
            clock=clock,
            config=config,
            origins=origins,
        )
        self.port = 0
        self.server: uvicorn.Server

    async def one_ends(self) -> None:
        """Wait until one of the open connections has been given up by the app."""
        async with asyncio.timeout(10):
            await asyncio.wait(self.server.server_state.tasks, return_when=asyncio.FIRST_COMPLETED)

    async def snapshot(self, workflow_ids: Collection[str] | None, /) -> tuple[int, tuple[WorkflowView, ...]]:
        found = await self.store.snapshot(workflow_ids)
        return found.seq, tuple(view(workflow, None, None) for workflow in found.workflows)

    def app(self) -> Outer:
        authenticator = Authenticator(KEY, self.keys)
        authenticator.register_ticket_checker(self.tickets.redeem)
        litestar = Litestar(
            [*stream_routes, self.ticker()],
            dependencies={"streams": Provide(lambda: self.streams, sync_to_thread=False)},
            exception_handlers=exception_handlers(),
            logging_config=None,
        )
        return Outer(
            cast("Any", litestar),
            authenticator=authenticator,
            limiter=None,
            addresses=ClientAddress(),
            streams=OpenStreams(0),
            cors=Cors(()),
            names=RouteNames(litestar.routes),
            metrics=HttpMetrics(CollectorRegistry()),
            access_log=SILENT.access,
        )

    def ticker(self) -> Any:
        """A stream of server-sent events that a test fills by hand."""
        self.ticks: asyncio.Queue[SseEvent | None] = asyncio.Queue()
        self.ticking = asyncio.Event()
        self.ticker_closed = asyncio.Event()

        async def events() -> AsyncIterator[SseEvent]:
            self.ticking.set()
            try:
                while (event := await self.ticks.get()) is not None:
                    yield event
            finally:
                self.ticker_closed.set()

        @get("/v1/ticker")
        async def ticker(request: Request[Any, Any, Any]) -> Stream:
            welcome = caller_of(request).welcome
            return sse(cast("Any", events()), heartbeat_seconds=0.05, welcome=welcome)

        return ticker

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}{PATH}"

    def connect(self, query: str = "", **options: Any) -> connect:
        options.setdefault("additional_headers", {"X-API-Key": KEY})
        options.setdefault("close_timeout", 0.5)
        return connect(self.url + query, compression=None, proxy=None, max_size=None, **options)

    async def submit(self) -> str:
        workflow_id = new_id()
        await self.store.submit(
            NewWorkflow(
                id=workflow_id,
                graph=b"{}",
                priority=Priority.NORMAL,
                gpu="local",
                rank=1,
                created_at=1,
                max_attempts=3,
                timeout_seconds=60,
            )
        )
        return workflow_id

    async def images(self, workflow_id: str, text: str = "") -> None:
        """A stored event of any size."""
        output = Output(kind="text", node_id="9", text=text)
        await self.store.append(ImagesGenerated(timestamp=1, workflow_id=workflow_id, node_id="9", outputs=(output,)))


@asynccontextmanager
async def open_house(
    directory: Path,
    *,
    fast: bool,
    config: StreamConfig,
    origins: tuple[str, ...] = (),
    keys: KeyRing | None = None,
    **server: Any,
) -> AsyncIterator[House]:
    """A running house on a port of its own. The buffers between it and its clients are small."""
    house = House(directory, config, fast=fast, origins=origins, keys=keys)
    await house.store.open(house.hub.publish_stored)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        house.port = listener.getsockname()[1]
        options: dict[str, Any] = {
            "ws": FastWebSocketProtocol if fast else "websockets-sansio",
            "ws_per_message_deflate": False,
            "ws_max_size": 2**20,
            "timeout_graceful_shutdown": 5,
        }
        served = uvicorn.Config(cast("Any", house.app()), lifespan="off", log_level="critical", **(options | server))
        # What `serve` does, without its ticks of 0.1 s.
        served.load()
        house.server = uvicorn.Server(served)
        house.server.lifespan = served.lifespan_class(served)
        await house.server.startup(sockets=[listener])
        try:
            yield house
        finally:
            await house.hub.close()
            for connection in list(house.server.server_state.connections):
                connection.shutdown()
            for acceptor in house.server.servers:
                acceptor.close()
            if tasks := house.server.server_state.tasks:
                await asyncio.wait(tasks, timeout=10)
            await house.store.close()


async def next_frame(socket: ClientConnection, seconds: float = 10) -> Any:
    """The next text frame, decoded."""
    async with asyncio.timeout(seconds):
        return json.loads(await socket.recv())


async def until(socket: ClientConnection, kind: str, seconds: float = 10) -> list[Any]:
    """All frames up to the first of this type, which is the last of the list."""
    frames = [await next_frame(socket, seconds)]
    while frames[-1]["type"] != kind:
        frames.append(await next_frame(socket, seconds))
    return frames


async def answer(socket: ClientConnection, **frame: Any) -> Any:
    """Send a frame; the next frame that comes."""
    await socket.send(json.dumps(frame))
    return await next_frame(socket)


async def settled(socket: ClientConnection) -> list[Any]:
    """What was on its way: everything before the answer to a ping."""
    await socket.send('{"type":"ping"}')
    return (await until(socket, "pong"))[:-1]


def small_socket(port: int, size: int = 4096) -> socket.socket:
    """A connected socket with a small receive buffer, for a client that is going to stop reading, or reads slowly."""
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
    raw.connect(("127.0.0.1", port))
    raw.setblocking(False)
    return raw
