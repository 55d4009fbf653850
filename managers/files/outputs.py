"""One output file: what it is, and its bytes.

Must never hold a whole file in memory, and never call a type inline that a browser would run as a page.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import aiofiles
from msgspec import Struct

from managers.errors import Gone, NotFound, Unavailable
from managers.files.paths import locate

T = TypeVar("T")

CHUNK = 256 * 1024
"""Bytes read at once."""

_READ_TIMEOUT = 30.0
# Absent on some systems. NONBLOCK: a pipe put in the file's place must not hold the thread.
_SAFE_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)

# Our own table: the system's differs from machine to machine. What is not in it is saved, not shown:
# html, svg, xml and js could run scripts in the name of this service.
_INLINE = {
    "png": "image/png",
    "apng": "image/apng",
    "jpg": "image/jpeg",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "gif": "image/gif",
    "avif": "image/avif",
    "bmp": "image/bmp",
    "tif": "image/tiff",
    "tiff": "image/tiff",
    "exr": "image/x-exr",
    "mp4": "video/mp4",
    "m4v": "video/mp4",
    "webm": "video/webm",
    "mov": "video/quicktime",
    "mkv": "video/x-matroska",
    "avi": "video/x-msvideo",
    "mp3": "audio/mpeg",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "ogg": "audio/ogg",
    "opus": "audio/ogg",
    "m4a": "audio/mp4",
    "aac": "audio/aac",
    "glb": "model/gltf-binary",
    "gltf": "model/gltf+json",
    "obj": "model/obj",
    "stl": "model/stl",
    "json": "application/json",
    "txt": "text/plain; charset=utf-8",
    "csv": "text/plain; charset=utf-8",
}


class Media(Struct, frozen=True):
    """How to serve a file: its content type, and whether a browser may show it in place."""

    type: str
    inline: bool


_SAVED = Media("application/octet-stream", inline=False)


def media_of(name: str) -> Media:
    """By the extension of a file name; never inline for what could run in a browser."""
    media_type = _INLINE.get(extension(name))
    return Media(media_type, inline=True) if media_type else _SAVED


def extension(name: str) -> str:
    """The last extension in lower case, without its dot; empty when there is none."""
    return Path(name).suffix[1:].lower()


class OutputFile(Struct, frozen=True, kw_only=True):
    """A file that was there a moment ago. `path` is as the client says it, `place` where it really is.

    `size` is in bytes.
    """

    path: str
    place: Path
    size: int
    mtime_ns: int

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    @property
    def media(self) -> Media:
        """How to serve it."""
        return media_of(self.name)

    @property
    def etag(self) -> str:
        """A strong validator with its quotes: another time or size is another file."""
        return f'"{self.mtime_ns:x}-{self.size:x}"'

    @property
    def modified_at(self) -> int:
        """Epoch seconds, as HTTP dates count."""
        return self.mtime_ns // 1_000_000_000


def describe(root: Path, path: str) -> OutputFile:
    """The facts of the output `path`. Raises `NotFound`. Blocks: call it in a thread."""
    place, facts = locate(root, path)
    return OutputFile(path=path, place=place, size=facts.st_size, mtime_ns=facts.st_mtime_ns)


async def read(file: OutputFile, start: int, length: int) -> AsyncGenerator[bytes, None]:
    """Yield `length` bytes from `start` in chunks of at most `CHUNK`; close it with `aclosing`.

    Raises `NotFound` or `Gone` before the first chunk when the file is no longer the one described, `Gone` later when
    it ends too early, `Unavailable` when the disk fails or gives nothing for 30 s.
    """
    stream = await _patiently(aiofiles.open(file.place, "rb", buffering=0, opener=_opener_of(file)))
    try:
        await stream.seek(start)
        while length > 0:
            chunk = await _patiently(stream.read(min(length, CHUNK)))
            if not chunk:
                raise Gone("The output became shorter while it was being read")
            length -= len(chunk)
            yield chunk
    finally:
        await stream.close()


def _opener_of(file: OutputFile) -> Callable[[str, int], int]:
    """Opens nothing but this very file: no link that took its place, no pipe, no other content."""

    def opener(place: str, flags: int) -> int:
        descriptor = os.open(place, flags | _SAFE_FLAGS)
        facts = os.fstat(descriptor)
        same = (facts.st_mtime_ns, facts.st_size) == (file.mtime_ns, file.size)
        if same and stat.S_ISREG(facts.st_mode):
            return descriptor
        os.close(descriptor)
        raise Gone("The output changed while it was being opened")

    return opener


async def _patiently(step: Awaitable[T]) -> T:
    try:
        async with asyncio.timeout(_READ_TIMEOUT):
            return await step
    except FileNotFoundError as error:
        raise NotFound("Output not found") from error
    except OSError as error:  # TimeoutError is one too
        if error.errno == errno.ELOOP:
            raise Gone("The output changed while it was being opened") from error
        raise Unavailable("The output cannot be read now") from error
