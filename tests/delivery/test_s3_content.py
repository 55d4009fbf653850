"""Outputs of a ComfyUI elsewhere are fetched whole, however often the connection breaks, and never in memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from managers.comfyui.client import ComfyUIClient
from managers.comfyui.remote_file import RemoteFile, describe_remote
from managers.delivery.s3_bucket import MULTIPART
from managers.delivery.s3_content import DownloadConfig, content_of
from managers.errors import BackendUnavailable, Gone
from managers.files.outputs import describe
from tests.delivery.s3_kit import sha256

QUICK = DownloadConfig(timeout_seconds=5, retries=2, delay_seconds=0)


class View:
    """A /view that breaks off after `breaks[n]` bytes of its n-th answer, or is silent then."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.breaks: list[int] = []
        self.silent = False
        self.asked: list[str] = []
        self.connections: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.connections.add(task)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                found = re.search(r"range: bytes=(\d+)-", head, re.IGNORECASE)
                start = int(found[1]) if found else 0
                body = self.data[start:]
                answer = [f"HTTP/1.1 {206 if found else 200} OK", f"content-length: {len(body)}", 'etag: "1"']
                writer.write("\r\n".join([*answer, "", ""]).encode())
                if not head.startswith("HEAD"):
                    self.asked.append(head.split("\r\n", 1)[0] + f" from {start}")
                    if self.breaks:
                        writer.write(body[: self.breaks.pop(0)])
                        await writer.drain()
                        if self.silent:
                            await reader.read()
                        return writer.close()
                    writer.write(body)
                await writer.drain()
        writer.close()
        return None


@contextlib.asynccontextmanager
async def remote(view: View) -> AsyncIterator[RemoteFile]:
    server = await asyncio.start_server(view.serve, "127.0.0.1", 0)
    client = ComfyUIClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    try:
        yield await describe_remote(client, name="a.png", subfolder="", folder="output")
    finally:
        await client.aclose()
        server.close()
        await asyncio.gather(*view.connections)
        await server.wait_closed()


@pytest.mark.parametrize("size", [900_000, MULTIPART + 3_000_000])
async def test_a_download_goes_on_where_it_broke(size: int, tmp_path: Path) -> None:
    view = View(os.urandom(size))
    view.breaks = [600_000, 50_000]
    async with remote(view) as file, content_of(file, tmp_path / "spool", QUICK) as content:
        assert (content.size, content.sha256) == (size, sha256(view.data))
        held = content.body if isinstance(content.body, bytes) else content.body.read()
        assert held == view.data
        assert isinstance(content.body, bytes) == (size <= MULTIPART)
        if size > MULTIPART:
            assert list((tmp_path / "spool").iterdir()) == [], "it has no name, so that a crash leaves nothing"
    starts = [int(line.rpartition(" ")[2]) for line in view.asked]
    assert starts == [0, 2 * 256 * 1024, 2 * 256 * 1024], "whole chunks of 256 KiB are kept"


async def test_it_ends_after_so_many_tries(tmp_path: Path) -> None:
    view = View(os.urandom(300_000))
    view.breaks = [1000, 1000, 1000, 1000]
    async with remote(view) as file:
        with pytest.raises(BackendUnavailable):
            async with content_of(file, tmp_path, QUICK):
                raise AssertionError("never")
    assert len(view.asked) == 3


async def test_silence_is_a_failure_too(tmp_path: Path) -> None:
    view = View(os.urandom(300_000))
    view.breaks, view.silent = [1000, 1000], True
    patience = DownloadConfig(timeout_seconds=0.1, retries=1, delay_seconds=0)
    async with remote(view) as file:
        with pytest.raises(BackendUnavailable, match=r"sent nothing of the output for 0\.1 s"):
            async with content_of(file, tmp_path, patience):
                raise AssertionError("never")


@pytest.mark.parametrize("size", [1000, MULTIPART + 1])
async def test_a_local_file_that_changes_meanwhile_is_another(size: int, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"1" * size)
    file = describe(tmp_path, "a.png")
    with pytest.raises(Gone):  # noqa: PT012 - it is told at the end of the block
        async with content_of(file, tmp_path, QUICK) as content:
            assert content.sha256 == sha256(b"1" * size)
            path.write_bytes(b"2" * (size + 1))
    with pytest.raises(Gone):
        async with content_of(file, tmp_path, QUICK):
            raise AssertionError("never")
    path.unlink()
    path.symlink_to("/etc/hostname")
    with pytest.raises(Gone):
        async with content_of(file, tmp_path, QUICK):
            raise AssertionError("never")
