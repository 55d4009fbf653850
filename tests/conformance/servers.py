"""The servers a recording can be played to: a simulator of our own, or a ComfyUI that somebody else runs."""

import shutil
import signal
import subprocess
from pathlib import Path

from tests.simulator_process import end, start_simulator


class Server:
    """Somebody else's server: it can be talked to, not stopped."""

    ours = False

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    async def restart(self) -> None:
        raise NotImplementedError("only a simulator of our own can be restarted")

    def kill(self, number: signal.Signals) -> None:
        raise NotImplementedError("only a simulator of our own can be stopped")

    def remove_outputs(self) -> None:
        raise NotImplementedError("only a simulator of our own has its files here")


class OwnServer(Server):
    """A simulator process."""

    ours = True

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        url, self.process = self._start("0")
        super().__init__(url)

    def _start(self, port: str) -> "tuple[str, subprocess.Popen[str]]":
        return start_simulator(self._directory, "--no-models", "--preview", "--port", port)

    async def restart(self) -> None:
        """Start a new process in the same folder and on the same port."""
        end(self.process)
        _, self.process = self._start(self.url.rpartition(":")[2])

    def kill(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def remove_outputs(self) -> None:
        shutil.rmtree(self._directory / "output" / "probe")

    def close(self) -> None:
        end(self.process)
