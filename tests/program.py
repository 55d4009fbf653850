"""`management-api` as a real process, with an environment of its own, and a limit for everything it does."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Run in the background of a shell, and children would inherit that: Ctrl-C would do nothing to them.
    signal.signal(signal.SIGINT, signal.default_int_handler)

PROGRAM = (sys.executable, "-m", "management_api")
KEY = "program-key-4fT8kq0Zr1"
SECONDS = 30
"""That nothing here should need."""


class Ended:
    """How a process ended, and what it said."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status = status
        self.out = out
        self.err = err

    @property
    def lines(self) -> list[str]:
        """What it said on stderr."""
        return self.err.splitlines()


def environment(folder: Path, **environ: str) -> dict[str, str]:
    """Nothing of the machine's own settings; everything below `folder`."""
    base = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "LANG": "C.UTF-8",
        "MANAGEMENT_API_KEY": KEY,
        "MANAGEMENT_API_HOST": "127.0.0.1",
        "MANAGEMENT_API_PORT": "0",
        "MANAGEMENT_API_DATA_DIR": str(folder / "data"),
        "MANAGEMENT_API_RATE_LIMIT": "off",
        "COMFYUI_URL": "http://127.0.0.1:9",
        "COMFY_PATH": str(folder / "comfyui"),
    }
    return {name: value for name, value in {**base, **environ}.items() if value}


def run(folder: Path, *args: str, stdin: str = "", **environ: str) -> Ended:
    """Run a command to its end. An empty value takes a variable away."""
    done = subprocess.run(
        [*PROGRAM, *args],
        cwd=folder,
        env=environment(folder, **environ),
        input=stdin.encode(),
        capture_output=True,
        timeout=SECONDS,
        check=False,
    )
    return Ended(done.returncode, done.stdout.decode(), done.stderr.decode())


class Process:
    """A running command. Its lines (stdout and stderr) are read as they come."""

    def __init__(self, folder: Path, *args: str, **environ: str) -> None:
        self.folder = folder
        self.seen: list[str] = []
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._process = subprocess.Popen(
            [*PROGRAM, *args],
            cwd=folder,
            env=environment(folder, **environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def line(self, part: str) -> str:
        """Wait for a line with this in it."""
        while True:
            line = self._lines.get(timeout=SECONDS)
            assert line is not None, f"ended before {part!r}: {self.seen}"
            if part in line:
                return line

    def event(self, name: str) -> dict[str, Any]:
        """Wait for a line of the log."""
        found: dict[str, Any] = json.loads(self.line(f'"event":"{name}"'))
        return found

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        """Its exit status. Everything it said is in `seen` then."""
        status = self._process.wait(SECONDS)
        self._reader.join(SECONDS)
        return status

    def end(self) -> None:
        """Whatever it does."""
        self._process.kill()
        self.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            for line in stream:
                self.seen.append(line.rstrip("\n"))
                self._lines.put(line)
        self._lines.put(None)


@contextmanager
def started(folder: Path, *args: str, **environ: str) -> Iterator[Process]:
    """A running command, gone afterwards."""
    process = Process(folder, *args, **environ)
    try:
        yield process
    finally:
        process.end()


@contextmanager
def served(folder: Path, **environ: str) -> Iterator[tuple[str, Process]]:
    """A service that is ready, and its URL."""
    with started(folder, "serve", **environ) as process:
        yield process.event("ready")["url"], process
