"""Reading the log that a supervisor writes: whole lines, each once, by their place in the whole output.

An offset counts the bytes of the whole output, also of what the size cap has let go. Must never write, nor hold a
part open between two reads: it may be let go meanwhile. Everything here blocks: call it in a thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

from managers.processes.supervisor import segment_name

TAIL_LINES = 50
_TAIL_BYTES = 256 * 1024
_CHUNK = 64 * 1024
_LONGEST_LINE = 256 * 1024
_DIGITS = slice(len("output."), -len(".log"))


class Chunk(Struct, frozen=True):
    """Bytes of the output from `start`, which is later than what was asked for when that is kept no more."""

    start: int
    data: bytes


class Line(Struct, frozen=True):
    """A line without its end. `end` is the offset behind it: where to go on."""

    text: str
    end: int


def read(folder: Path, offset: int, most: int = _CHUNK) -> Chunk:
    """What is there from this offset on. Nothing more than is kept, and from one part of the log at a time."""
    while True:
        parts = _parts(folder)
        if not parts:
            return Chunk(offset, b"")
        start = max([part for part in parts if part <= offset], default=parts[0])
        try:
            with (folder / segment_name(start)).open("rb") as file:
                size = file.seek(0, 2)
                at = max(offset, start)
                if at >= start + size:  # the end, or an offset that we never gave
                    return Chunk(start + size, b"")
                file.seek(at - start)
                return Chunk(at, file.read(most))
        except FileNotFoundError:
            continue  # let go this moment: there is a later one


def tail(folder: Path, lines: int = TAIL_LINES) -> str:
    """The last lines that say something, joined."""
    said = [line for line in map(_text, _last(folder)[1].split(b"\n")) if line.strip()]
    return "\n".join(said[-lines:])


def tail_offset(folder: Path, lines: int = TAIL_LINES) -> int:
    """Where the last lines begin."""
    start, data = _last(folder)
    at = len(data) - data.endswith(b"\n")
    for _ in range(lines):
        at = data.rfind(b"\n", 0, max(at, 0))
    return start + at + 1


def _last(folder: Path) -> tuple[int, bytes]:
    """The end of the output, and where it begins."""
    begin, kept = 0, b""
    for start in reversed(_parts(folder)):
        try:
            with (folder / segment_name(start)).open("rb") as file:
                at = max(0, file.seek(0, 2) - (_TAIL_BYTES - len(kept)))
                file.seek(at)
                begin, kept = start + at, file.read() + kept
        except FileNotFoundError:
            break
        if at:
            break
    return begin, kept


class Lines:
    """Cuts what is read into lines. One of unusual length is told in pieces."""

    def __init__(self, offset: int) -> None:
        self.offset = offset
        """Where to read next."""
        self._begun = b""

    def feed(self, chunk: Chunk) -> Iterator[Line]:
        """The lines that are whole now."""
        if chunk.start != self.offset:  # what came between is kept no more
            self._begun = b""
        end = chunk.start - len(self._begun)
        self.offset = chunk.start + len(chunk.data)
        *whole, self._begun = (self._begun + chunk.data).split(b"\n")
        for line in whole:
            end += len(line) + 1
            yield Line(_text(line), end)
        if len(self._begun) >= _LONGEST_LINE:
            yield from self.rest()

    def rest(self) -> Iterator[Line]:
        """What has no end of line, at the end of all."""
        if self._begun:
            yield Line(_text(self._begun), self.offset)
            self._begun = b""


def _parts(folder: Path) -> list[int]:
    return sorted(int(path.name[_DIGITS]) for path in folder.glob("output.*.log") if path.name[_DIGITS].isdigit())


def _text(line: bytes) -> str:
    return line.decode(errors="replace").rstrip("\r")
