"""The way to a ComfyUI that cannot be reached: one line of log for each reason, in words, and none for a retry."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from managers.clock import SystemClock
from managers.comfyui.backend import Backend, BackendConfig, Signal
from tests.comfy_kit import PATIENCE, comfy
from tests.serving import Log

PASSWORD = "pa55-of-the-proxy"


class Door:
    """A server that answers the first bytes of every connection in one way, and counts."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.knocks: asyncio.Queue[None] = asyncio.Queue()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.knocks.put_nowait(None)
        await reader.read(4096)
        writer.write(self.answer)
        writer.close()

    async def knocked(self, times: int) -> None:
        async with asyncio.timeout(PATIENCE):
            for _ in range(times):
                await self.knocks.get()


@asynccontextmanager
async def opened(door: Door, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    async with await asyncio.start_server(door, "127.0.0.1", 0, ssl=tls) as server:
        yield server.sockets[0].getsockname()[1]


@asynccontextmanager
async def calling(url: str) -> AsyncIterator[Backend]:
    backend = Backend(
        BackendConfig(name="far", url=url), "c", clock=SystemClock(), publish=lambda _: None, on_event=lambda _: None
    )
    task = asyncio.create_task(backend.run(tuple))
    try:
        yield backend
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await backend.client.aclose()


def told(log: Log, event: str = "backend cannot be reached") -> list[str | None]:
    """The reasons in the log; the password of the address is nowhere."""
    assert PASSWORD not in log.stream.getvalue()
    assert {line["backend"] for line in log.lines()} <= {"far"}
    return [line.get("reason") for line in log.lines() if line["event"] == event]


def refused(status: str) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode()


@pytest.mark.parametrize(
    ("scheme", "answer", "words"),
    [
        ("http", refused("403 Forbidden"), "refused with 403: it takes us for a foreign web page"),
        ("http", refused("401 Unauthorized"), "refused with 401: it, or a proxy before it, wants a name"),
        ("http", refused("404 Not Found"), "refused with 404: there is no ComfyUI at this address"),
        ("http", refused("200 OK"), "refused with 200: is it a ComfyUI?"),
        ("http", refused("502 Bad Gateway"), "The proxy before it does not reach it (502)"),
        ("http", b"SSH-2.0-x\r\n", "does not speak HTTP. Should the URL begin with https?"),
        ("http", b"", "does not speak HTTP. Should the URL begin with https?"),
        ("https", refused("400 Bad Request"), "Should the URL begin with http?"),
    ],
)
async def test_a_refusal_is_told_once_and_in_words(log: Log, scheme: str, answer: bytes, words: str) -> None:
    door = Door(answer)
    async with opened(door) as port, calling(f"{scheme}://user:{PASSWORD}@127.0.0.1:{port}"):
        await door.knocked(3)
    (reason,) = told(log)
    assert reason is not None
    assert words in reason
    assert {line["level"] for line in log.lines()} == {"warning"}


async def test_another_reason_is_told_again(log: Log) -> None:
    door = Door(refused("502 Bad Gateway"))
    async with opened(door) as port, calling(f"http://user:{PASSWORD}@127.0.0.1:{port}"):
        await door.knocked(2)
        door.answer = refused("404 Not Found")
        await door.knocked(2)
    first, second = told(log)
    assert "502" in (first or "")
    assert "404" in (second or "")


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("127.0.0.1", "Nothing listens at its address: is it started?"),
        ("no.such.host.invalid", "host name is not known"),
    ],
)
async def test_nobody_there(log: Log, host: str, words: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        async with calling(f"http://{host}:{taken.getsockname()[1]}"):
            await line(log, lambda: bool(told(log)))
    (reason,) = told(log)
    assert words in (reason or "")


async def test_a_certificate_of_nobody(log: Log, tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl makes the certificate")
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=127.0.0.1"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate, key)
    async with opened(Door(b""), tls) as port, calling(f"https://127.0.0.1:{port}"):
        await line(log, lambda: bool(told(log)))
    (reason,) = told(log)
    assert "Its certificate is not trusted: self-signed certificate" in (reason or "")


async def test_coming_and_going_are_told(log: Log, tmp_path: Path) -> None:
    with comfy(tmp_path / "comfyui") as process:
        async with calling(process.url) as backend:
            with backend.inbox("nobody's prompt") as inbox:

                async def until(signal: Signal) -> None:
                    async with asyncio.timeout(PATIENCE):
                        while await inbox.get() is not signal:
                            pass

                await backend.wait_up()
                process.kill()
                await until(Signal.DOWN)
                await line(log, lambda: bool(told(log)))
                process.restart()
                await until(Signal.UP)
    events: list[Any] = [
        (one["level"], one["event"]) for one in log.lines() if one["event"] != "backend did not greet"
    ]
    assert events == [
        ("info", "backend is connected"),
        ("info", "backend is gone"),
        ("warning", "backend cannot be reached"),
        ("info", "backend is connected"),
    ]
    assert told(log, "backend is gone") == ["The connection broke off: it has ended, or the network has"]


async def line(log: Log, right: Callable[[], bool]) -> None:
    """Wait for a line of the log: nobody is told of them."""
    for _ in range(PATIENCE * 100):
        if right():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"not logged: {log.lines()}")
