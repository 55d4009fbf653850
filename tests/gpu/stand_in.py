"""A ComfyUI that has cards: it answers /system_stats and /queue, and says on its socket what a test tells it to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request, Response

GIB = 2**30
CPU = {"name": "cpu", "type": "cpu", "index": None, "vram_total": GIB, "vram_free": GIB}


def device(name: str = "cuda:0 NVIDIA GeForce RTX 4090 : cudaMallocAsync", **fields: Any) -> dict[str, Any]:
    """As /system_stats tells of a card: 24 GiB, 20 of them free by ComfyUI's count, 1 of these in torch's reserve."""
    memory = {"vram_total": 24 * GIB, "vram_free": 20 * GIB, "torch_vram_total": 3 * GIB, "torch_vram_free": GIB}
    return {"name": name, "type": "cuda", "index": 0} | memory | fields


class StandIn:
    """`devices` is what it has; `asked` how often somebody wanted to know."""

    def __init__(self) -> None:
        self.url = ""
        self.devices: list[Any] = [device()]
        self.failing = False
        self.asked = 0
        self._asked = asyncio.Condition()
        self._sockets: set[ServerConnection] = set()

    async def until_asked(self, times: int) -> None:
        """Until it was asked so often."""
        async with asyncio.timeout(20), self._asked:
            await self._asked.wait_for(lambda: self.asked >= times)

    async def say(self, kind: str, **data: Any) -> None:
        """To everybody who listens."""
        for socket in self._sockets:
            await socket.send(json.dumps({"type": kind, "data": data}))

    async def drop(self) -> None:
        """Close the sockets."""
        for socket in tuple(self._sockets):
            await socket.close()

    async def answer(self, connection: ServerConnection, request: Request) -> Response | None:
        """Everything but the socket."""
        path = request.path.partition("?")[0]
        if path == "/ws":
            return None
        if path == "/system_stats":
            async with self._asked:
                self.asked += 1
                self._asked.notify_all()
            if self.failing:
                return connection.respond(HTTPStatus.INTERNAL_SERVER_ERROR, "")
            return connection.respond(HTTPStatus.OK, json.dumps({"system": {}, "devices": self.devices}))
        return connection.respond(HTTPStatus.OK, "{}")

    async def listen(self, socket: ServerConnection) -> None:
        """A client of the socket, until it goes."""
        self._sockets.add(socket)
        try:
            await socket.send(json.dumps({"type": "status", "data": {"status": {"exec_info": {}}, "sid": "x"}}))
            await socket.wait_closed()
        finally:
            self._sockets.discard(socket)


@asynccontextmanager
async def stand_in() -> AsyncIterator[StandIn]:
    found = StandIn()
    async with serve(found.listen, "127.0.0.1", 0, process_request=found.answer) as server:
        host, port = next(iter(server.sockets)).getsockname()
        found.url = f"http://{host}:{port}"
        yield found
