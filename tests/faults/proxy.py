"""A proxy between the service and ComfyUI that a test can tell, on events and not on times, what is to go wrong.

It can hold a request or its answer, lose either, hold or cut the WebSocket at a frame, say what ComfyUI never said,
fall silent with everything open, and be slow. What it holds it holds until told: nothing here has a timer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar
from urllib.parse import urlsplit

from tests.comfy_kit import PATIENCE

_BROKEN = (OSError, asyncio.IncompleteReadError)


class Exchange:
    """A request that a `Hold` has caught. The service waits until `answer` or `drop` is called."""

    def __init__(self, proxy: Proxy, head: bytes, body: bytes) -> None:
        self.method, self.path, _ = head.decode("latin-1").split(" ", 2)
        self.body = body
        self._proxy = proxy
        self._request = head + body
        self._asking: asyncio.Task[bytes] | None = None
        self._decided = asyncio.Event()
        self._dropped = False
        self._said: bytes | None = None

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    async def ask(self) -> bytes:
        """Pass the request on; when this returns ComfyUI has answered, and the service has not heard of it."""
        if self._asking is None:
            self._asking = self._proxy.spawn(self._proxy.ask(self.method, self._request))
        return await asyncio.shield(self._asking)

    def answer(self) -> None:
        """Let it have its way: what is not passed on yet is passed on, and the service gets the answer."""
        self._decided.set()

    def say(self, status: int, text: str) -> None:
        """Answer in the place of ComfyUI, as a proxy of the operator's may."""
        head = f"HTTP/1.1 {status} Proxy\r\ncontent-type: text/plain\r\ncontent-length: {len(text)}\r\n\r\n"
        self._said = head.encode() + text.encode()
        self._decided.set()

    def drop(self) -> None:
        """Break the connection instead of an answer, whether it was passed on or not."""
        self._dropped = self._dropped or not self._decided.is_set()
        self._decided.set()

    async def outcome(self) -> bytes | None:
        """What the service is to get; None is a broken connection."""
        await self._decided.wait()
        if self._dropped:
            return None
        if self._said is not None:
            return self._said
        try:
            return await self.ask()
        except _BROKEN:
            return None


class Hold:
    """Catches requests: so many, or all until `release`."""

    def __init__(self, method: str, path: str, times: int | None) -> None:
        self._method, self._path, self._left = method, path, times
        self._caught: asyncio.Queue[Exchange] = asyncio.Queue()
        self._all: list[Exchange] = []

    def wants(self, exchange: Exchange) -> bool:
        path = exchange.path.partition("?")[0]
        right = exchange.method == self._method and (path == self._path or path.startswith(self._path + "/"))
        return right and self._left != 0

    def take(self, exchange: Exchange) -> None:
        if self._left is not None:
            self._left -= 1
        self._all.append(exchange)
        self._caught.put_nowait(exchange)

    async def caught(self) -> Exchange:
        """The next one, as soon as it is there."""
        async with asyncio.timeout(PATIENCE):
            return await self._caught.get()

    def release(self) -> None:
        """Catch no more, and answer all that stand here undecided."""
        self._left = 0
        for exchange in self._all:
            exchange.answer()

    def end(self) -> None:
        """Catch no more, and drop what stands here undecided."""
        self._left = 0
        for exchange in self._all:
            exchange.drop()


class HeldFrame:
    """Stops a WebSocket, towards the service, at the n-th frame of a kind."""

    def __init__(self, kind: str, nth: int, fields: dict[str, Any]) -> None:
        self.go = asyncio.Event()
        self._kind, self._left, self._fields = kind, nth, fields
        self._caught: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

    def catch(self, message: dict[str, Any]) -> bool:
        """Count the frames of the kind; whether this is the one."""
        data = message.get("data", {})
        right = self._kind in ("", message.get("type")) and all(
            name in data and data[name] == value for name, value in self._fields.items()
        )
        self._left -= right
        if not right or self._left != 0:
            return False
        self._caught.set_result(message)
        return True

    async def caught(self) -> dict[str, Any]:
        """The frame; it and all after it have not reached the service."""
        async with asyncio.timeout(PATIENCE):
            return await asyncio.shield(self._caught)

    def release(self) -> None:
        """Let it and the rest pass."""
        self.go.set()


class _Socket:
    def __init__(self, service: asyncio.StreamWriter, comfyui: asyncio.StreamWriter) -> None:
        self.service = service
        self.comfyui = comfyui
        self.linger = False


