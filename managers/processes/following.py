"""Following the log of a program as it grows. Must never look again and again: the supervisor tells of changes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import nullcontext
from pathlib import Path

from msgspec import Struct

from managers.processes import logs
from managers.processes.logs import Line, Lines
from managers.processes.supervised import Supervised


class Gap(Struct, frozen=True):
    """This part of the log, by offsets, is kept no more."""

    start: int
    end: int


async def read_on(
    folder: Path, after: int, program: Supervised | None = None, leave: Callable[[], bool] = lambda: False
) -> AsyncGenerator[list[Line] | Gap, None]:
    """The lines of a log from this offset on, as many at a time as there are; while the program runs, as they come.

    `leave` ends it sooner, and is asked when the program is `nudge`d.
    """
    lines = Lines(after)
    ended = program is None
    with program.changes() if program is not None else nullcontext(asyncio.Event()) as changed:
        while not leave():
            changed.clear()
            ended = ended or (program is not None and program.ended.is_set())
            chunk = await asyncio.to_thread(logs.read, folder, lines.offset)
            if chunk.data:
                if chunk.start > lines.offset:
                    yield Gap(lines.offset, chunk.start)
                if found := list(lines.feed(chunk)):
                    yield found
            elif ended:
                if found := list(lines.rest()):
                    yield found
                return
            else:
                await changed.wait()
