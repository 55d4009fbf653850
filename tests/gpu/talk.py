"""A child process, spoken to line by line, with a limit for every answer."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from tests.program import SECONDS

ROOT = Path(__file__).parent.parent.parent


class Child:
    """`write` a line, `hear` one, `ask` both; lines it says are JSON."""

    def __init__(self, environ: Mapping[str, str], *args: str) -> None:
        self._lines: queue.Queue[str] = queue.Queue()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.child", *args],
            cwd=ROOT,
            env={**os.environ, **environ},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def write(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def hear(self) -> Any:
        line = self._lines.get(timeout=SECONDS)
        assert line, "the child has ended"
        return msgspec.json.decode(line)

    def ask(self, line: str) -> Any:
        self.write(line)
        return self.hear()

    def until(self, right: Callable[[Any], bool]) -> Any:
        """The next line that is right."""
        while not right(found := self.hear()):
            pass
        return found

    def end(self) -> int:
        """Close its stdin; its exit status."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._process.wait(SECONDS)

    def kill(self) -> None:
        """Whatever it does."""
        self._process.kill()
        self._process.wait(SECONDS)
        self._reader.join(SECONDS)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")


@contextmanager
def child(environ: Mapping[str, str], *args: str) -> Iterator[Child]:
    """`tests.gpu.child` with these arguments, gone afterwards."""
    process = Child(environ, *args)
    try:
        yield process
    finally:
        process.kill()