class Proxy:
    """Stands at `url` before the ComfyUI at `target`."""

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        self.url = ""
        self.delay = 0.0
        """Seconds before each answer and each frame."""
        self.hides_death = False
        """Whether the service's WebSocket stays open when ComfyUI's end of it is gone."""
        self.posted: list[str] = []
        """The prompt_id of each POST /prompt that was passed on."""
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._holds: list[Hold] = []
        self._frames: list[HeldFrame] = []
        self._caught: list[HeldFrame] = []
        self._sockets: list[_Socket] = []
        self._lingering: list[_Socket] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._speaking = asyncio.Event()
        self._speaking.set()

    # ---- what a test can ask for

    def hold(self, method: str, path: str, times: int | None = None) -> Hold:
        """Catch the requests of this kind (`/history` is also `/history/{id}`), all or the next `times`."""
        hold = Hold(method, path, times)
        self._holds.append(hold)
        return hold

    def hold_frame(self, kind: str = "", *, nth: int = 1, **fields: Any) -> HeldFrame:
        """Stop the WebSocket at the n-th text frame of this type (of any) with these fields in its data."""
        held = HeldFrame(kind, nth, fields)
        self._frames.append(held)
        return held

    def cut(self, *, linger: bool = False) -> None:
        """Break the WebSocket. With `linger` ComfyUI is not told until `reap`: for it the old one lives on."""
        for socket in self._sockets:
            socket.linger = linger
            socket.service.transport.abort()

    def reap(self) -> None:
        """ComfyUI sees the end of the sockets that lingered."""
        for socket in self._lingering:
            socket.comfyui.transport.abort()
        self._lingering.clear()

    def say(self, frame: str | bytes) -> None:
        """Tell the service something, as if it came from ComfyUI."""
        data = frame.encode() if isinstance(frame, str) else frame
        code = 0x81 if isinstance(frame, str) else 0x82
        length = bytes([len(data)]) if len(data) < 126 else struct.pack(">BH", 126, len(data))
        for socket in self._sockets:
            socket.service.write(bytes([code]) + length + data)

    def silence(self) -> None:
        """Accept connections and bytes, and pass nothing in any direction."""
        self._speaking.clear()

    def speak(self) -> None:
        """End the silence; what was said meanwhile arrives now."""
        self._speaking.set()

    def mend(self) -> None:
        """Pass everything from now on. What is still held is dropped: it must not arrive in another test."""
        for hold in self._holds:
            hold.end()
        for held in self._caught:
            held.release()
        self._holds.clear()
        self._frames.clear()
        self._caught.clear()
        self.reap()
        self.speak()
        self.delay, self.hides_death = 0.0, False
        self.posted.clear()

    # ---- HTTP

    def spawn(self, work: Coroutine[Any, Any, bytes]) -> asyncio.Task[bytes]:
        """A task that ends with the proxy at the latest."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        return task

    async def ask(self, method: str, request: bytes) -> bytes:
        """One exchange with ComfyUI on a connection of its own."""
        if request.startswith(b"POST /prompt "):
            self.posted.append(json.loads(request.partition(b"\r\n\r\n")[2])["prompt_id"])
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            none = method == "HEAD" or head.split(b" ", 2)[1] in (b"204", b"304")
            return head + (b"" if none else await _body(reader, head, to_the_end=True))
        finally:
            writer.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of the service."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if b"upgrade: websocket" in head.lower():
                    return await self._serve_socket(head, reader, writer)
                exchange = Exchange(self, head, await _body(reader, head))
                await self._speaking.wait()
                hold = next((hold for hold in self._holds if hold.wants(exchange)), None)
                if hold is None:
                    exchange.answer()
                else:
                    hold.take(exchange)
                answer = await exchange.outcome()
                await self._pass()
                if answer is None:
                    return None
                writer.write(answer)
                await writer.drain()
        except _BROKEN:
            pass
        finally:
            writer.transport.abort()
            self._tasks.discard(task)

    async def _pass(self) -> None:
        if self.delay:
            await asyncio.sleep(self.delay)
        await self._speaking.wait()

    # ---- the WebSocket

    async def _serve_socket(self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._speaking.wait()
        from_comfyui, to_comfyui = await asyncio.open_connection(self._host, self._port)
        socket = _Socket(writer, to_comfyui)
        self._sockets.append(socket)
        try:
            to_comfyui.write(head)
            writer.write(await from_comfyui.readuntil(b"\r\n\r\n"))
            passing = {
                asyncio.create_task(self._pass_bytes(reader, to_comfyui)),
                asyncio.create_task(self._pass_frames(from_comfyui, writer)),
            }
            try:
                await asyncio.wait(passing, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in passing:
                    task.cancel()
                await asyncio.gather(*passing, return_exceptions=True)
        finally:
            self._sockets.remove(socket)
            if socket.linger:
                self._lingering.append(socket)
            else:
                to_comfyui.transport.abort()

    async def _pass_bytes(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            await self._speaking.wait()
            writer.write(data)
            await writer.drain()

    async def _pass_frames(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                frame, text = await _frame(reader)
            except _BROKEN:
                if self.hides_death:
                    await asyncio.Event().wait()
                return
            if text is not None:
                await self._hold(json.loads(text))
            await self._pass()
            writer.write(frame)
            await writer.drain()

    async def _hold(self, message: dict[str, Any]) -> None:
        for held in [held for held in self._frames if held.catch(message)]:
            self._frames.remove(held)
            self._caught.append(held)
            await held.go.wait()

    async def close(self) -> None:
        """Break whatever is open."""
        for socket in self._lingering:
            socket.comfyui.transport.abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


P = TypeVar("P", bound=Proxy)


def proxied(target: str) -> contextlib.AbstractAsyncContextManager[Proxy]:
    """A proxy before this ComfyUI."""
    return serving(Proxy(target))


@contextlib.asynccontextmanager
async def serving(proxy: P) -> AsyncIterator[P]:
    """This proxy, on a free port."""
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0, limit=2**20)
    proxy.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        server.close()
        await proxy.close()
        await server.wait_closed()


async def _body(reader: asyncio.StreamReader, head: bytes, *, to_the_end: bool = False) -> bytes:
    """What follows the head: of the length it names; else nothing, or all there is."""
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return await reader.readexactly(int(value))
    return await reader.read() if to_the_end else b""


async def _frame(reader: asyncio.StreamReader) -> tuple[bytes, bytes | None]:
    """A frame of the server as it came, and its text when it is a whole text message (RFC 6455, 5.2)."""
    head = await reader.readexactly(2)
    length = head[1]
    if length >= 126:
        more = await reader.readexactly(2 if length == 126 else 8)
        head, length = head + more, int.from_bytes(more)
    data = await reader.readexactly(length)
    return head + data, data if head[0] == 0x81 else None
