"""The real processes of a run: started, killed with -9, started again at once; and when each of them lived."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import msgspec
from msgspec import Struct

from management_api.simulator.ledger import Line
from tests.program import environment
from tests.queue_kit import ROOT
from tests.simulator_process import end

SERVICE = "service"
LAST_SECONDS = 40
"""That an orderly end of the service may take."""


class Life(Struct, kw_only=True):
    """One process, from its start to its end (epoch seconds; None: it lives). `status`: it ended by itself."""

    name: str
    pid: int
    since: float
    until: float | None = None
    status: int | None = None


class Program:
    """A program that is killed and started again."""

    def __init__(
        self, name: str, command: list[str], environ: dict[str, str], folder: Path, lives: list[Life]
    ) -> None:
        self.name = name
        self._command = command
        self._environ = environ
        self._folder = folder
        self._lives = lives
        self.log = folder / f"{name}.log"
        self.start()

    def start(self) -> None:
        with self.log.open("a") as log:
            since = time.time()
            self.process = subprocess.Popen(
                self._command, cwd=self._folder, env=self._environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                text=True,
            )  # fmt: skip
        self.life = Life(name=self.name, pid=self.process.pid, since=since)
        self._lives.append(self.life)

    def kill(self) -> None:
        """kill -9, unless it has ended by itself; its last moment is taken down."""
        status = self.process.poll()
        end(self.process)
        self.life.until = time.time()
        self.life.status = status

    def stop(self) -> int | None:
        """SIGTERM; its exit status, None when it did not end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(LAST_SECONDS)
        except subprocess.TimeoutExpired:
            status = None
        end(self.process)
        self.life.until = time.time()
        return status


class ComfyUI(Program):
    """A simulator, its folder, its port, its ledger."""

    def __init__(self, name: str, folder: Path, lives: list[Life]) -> None:
        self.directory = folder / name
        self.ledger = folder / f"{name}.ledger"
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "management_api.simulator", "--port", str(port)]
        command += ["--directory", str(self.directory), "--ledger", str(self.ledger)]
        super().__init__(name, command, environment(folder, PYTHONPATH=str(ROOT)), folder, lives)

    def lines(self) -> list[Line]:
        """The whole ledger."""
        return [msgspec.json.decode(line, type=Line) for line in self.ledger.read_bytes().splitlines()]


def service(comfyuis: list[ComfyUI], folder: Path, lives: list[Life]) -> tuple[str, Program]:
    """`management-api serve` in front of these; the url stays through all its lives."""
    port = free_port()
    environ = environment(
        folder,
        PYTHONPATH=str(ROOT),
        MANAGEMENT_API_PORT=str(port),
        COMFYUI_URL="",
        COMFYUI_BACKENDS=",".join(f"{one.name}={one.url}" for one in comfyuis),
        COMFY_PATH=str(comfyuis[0].directory) if len(comfyuis) == 1 else str(folder / "none"),
        LOG_FORMAT="json",
        LOG_LEVEL="info",
    )
    command = [sys.executable, "-m", "management_api", "serve"]
    return f"http://127.0.0.1:{port}", Program(SERVICE, command, environ, folder, lives)


def free_port() -> int:
    """One below the range the system chooses from: while its owner is dead no client's socket takes it."""
    for _ in range(1000):
        port = random.randrange(20000, 32000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise RuntimeError("no free port between 20000 and 32000")
