"""The real process with a real ComfyUI process behind it, reached by bytes of our own on real sockets."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from websockets.sync.client import ClientConnection, connect

from tests.program import KEY, Process, served
from tests.simulator_process import simulator

SECONDS = 10
STREAM = "/v1/comfyui/stream"
AUTHORIZED = b"X-API-Key: " + KEY.encode() + b"\r\n"


class Doors:
    """The process, and ways to reach it."""

    def __init__(self, url: str, process: Process) -> None:
        self.url = url
        self.process = process
        host, _, port = url.removeprefix("http://").rpartition(":")
        self.address = (host, int(port))
        self.client = httpx.Client(base_url=url, headers={"X-API-Key": KEY}, timeout=SECONDS)

    def open(self, data: bytes = b"") -> socket.socket:
        """A connection that has said this."""
        connection = socket.create_connection(self.address, SECONDS)
        if data:
            connection.sendall(data)
        return connection

    def listen(self) -> ClientConnection:
        """A well-behaved socket on the stream."""
        return connect(self.url.replace("http", "ws") + STREAM, additional_headers={"X-API-Key": KEY})

    def errors(self) -> list[str]:
        """What the service logged as its own failure."""
        return [line for line in self.process.seen if '"level":"error"' in line]


@contextmanager
def opened(folder: Path) -> Iterator[Doors]:
    """Both processes; the service must not have called anything its own failure in the end."""
    with (
        simulator(folder / "comfyui") as (comfyui, _),
        served(folder, COMFYUI_URL=comfyui, LOG_LEVEL="debug", LOG_FORMAT="json") as (url, process),
    ):
        found = Doors(url, process)
        with found.client:
            yield found
        assert not found.errors(), found.errors()


def read_reply(connection: socket.socket, method: str = "GET") -> tuple[http.client.HTTPResponse, bytes]:
    """The next reply, and its body."""
    reply = http.client.HTTPResponse(connection, method=method)
    reply.begin()
    return reply, reply.read()
