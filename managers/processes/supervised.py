"""A supervisor as the service sees it: started or found again, its news, its end.

That it lives is told by its named pipe, which the kernel ends with it: no pid can be mistaken, and nothing is asked
for again and again. Must never judge what an end means.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
import structlog
from msgspec import Struct

from managers.processes import supervisor
from managers.processes.supervisor import CONTROL, END, NEWS, OUTCOME, PLAN, STOP, Plan

log = structlog.get_logger(__name__)

_NEWS, _CONTROL = "news", "control"
_PROGRAM = str(Path(supervisor.__file__).resolve())


class Outcome(Struct, frozen=True):
    """How the program ended; the fields of `supervisor.Outcome`."""

    reason: str
    ended_at: int
    exit_code: int | None
    signal: str | None
    error: str | None
    lost_bytes: int


class Supervised:
    """One program. Make it by `start` or `find`; `aclose` only stops listening."""

    def __init__(self, folder: Path, news: int, pid: int | None) -> None:
        self.folder = folder
        self.ended = asyncio.Event()
        """The program has ended, and how is written down, or its supervisor is gone without a word."""
        self.gone = asyncio.Event()
        """The supervisor has ended too, with all that the program had started."""
        self._pid = pid
        self._news: int | None = news
        self._listeners: set[asyncio.Event] = set()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(news, self._hear)
        self._hear()

    @classmethod
    async def start(cls, folder: Path, plan: Plan, environ: Mapping[str, str]) -> Supervised:
        """Begin. `folder` is there, and belongs to this program alone. Raises `OSError`."""
        return cls(folder, *await asyncio.to_thread(_spawn, folder, plan, environ))

    @classmethod
    async def find(cls, folder: Path) -> Supervised:
        """The one that was started in this folder before; it is `gone` at once when it is not there any more.

        Raises `OSError` when there never was one.
        """
        found = cls(folder, await asyncio.to_thread(_open_news, folder), None)
        if await asyncio.to_thread((folder / OUTCOME).exists):
            found.ended.set()
        return found

    async def outcome(self) -> Outcome | None:
        """How it ended; None when nobody was there to see it. Ask when it has `ended`."""
        return await asyncio.to_thread(read_outcome, self.folder)

    async def stop(self) -> None:
        """SIGTERM to the process group of the program, SIGKILL after its time of grace; also if we are gone then."""
        await asyncio.to_thread(self._ask_to_stop)

    @contextmanager
    def changes(self) -> Iterator[asyncio.Event]:
        """An event that is set when there is new output, and at the end."""
        changed = asyncio.Event()
        self._listeners.add(changed)
        try:
            yield changed
        finally:
            self._listeners.discard(changed)

    def nudge(self) -> None:
        """Wake all who wait for changes."""
        for changed in self._listeners:
            changed.set()

    async def collect(self) -> None:
        """After it is gone: let the system forget it, if it was our child."""
        if self._pid is not None:
            with suppress(ChildProcessError):
                await asyncio.to_thread(os.waitpid, self._pid, 0)
            self._pid = None

    def close(self) -> None:
        """Listen no more. It goes on."""
        if self._news is not None:
            self._loop.remove_reader(self._news)
            os.close(self._news)
            self._news = None

    def _hear(self) -> None:
        if self._news is None:
            return
        try:
            told = os.read(self._news, 65536)
        except BlockingIOError:
            return
        if not told:
            self.close()
            self.gone.set()
        if not told or END in told:
            self.ended.set()
        self.nudge()

    def _ask_to_stop(self) -> None:
        try:
            control = os.open(self.folder / _CONTROL, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads there: it has gone meanwhile
            return
        try:
            os.write(control, STOP)
        finally:
            os.close(control)


def read_outcome(folder: Path) -> Outcome | None:
    """How the program of this folder ended, if that is written down. Blocks."""
    try:
        return msgspec.json.decode((folder / OUTCOME).read_bytes(), type=Outcome)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        log.error("an outcome cannot be read", folder=str(folder), reason=str(error))
        return None


def _open_news(folder: Path) -> int:
    return os.open(folder / _NEWS, os.O_RDONLY | os.O_NONBLOCK)


def _open_both_ends(pipe: Path) -> int:
    """It opens at once so, and is never full of words that nobody can read; not 3 or 4, which are given away."""
    low = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    try:
        return fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 10)
    finally:
        os.close(low)


def _spawn(folder: Path, plan: Plan, environ: Mapping[str, str]) -> tuple[int, int]:
    """The pipe with its news, and its pid."""
    for name in (_NEWS, _CONTROL):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name, 0o600)
    (folder / OUTCOME).unlink(missing_ok=True)
    (folder / PLAN).write_bytes(msgspec.json.encode(plan))
    ends = [_open_both_ends(folder / name) for name in (_NEWS, _CONTROL)]
    try:
        news = _open_news(folder)
        try:
            pid = os.posix_spawn(
                sys.executable,
                [sys.executable, "-I", "-S", _PROGRAM, str(folder)],
                environ,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
                    (os.POSIX_SPAWN_DUP2, ends[0], NEWS),
                    (os.POSIX_SPAWN_DUP2, ends[1], CONTROL),
                ],
                setsid=True,
                setsigmask=(),
                setsigdef=(signal.SIGPIPE,),
            )
        except BaseException:
            os.close(news)
            raise
    finally:
        for end in ends:
            os.close(end)
    return news, pid
