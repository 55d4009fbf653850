"""The bytes of an input on their way to ComfyUI: in memory while they are few, then in a nameless file.

Must never hold more than `_IN_MEMORY` of them, wait for the disk on the loop, or leave anything behind: the file goes
when it is closed, also when we are killed.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, ParamSpec, Self, TypeVar

from managers.comfyui.media import HEAD
from managers.errors import TooLarge, Unavailable

P = ParamSpec("P")
R = TypeVar("R")

_IN_MEMORY = 2**20
_DISK_SECONDS = 60.0


class Spool:
    """One input. Written once, then read as often as there are backends; `async with` closes it."""

    def __init__(self, folder: Path, limit: int) -> None:
        """`folder` is where the file is made, `limit` is in bytes."""
        self.size = 0
        self.head = b""
        """Its first bytes, which say what it is."""
        self._folder = folder
        self._limit = limit
        self._memory = bytearray()
        self._file: BinaryIO | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Forget it."""
        self._memory = bytearray()
        if self._file is not None:
            self._file.close()

    def announce(self, size: int) -> None:
        """So many bytes are said to come. Raises `TooLarge`."""
        if size > self._limit:
            raise TooLarge(f"It is larger than {self._limit} bytes, which INPUT_MAX_BYTES allows")

    async def write(self, piece: bytes) -> None:
        """Take the next bytes. Raises `TooLarge`, and `Unavailable` when the disk fails."""
        self.announce(self.size + len(piece))
        self.size += len(piece)
        if len(self.head) < HEAD:
            self.head = (self.head + piece)[:HEAD]
        self._memory += piece
        if len(self._memory) > _IN_MEMORY:
            await self._flush()

    async def read(self) -> AsyncGenerator[bytes, None]:
        """All of it in pieces, from the beginning; several may read at once. Raises `Unavailable`."""
        at, in_file = 0, self.size - len(self._memory)
        while self._file is not None and at < in_file:
            piece = await _in_thread(_read_at, self._file, at)
            at += len(piece)
            yield piece
        if self._memory:
            yield bytes(self._memory)

    async def _flush(self) -> None:
        full, self._memory = bytes(self._memory), bytearray()
        if self._file is None:
            self._file = await _in_thread(_nameless, self._folder)
        await _in_thread(_write, self._file, full)


def _nameless(folder: Path) -> BinaryIO:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return tempfile.TemporaryFile(dir=folder, buffering=0)


def _write(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _read_at(file: BinaryIO, at: int) -> bytes:
    piece = os.pread(file.fileno(), _IN_MEMORY, at)
    if not piece:
        raise OSError("the file is shorter than what was written")
    return piece


async def _in_thread(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    try:
        async with asyncio.timeout(_DISK_SECONDS):
            return await asyncio.to_thread(function, *args, **kwargs)
    except OSError as error:  # TimeoutError is one too
        raise Unavailable("The disk cannot be read or written now") from error
