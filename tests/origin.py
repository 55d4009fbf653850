"""A web server on 127.0.0.1 that tests fetch from: it can lie about lengths, drip, hold back, and send elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Awaitable, Callable

from PIL import Image

Answer = Callable[["Origin", asyncio.StreamWriter], Awaitable[None]]


def png(color: tuple[int, int, int] = (200, 30, 60), size: tuple[int, int] = (5, 3)) -> bytes:
    """A picture of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def head(status: int = 200, **headers: object) -> bytes:
    """The beginning of an answer."""
    lines = [f"HTTP/1.1 {status} Told", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode()


def whole(body: bytes, kind: str = "image/png") -> Answer:
    """This, as it should be."""

    async def answer(_: Origin, writer: asyncio.StreamWriter) -> None:
        writer.write(head(content_type=kind, content_length=len(body)) + body)

    return answer


def bare(data: bytes) -> Answer:
    """These bytes, and then the end of the connection."""

    async def answer(_: Origin, writer: asyncio.StreamWriter) -> None:
        writer.write(data)

    return answer


async def endless(_: Origin, writer: asyncio.StreamWriter) -> None:
    """A picture that never ends, in chunks: nothing says how long it is."""
    writer.write(head(transfer_encoding="chunked"))
    piece = png().ljust(4096, b"\0")
    while True:
        writer.write(b"1000\r\n" + piece + b"\r\n")
        await writer.drain()


async def dripping(_: Origin, writer: asyncio.StreamWriter) -> None:
    """Never silent for long, and never done."""
    writer.write(head(content_length=10_000) + png())
    while True:
        writer.write(b"\0")
        await writer.drain()
        await asyncio.sleep(0.02)


async def silent(_: Origin, writer: asyncio.StreamWriter) -> None:
    """Half a picture, and then nothing."""
    writer.write(head(content_length=10_000) + png())
    await writer.drain()
    await asyncio.Event().wait()


async def held(origin: Origin, writer: asyncio.StreamWriter) -> None:
    """A picture, as soon as it is let go."""
    origin.asked.set()
    try:
        await origin.release.wait()
        writer.write(head(content_length=len(png())) + png())
    except asyncio.CancelledError:
        origin.left.set()
        raise


class Origin:
    """What is there: `paths`. `asked`, `left`: somebody waits for what is held back, and has gone."""

    def __init__(self) -> None:
        self.paths: dict[str, Answer] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.asked = asyncio.Event()
        self.left = asyncio.Event()
        self.release = asyncio.Event()
        self.url = ""
        self._tasks: set[asyncio.Task[None]] = set()

    def asks(self, path: str) -> int:
        """How often it was asked for."""
        return [asked for asked, _ in self.requests].count(path)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            lines = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
            path = lines[0].split()[1]
            self.requests.append(
                (path, {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])})
            )
            default = bare(head(404, content_length=0))
            work = asyncio.create_task(self._give(self.paths.get(path, default), writer))
            self._tasks.add(work)
            gone = asyncio.create_task(reader.read())
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
            self._tasks.discard(work)
        writer.close()

    async def _give(self, answer: Answer, writer: asyncio.StreamWriter) -> None:
        await answer(self, writer)
        await writer.drain()

    def end(self) -> None:
        for task in self._tasks:
            task.cancel()


@contextlib.asynccontextmanager
async def origin() -> AsyncIterator[Origin]:
    """A running one."""
    found = Origin()
    server = await asyncio.start_server(found.answer, "127.0.0.1", 0)
    found.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield found
    finally:
        server.close()
        found.end()
        await server.wait_closed()
