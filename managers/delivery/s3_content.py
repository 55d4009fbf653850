"""The bytes of an output, ready to be uploaded: their hash is known, and they cannot change any more unnoticed.

An object's metadata goes out before its bytes, so the hash has to be known first. What is small is read once and kept
for as long as it is on its way; what is large and on this machine is read twice, the second time from the cache of
the system; what is large and elsewhere goes through a nameless file, so that a slow bucket does not hold a
connection of ComfyUI, and a broken download goes on where it broke. Must never hold more than `MULTIPART` bytes of
an output in memory.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import BinaryIO, ParamSpec, TypeVar

import structlog
from msgspec import Struct

from managers.comfyui.remote_file import RemoteFile
from managers.delivery.s3_bucket import MULTIPART
from managers.errors import BackendUnavailable, Gone, NotFound, Unavailable
from managers.files import OutputFile

P = ParamSpec("P")
R = TypeVar("R")

log = structlog.get_logger(__name__)

_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_DISK_SECONDS = 600.0


class DownloadConfig(Struct, frozen=True, kw_only=True):
    """How patient we are with a backend: seconds for each answer and each piece, and how often it is asked again."""

    timeout_seconds: float = 7.0
    retries: int = 2
    delay_seconds: float = 0.75


class Content(Struct, frozen=True):
    """`size` in bytes, `sha256` in hex. A file is at its beginning."""

    body: bytes | BinaryIO
    size: int
    sha256: str


@asynccontextmanager
async def content_of(file: OutputFile | RemoteFile, spool: Path, download: DownloadConfig) -> AsyncIterator[Content]:
    """The bytes of this file; `spool` is a folder for what is too large for memory.

    Raises `NotFound`, `Gone` (at the end too: they changed meanwhile), `Unavailable`.
    """
    if isinstance(file, RemoteFile):
        async with _fetched(file, spool, download) as content:
            yield content
        return
    stream = await _in_thread(_open, file)
    try:
        yield await _in_thread(_read, stream, file.size)
        await _in_thread(_check, stream, file)
    finally:
        stream.close()


# ---- on this machine


def _open(file: OutputFile) -> BinaryIO:
    try:
        stream = os.fdopen(os.open(file.place, _FLAGS), "rb")
    except FileNotFoundError as error:
        raise NotFound("Output not found") from error
    except OSError as error:
        raise Gone("The output changed while it was being opened") from error
    try:
        _check(stream, file)
    except BaseException:
        stream.close()
        raise
    return stream


def _check(stream: BinaryIO, file: OutputFile) -> None:
    facts = os.fstat(stream.fileno())
    same = (facts.st_mtime_ns, facts.st_size) == (file.mtime_ns, file.size)
    if not same or not stat.S_ISREG(facts.st_mode):
        raise Gone("The output changed while it was being uploaded")


def _read(stream: BinaryIO, size: int) -> Content:
    """Its hash, and its bytes where they are few."""
    if size > MULTIPART:
        return _hashed(stream, size)
    data = stream.read(size)
    if len(data) < size:
        raise Gone("The output became shorter while it was being read")
    return Content(data, size, hashlib.sha256(data).hexdigest())


def _hashed(stream: BinaryIO, size: int) -> Content:
    stream.seek(0)
    found = hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]  # every open file has readinto
    stream.seek(0)
    return Content(stream, size, found)


async def _in_thread(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Raises `Unavailable` when the disk fails, or does not answer."""
    try:
        async with asyncio.timeout(_DISK_SECONDS):
            return await asyncio.to_thread(function, *args, **kwargs)
    except OSError as error:  # TimeoutError is one too
        raise Unavailable("The disk cannot be read or written now") from error


# ---- elsewhere


@asynccontextmanager
async def _fetched(file: RemoteFile, spool: Path, download: DownloadConfig) -> AsyncIterator[Content]:
    if file.size <= MULTIPART:
        data = bytearray()
        async with aclosing(_download(file, download)) as pieces:
            async for piece in pieces:
                data += piece
        yield Content(bytes(data), file.size, hashlib.sha256(data).hexdigest())
        return
    stream = await _in_thread(_nameless, spool)
    try:
        async with aclosing(_download(file, download)) as pieces:
            async for piece in pieces:
                await _in_thread(stream.write, piece)
        yield await _in_thread(_hashed, stream, file.size)
    finally:
        stream.close()


def _nameless(spool: Path) -> BinaryIO:
    """It goes when it is closed, also when we are killed."""
    spool.mkdir(mode=0o700, parents=True, exist_ok=True)
    return tempfile.TemporaryFile(dir=spool)


async def _download(file: RemoteFile, config: DownloadConfig) -> AsyncGenerator[bytes, None]:
    """All of it in pieces; a connection that breaks is made again, and goes on where it broke.

    Raises `Gone`, and `BackendUnavailable` when it broke too often.
    """
    done, failures = 0, 0
    while done < file.size:
        try:
            async with aclosing(file.read(done, file.size - done, patience=config.timeout_seconds)) as pieces:
                while (piece := await _next(pieces, config.timeout_seconds)) is not None:
                    done += len(piece)
                    yield piece
            if done < file.size:
                raise BackendUnavailable("ComfyUI sent less of the output than it has")
        except BackendUnavailable as error:
            failures += 1
            if failures > config.retries:
                raise
            log.info("download broke off, trying again", reason=str(error))
            await asyncio.sleep(config.delay_seconds)


async def _next(pieces: AsyncGenerator[bytes, None], seconds: float) -> bytes | None:
    try:
        async with asyncio.timeout(seconds):
            return await anext(pieces, None)
    except TimeoutError as error:
        raise BackendUnavailable(f"ComfyUI sent nothing of the output for {seconds:g} s") from error
