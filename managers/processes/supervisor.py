"""One program, watched by a small process of its own that outlives the service: `python -I -S supervisor.py FOLDER`.

It starts the program as the leader of a session, copies its output into the log, and writes down how it ended. So a
restart of the service loses nothing: no output (the pipe has its reader), no exit status (it has its parent), no time
limit. The folder has `plan.json`, and gets `output.*.log` and `outcome.json`.

Two named pipes tell without a pid, which might be somebody else's by then: descriptor 3 (`news`) gets a byte for new
output and one for the end, and ends itself when this process does, however it does; on descriptor 4 (`control`) comes
the word to stop. Linux ends the program when this process is killed, and hands it the orphans of the program, so that
what was started by a task ends with it, even in sessions of its own.

Must never import more than the standard library, nor anything of this project: it is started by its path.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

NEWS, CONTROL = 3, 4
"""Descriptors."""
OUTPUT, END, STOP = b"o", b"e", b"s"
"""What goes through them."""
PLAN, OUTCOME, LOG = "plan.json", "outcome.json", "output.log"
_CHUNK = 65536
_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36  # <linux/prctl.h>
_LOOK_SECONDS, _LAST_SECONDS = 0.2, 2.0


class Plan(TypedDict):
    """What to run. `argv` is never read by a shell; the environment is that of this process.

    `log_bytes` is the most the log may take on disk, `timeout_seconds` 0 is no limit, `grace_seconds` is how long
    after SIGTERM SIGKILL comes.
    """

    argv: list[str]
    directory: str
    log_bytes: int
    timeout_seconds: float
    grace_seconds: float


class Outcome(TypedDict):
    """How it ended, at `ended_at` (epoch ms). `reason` is `exit`, `stop`, `timeout`, or `start`: it never began.

    `lost_bytes` of its output could not be written.
    """

    reason: str
    ended_at: int
    exit_code: int | None
    signal: str | None
    error: str | None
    lost_bytes: int


def segment_name(offset: int) -> str:
    """The part of the log that begins at this byte of the output."""
    return f"output.{offset:015d}.log"


class Log:
    """The output on disk: two parts at most, each of half the size; `output.log` leads to the newer.

    Their names say at which byte of the whole output they begin, so an offset means the same for ever. A part begins
    with a whole line, unless that is longer than a part.
    """

    def __init__(self, folder: Path, most_bytes: int, told: Callable[[], None]) -> None:
        self.lost = 0
        self._folder = folder
        self._limit = max(1, most_bytes // 2)
        self._told = told
        self._start = self._size = self._line = (
            0  # of the newer part: its offset, its size, where its last line begins
        )
        self._parts = sorted(folder.glob("output.*.log"))  # of a run before this one: it is gone on with
        if self._parts:
            content = self._parts[-1].read_bytes()
            self._start, self._size = int(self._parts[-1].name.split(".")[1]), len(content)
            self._line = content.rfind(b"\n") + 1
            self._file = os.open(self._parts[-1], os.O_RDWR | os.O_APPEND)
        else:
            self._file = self._begin(0)

    def write(self, data: bytes) -> None:
        """Append; what cannot be written is counted."""
        while data:
            room = self._limit - self._size
            cut = len(data)
            if cut > room:
                cut = data.rfind(b"\n", 0, max(0, room)) + 1 or (room if self._line == 0 else 0)
            self._append(data[:cut])
            data = data[cut:]
            if data and not self._go_on():
                self.lost += len(data)
                break
        self._told()

    def _append(self, data: bytes) -> None:
        while data:
            try:
                count = os.write(self._file, data)
            except OSError:  # a full disk is no reason to end the program
                self.lost += len(data)
                return
            end = data.rfind(b"\n", 0, count) + 1
            self._line = self._size + end if end else self._line
            self._size += count
            data = data[count:]

    def _go_on(self) -> bool:
        """With another part, into which a line goes over that has no end yet."""
        begun = b""
        try:
            if 0 < self._line < self._size:
                begun = os.pread(self._file, self._size - self._line, self._line)
                os.ftruncate(self._file, self._line)
                self._size = self._line
            file = self._begin(self._start + self._size)
        except OSError:
            self.lost += len(begun)
            return False
        os.close(self._file)
        self._file, self._start = file, self._start + self._size
        self._size = self._line = 0
        self._append(begun)
        return True

    def _begin(self, offset: int) -> int:
        while len(self._parts) > 1:
            self._parts[0].unlink(missing_ok=True)
            del self._parts[0]
        path = self._folder / segment_name(offset)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self._parts.append(path)
        link = self._folder / f".{LOG}"
        with contextlib.suppress(OSError):
            link.unlink(missing_ok=True)
            link.symlink_to(path.name)
            link.replace(self._folder / LOG)
        return file


class Supervisor:
    """From the start of the program to its end, and to the end of what it left behind."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self._plan = plan
        self._folder = folder
        self._log = Log(folder, plan["log_bytes"], lambda: _tell(OUTPUT))
        self._selector = selectors.DefaultSelector()
        self._reason = "exit"
        self._kill_at: float | None = None
        self._output = -1

    def run(self) -> None:
        """Until nothing of it is left."""
        wakeup, end = os.pipe()
        for descriptor in (wakeup, end):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(end, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, self._signalled)
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        for descriptor in (wakeup, CONTROL):
            self._selector.register(descriptor, selectors.EVENT_READ)
        try:
            program = self._start()
        except (OSError, ValueError) as error:
            self._write_down(None, f"It could not be started: {error}")
            return
        self._watch(program)
        _kill_group(program.pid, signal.SIGTERM)  # not collected yet: nobody else can have this number
        self._copy()  # what it said last
        _, status = os.waitpid(program.pid, 0)
        program.returncode = os.waitstatus_to_exitcode(status)
        self._write_down(program.returncode, None)
        self._clear_away()

    def _start(self) -> subprocess.Popen[bytes]:
        self._output, write = os.pipe()
        os.set_blocking(self._output, False)
        libc = ctypes.CDLL(None) if sys.platform == "linux" else None
        if libc is not None:
            libc.prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        try:
            program = subprocess.Popen(  # noqa: S603 -- the operator's own argv; no shell reads it
                self._plan["argv"],
                cwd=self._plan["directory"],
                stdin=subprocess.DEVNULL,
                stdout=write,
                stderr=write,
                start_new_session=True,
                preexec_fn=None if libc is None else lambda: libc.prctl(_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0),  # noqa: PLW1509 -- there is one thread
            )
        finally:
            os.close(write)
        self._selector.register(self._output, selectors.EVENT_READ)
        return program

    def _watch(self, program: subprocess.Popen[bytes]) -> None:
        """Until it has ended; it is not collected yet."""
        limit = self._plan["timeout_seconds"]
        timeout_at = time.monotonic() + limit if limit else None
        while not _ended(program.pid):
            times = [at for at in (timeout_at, self._kill_at) if at is not None]
            self._wait(max(0.0, min(times) - time.monotonic()) if times else None)
            now = time.monotonic()
            if timeout_at is not None and now >= timeout_at:
                timeout_at = None
                self._end("timeout")
            if self._reason != "exit" and self._kill_at is None:
                self._kill_at = now + self._plan["grace_seconds"]
                _kill_group(program.pid, signal.SIGTERM)
            elif self._kill_at is not None and now >= self._kill_at:
                _kill_group(program.pid, signal.SIGKILL)
                self._kill_at = now + 1

    def _wait(self, seconds: float | None) -> None:
        for key, _ in self._selector.select(seconds):
            if key.fd == self._output:
                self._copy(once=True)
                continue
            with contextlib.suppress(BlockingIOError):
                if STOP in os.read(key.fd, _CHUNK) and key.fd == CONTROL:
                    self._end("stop")

    def _end(self, reason: str) -> None:
        if self._reason == "exit":
            self._reason = reason

    def _signalled(self, number: int, _frame: object) -> None:
        if number == signal.SIGTERM:
            self._end("stop")

    def _copy(self, *, once: bool = False) -> None:
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._output, _CHUNK):
                self._log.write(data)
                if once:
                    return
            if once:
                self._selector.unregister(self._output)

    def _write_down(self, exit_code: int | None, error: str | None) -> None:
        outcome: Outcome = {
            "reason": self._reason if error is None else "start",
            "ended_at": time.time_ns() // 1_000_000,
            "exit_code": exit_code if exit_code is not None and exit_code >= 0 else None,
            "signal": None if exit_code is None or exit_code >= 0 else signal.Signals(-exit_code).name,
            "error": error,
            "lost_bytes": self._log.lost,
        }
        replace_file(self._folder / OUTCOME, json.dumps(outcome).encode())
        _tell(END)

    def _clear_away(self) -> None:
        """What it started may still be about to end; then it is ended. Such output is of no task any more."""
        if self._output in self._selector.get_map():
            self._selector.unregister(self._output)
        os.close(self._output)
        now = time.monotonic()
        kill_at = self._kill_at or now + self._plan["grace_seconds"]
        asked: set[int] = set()
        while _has_children() and now < kill_at + _LAST_SECONDS:
            for pid in _children():
                if now >= kill_at or pid not in asked:
                    asked.add(pid)
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGTERM if now < kill_at else signal.SIGKILL)
            self._wait(_LOOK_SECONDS)
            now = time.monotonic()


def _kill_group(leader: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, number)


def _ended(pid: int) -> bool:
    """Whether it has; orphans that have are collected, it is not."""
    while True:
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is None or found.si_pid == pid:
            return found is not None
        os.waitpid(found.si_pid, 0)


def _has_children() -> bool:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _children() -> list[int]:
    """Those of this process, where the system tells. They keep their pids until they are collected."""
    try:
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    except OSError:
        return []


def _tell(what: bytes) -> None:
    with contextlib.suppress(BlockingIOError):  # nobody has listened for long: who comes looks at the files first
        os.write(NEWS, what)


def replace_file(path: Path, content: bytes) -> None:
    """Old or new, whatever happens."""
    temporary = path.with_name(f".{path.name}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def main() -> None:
    """The command line."""
    folder = Path(sys.argv[1])
    plan: Plan = json.loads((folder / PLAN).read_text())
    Supervisor(plan, folder).run()


if __name__ == "__main__":
    main()
