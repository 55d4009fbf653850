"""The processes a benchmark measures, started as an operator starts them, and a client that costs next to nothing.

Every process is one of ours, on 127.0.0.1, and is ended by its own id.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import httptools
from msgspec import Struct

from benchmarks.table import percentile

KEY = "benchmark-key-1"
START_SECONDS = 20.0
SERVE = [sys.executable, "-m", "management_api", "serve"]


class Disk(Struct, frozen=True):
    """A commit of one small row, fsynced: rate, and milliseconds."""

    commits_per_second: float
    p50_ms: float
    p90_ms: float


def measure_disk(folder: Path, commits: int = 1500) -> Disk:
    """What this disk and SQLite allow a program that commits every row (WAL, synchronous=FULL)."""
    path = folder / "bare.sqlite3"
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("CREATE TABLE IF NOT EXISTS t (id INTEGER PRIMARY KEY, graph BLOB)")
    taken = []
    for _ in range(commits):
        began = time.perf_counter()
        connection.execute("INSERT INTO t (graph) VALUES (?)", (b"x" * 800,))
        taken.append(time.perf_counter() - began)
    connection.close()
    return Disk(commits / sum(taken), percentile(taken, 50) * 1e3, percentile(taken, 90) * 1e3)


class Process(Struct, frozen=True):
    """A running server. `started` is when it was begun, `ready` when it first answered (time.monotonic)."""

    url: str
    pid: int
    started: float
    ready: float

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.url.rpartition(":")[2])

    def rss_mb(self) -> float:
        """Memory in use (VmRSS), in MiB."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        return float("nan")

    def cpu_seconds(self) -> float:
        """What it has computed so far, all threads, user and system."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def service(folder: Path, comfyui: str, **environ: str) -> Iterator[Process]:
    """`management-api serve`, data in `folder`, its log in a file beside it; ready when /health answers."""
    port = free_port()
    variables = {
        "PATH": os.environ.get("PATH", ""),
        "MANAGEMENT_API_KEY": KEY,
        "MANAGEMENT_API_HOST": "127.0.0.1",
        "MANAGEMENT_API_PORT": str(port),
        "MANAGEMENT_API_DATA_DIR": str(folder),
        "MANAGEMENT_API_RATE_LIMIT": "1000000000/minute",
        "COMFYUI_URL": comfyui,
        "COMFY_PATH": str(folder / "comfy"),
        "LOG_FORMAT": "json",
        **environ,
    }
    began = time.monotonic()
    log_path = folder.parent / "service.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(SERVE, env=variables, stdout=log, stderr=log)
    try:
        ready = wait_until_healthy(process, port, began)
        yield Process(f"http://127.0.0.1:{port}", process.pid, began, ready)
    except BaseException:
        sys.stderr.write(log_path.read_text()[-4000:])  # it goes with the folder
        raise
    finally:
        _end(process)


@contextmanager
def simulator(folder: Path) -> Iterator[str]:
    """A simulated ComfyUI; gives its URL."""
    argv = [sys.executable, "-m", "management_api.simulator", "--port", "0", "--directory", str(folder)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line.startswith("simulator: "):
            raise RuntimeError("the simulator did not start")
        yield line.removeprefix("simulator: ").strip()
    finally:
        _end(process)
        process.stdout.close()


@contextmanager
def fastify(folder: Path, packages: Path) -> Iterator[Process]:
    """The server of fastify.js, with what was installed in `packages` and its database in `folder`."""
    port = free_port()
    script = Path(__file__).with_name("fastify.js")
    began = time.monotonic()
    argv = ["node", str(script), str(packages.resolve()), str(folder / "fastify.sqlite3"), str(port), KEY]
    process = subprocess.Popen(argv)
    try:
        ready = wait_until_healthy(process, port, began)
        yield Process(f"http://127.0.0.1:{port}", process.pid, began, ready)
    finally:
        _end(process)


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return cast("int", listener.getsockname()[1])


def wait_until_healthy(process: subprocess.Popen[Any], port: int, began: float) -> float:
    """When it answered for the first time (time.monotonic)."""
    while time.monotonic() - began < START_SECONDS:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}")
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
                if connection.recv(64).startswith(b"HTTP/1.1 200"):
                    return time.monotonic()
        except OSError:
            time.sleep(0.005)
    raise RuntimeError("the server did not come up")


def _end(process: subprocess.Popen[Any]) -> None:
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(timeout=5)


class Reply(Struct, frozen=True):
    """What came back."""

    status: int
    body: bytes

    def json(self) -> Any:
        """The body, decoded."""
        return json.loads(self.body)


class Connection(asyncio.Protocol):
    """One kept-alive HTTP connection, one request at a time, parsed in C."""

    def __init__(self, head: bytes) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser: Any = httptools.HttpResponseParser(self)
        self._body: list[bytes] = []
        self._reply: asyncio.Future[Reply] | None = None
        self._head = head

    @classmethod
    async def to(cls, url: str, key: str | None = None) -> Connection:
        """Connect."""
        host, _, port = url.removeprefix("http://").partition(":")
        loop = asyncio.get_running_loop()
        head = f"Host: {host}:{port}\r\n" + (f"X-API-Key: {key}\r\n" if key is not None else "")
        making = loop.create_connection(lambda: cls(head.encode()), host, int(port))
        return (await asyncio.wait_for(making, 10))[1]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(exc or ConnectionResetError("closed"))

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        reply = Reply(self._parser.get_status_code(), b"".join(self._body))
        self._body.clear()
        self._parser = httptools.HttpResponseParser(self)
        assert self._reply is not None
        self._reply.set_result(reply)

    def send(self, method: bytes, path: bytes, body: bytes = b"") -> asyncio.Future[Reply]:
        """The reply to a request with a JSON body."""
        assert self._transport is not None
        self._reply = asyncio.get_running_loop().create_future()
        length = b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(body) if body else b""
        self._transport.write(b"%b %b HTTP/1.1\r\n%b%b\r\n%b" % (method, path, self._head, length, body))
        return self._reply

    async def get(self, path: str) -> Reply:
        """GET."""
        return await self.send(b"GET", path.encode())

    async def post(self, path: str, body: bytes) -> Reply:
        """POST."""
        return await self.send(b"POST", path.encode(), body)

    def close(self) -> None:
        """Close."""
        if self._transport is not None:
            self._transport.close()


async def until_connected(url: str) -> None:
    """Until the service at `url` has its backend."""
    connection = await Connection.to(url, KEY)
    while (await connection.get("/ready")).json()["checks"]["comfyui"] != "ok":  # noqa: ASYNC110 - it is elsewhere
        await asyncio.sleep(0.01)
    connection.close()
