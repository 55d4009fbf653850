"""What `management_api.fast_websocket` adds to uvicorn's protocol, seen from an ASGI app and a real client."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from msgspec import Struct
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from management_api.app import create_app
from management_api.fast_websocket import FastWebSocketProtocol, FrameWriter
from management_api.settings import load
from managers.events.packets import Packet, reply
from routes.stream import FRAME_WRITER
from tests.queue_kit import environment, house
from tests.serving import KEY, Log
from tests.stream_house import small_socket

Send = Callable[[dict[str, Any]], Awaitable[None]]


class Word(Struct):
    word: str


class Impatient(FastWebSocketProtocol):
    abort_seconds = 0.2


def say(word: str) -> Packet:
    return reply(Word(word))


class App:
    """Accepts, hands the writer to the test, and waits for the test to let it go."""

    def __init__(self) -> None:
        self.let_go = asyncio.Event()
        self.gone = asyncio.Event()
        self.writers: asyncio.Queue[tuple[FrameWriter | None, Send]] = asyncio.Queue()
        self.ready = asyncio.Event()
        self.ended = asyncio.Event()

    async def __call__(self, scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Send) -> None:
        writer: FrameWriter | None = scope["extensions"].get(FRAME_WRITER)
        if writer is not None:
            writer.attach(self.ready.set, lambda code, reason: self.ended.set())
        await receive()
        await send({"type": "websocket.accept"})
        self.writers.put_nowait((writer, send))
        await self.let_go.wait()
        self.gone.set()


@asynccontextmanager
async def serving(app: App, **options: Any) -> AsyncIterator[tuple[int, uvicorn.Server]]:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        options = {"ws": Impatient, "ws_per_message_deflate": False} | options
        config = uvicorn.Config(app, lifespan="off", log_level="critical", **options)  # type: ignore[arg-type]
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield listener.getsockname()[1], server
        finally:
            app.let_go.set()
            server.should_exit = True
            async with asyncio.timeout(10):
                await task


def joined(port: int, **options: Any) -> connect:
    return connect(f"ws://127.0.0.1:{port}/", proxy=None, close_timeout=0.5, **{"compression": None} | options)


async def writer_of(app: App) -> tuple[FrameWriter, Send]:
    async with asyncio.timeout(5):
        writer, send = await app.writers.get()
    assert writer is not None
    return writer, send


async def test_whole_frames_and_asgi_messages_keep_their_order() -> None:
    app = App()
    async with serving(app) as (port, _), joined(port) as client:
        writer, send = await writer_of(app)
        for number in range(50):
            writer.write(say(f"{number}"))
            await send({"type": "websocket.send", "text": f"{number}"})
        for number in range(50):
            assert await client.recv() == f'{{"word":"{number}"}}'
            assert await client.recv() == f"{number}"


async def test_the_writer_ends_with_the_connection() -> None:
    app = App()
    async with serving(app) as (port, _):
        async with joined(port):
            writer, _ = await writer_of(app)
            assert writer.ready
        async with asyncio.timeout(5):
            await app.ended.wait()
        assert not writer.ready


async def test_nothing_may_be_written_behind_a_close() -> None:
    app = App()
    async with serving(app) as (port, _), joined(port) as client:
        writer, send = await writer_of(app)
        await send({"type": "websocket.close", "code": 4000})
        assert not writer.ready
        with pytest.raises(ConnectionClosed):
            await client.recv()
        assert client.close_code == 4000


async def test_with_compression_the_writer_is_not_offered() -> None:
    app = App()
    async with serving(app, ws_per_message_deflate=True) as (port, _), joined(port, compression="deflate"):
        writer, _ = await app.writers.get()
        assert writer is None


async def fill(writer: FrameWriter) -> int:
    """Write until the transport says that the peer is slow."""
    written = 0
    while writer.ready:
        assert written < 1000
        assert writer.write(say("x" * 10_000))
        written += 1
        await asyncio.sleep(0)
    assert not writer.write(say("no room"))
    return written


async def test_a_paused_transport_is_the_sign_of_a_slow_peer() -> None:
    app = App()
    async with serving(app) as (port, _), joined(port, sock=small_socket(port), max_queue=1) as client:
        writer, _ = await writer_of(app)
        written = await fill(writer)
        assert not app.ready.is_set()
        for _ in range(written):
            await client.recv()
        async with asyncio.timeout(5):
            await app.ready.wait()
        assert writer.ready
        writer.write(say("again"))
        assert await client.recv() == '{"word":"again"}'


async def test_a_close_does_not_wait_for_a_peer_that_stopped_reading() -> None:
    app = App()
    async with serving(app) as (port, _), joined(port, sock=small_socket(port), max_queue=1):
        writer, send = await writer_of(app)
        await fill(writer)
        async with asyncio.timeout(1):
            await send({"type": "websocket.close", "code": 1013})
        app.let_go.set()
        async with asyncio.timeout(3):  # the peer never takes the close: the connection is broken off
            await app.ended.wait()


async def test_a_peer_that_neither_reads_nor_answers_pings_is_broken_off() -> None:
    app = App()
    options = {"ws_ping_interval": 0.1, "ws_ping_timeout": 0.1}
    async with serving(app, **options) as (port, _), joined(port, sock=small_socket(port), max_queue=1):
        writer, _ = await writer_of(app)
        await fill(writer)
        async with asyncio.timeout(3):
            await app.ended.wait()


async def test_the_server_can_stop_while_a_peer_does_not_read() -> None:
    app = App()
    async with serving(app) as (port, server), joined(port, sock=small_socket(port), max_queue=1):
        writer, _ = await writer_of(app)
        await fill(writer)
        server.should_exit = True
        app.let_go.set()
        async with asyncio.timeout(3):
            await app.ended.wait()


async def test_a_refused_upgrade_is_no_error_of_ours(tmp_path: Path, log: Log) -> None:
    async with house(create_app(load(environment(tmp_path), None))) as service:
        url = service.url.replace("http:", "ws:") + "/v1/comfyui/stream"
        for headers, query, status in (
            ({}, "", 401),
            ({"X-API-Key": KEY}, "?since=x", 400),
            ({"X-API-Key": KEY, "Origin": "https://elsewhere.example"}, "", 403),
        ):
            with pytest.raises(InvalidStatus) as refused:
                await connect(url + query, additional_headers=headers, proxy=None)
            assert refused.value.response.status_code == status
            assert json.loads(refused.value.response.body or b"")["status"] == status
    assert [line for line in log.lines() if line["level"] == "error" or "logger" in line] == []
