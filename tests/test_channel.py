"""The kept-alive connections to ComfyUI, against servers that answer byte by byte what a test says."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from managers.comfyui.channel import Answer, Channel, NoAnswer, NotSent

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


class Server:
    def __init__(self, *replies: bytes, close_after: bool = False) -> None:
        self.replies = list(replies)
        self.close_after = close_after
        self.requests: list[bytes] = []
        self.connections = 0
        self.asked = asyncio.Event()
        self.closed = asyncio.Event()
        self.tasks: list[asyncio.Task[None] | None] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.tasks.append(asyncio.current_task())
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    (int(line[16:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length: ")),
                    0,
                )
                self.requests.append(head + await reader.readexactly(length))
                self.asked.set()
                if not self.replies:
                    await self.closed.wait()
                    break
                writer.write(self.replies.pop(0))
                await writer.drain()
                if self.close_after:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


@asynccontextmanager
async def listening(server: Server, path: str = "", user: str = "") -> AsyncIterator[Channel]:
    async with await asyncio.start_server(server, "127.0.0.1", 0) as listener:
        port = listener.sockets[0].getsockname()[1]
        channel = Channel(f"http://{user}127.0.0.1:{port}{path}")
        try:
            yield channel
        finally:
            channel.close()
            server.closed.set()
            async with asyncio.timeout(10):
                await asyncio.gather(*filter(None, server.tasks))


async def test_one_connection_serves_one_question_after_another() -> None:
    server = Server(OK, OK, OK)
    async with listening(server) as channel:
        for _ in range(3):
            assert await channel.ask("GET", "/queue") == Answer(200, b"{}")
    assert server.connections == 1
    assert server.requests[0].startswith(b"GET /queue HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"origin:" not in server.requests[0].lower()


async def test_a_body_is_json_below_the_path_with_the_user_of_the_address() -> None:
    server = Server(OK)
    async with listening(server, "/comfy", "me:s%40fe@") as channel:
        await channel.ask("POST", "/prompt", b'{"a":1}')
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /comfy/prompt HTTP/1.1\r\n")
    assert b"Content-Type: application/json" in head
    assert b"Authorization: Basic bWU6c0BmZQ==" in head  # me:s@fe
    assert b"me:" not in head
    assert body == b'{"a":1}'


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n1\r\n}\r\n0\r\n\r\n", Answer(200, b"{}")),
        (b"HTTP/1.1 400 Bad Request\r\nContent-Length: 3\r\n\r\nno!", Answer(400, b"no!")),
        (b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", Answer(200, b"{}")),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", Answer(200, b"")),
    ],
    ids=["chunked", "refused", "early hints", "empty"],
)
async def test_answers_of_every_shape(reply: bytes, answer: Answer) -> None:
    server = Server(reply, OK)
    async with listening(server) as channel:
        assert await channel.ask("GET", "/x") == answer
        assert await channel.ask("GET", "/x") == Answer(200, b"{}")
    assert server.connections == 1


async def test_an_answer_without_a_length_ends_with_its_connection() -> None:
    server = Server(b"HTTP/1.1 200 OK\r\n\r\nall of it", close_after=True)
    async with listening(server) as channel:
        assert await channel.ask("GET", "/x") == Answer(200, b"all of it")


async def test_a_connection_that_the_server_ends_is_not_used_again() -> None:
    closing = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}"
    server = Server(closing, OK)
    async with listening(server) as channel:
        assert await channel.ask("GET", "/x") == Answer(200, b"{}")
        assert await channel.ask("GET", "/x") == Answer(200, b"{}")
    assert server.connections == 2


@pytest.mark.parametrize(
    "reply",
    [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", b"what is this?\r\n\r\n"],
    ids=["nothing", "half an answer", "no HTTP"],
)
async def test_what_breaks_off_is_no_answer(reply: bytes) -> None:
    server = Server(reply, OK, close_after=True)
    async with listening(server) as channel:
        with pytest.raises(NoAnswer):
            await channel.ask("POST", "/prompt", b"{}")
        assert await channel.ask("GET", "/x") == Answer(200, b"{}")
    assert server.connections == 2


async def test_a_silent_server_is_left_and_its_late_answer_goes_to_nobody() -> None:
    server = Server()
    async with listening(server) as channel:
        with pytest.raises(NoAnswer, match=r"no answer within 0\.05 s"):
            await channel.ask("GET", "/x", seconds=0.05)
        server.replies = [OK]
        assert await channel.ask("GET", "/y") == Answer(200, b"{}")
    assert server.connections == 2


async def test_who_is_cancelled_leaves_no_half_used_connection() -> None:
    server = Server()
    async with listening(server) as channel:
        asked = asyncio.create_task(channel.ask("GET", "/x"))
        await server.asked.wait()
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        server.replies = [OK]
        assert await channel.ask("GET", "/y") == Answer(200, b"{}")
    assert server.connections == 2


async def test_nobody_there_means_not_sent() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        channel = Channel(f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(NotSent):
            await channel.ask("POST", "/prompt", b"{}")
