"""Which process on a card is which ComfyUI: the one that listens on its port.

Must never be called on the loop (it reads /proc), and must never guess: a process that cannot be looked at, as from
inside a container, belongs to nobody.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final

import psutil
from msgspec.structs import replace

from managers.gpu.values import Gpu, GpuProcess

_LOOK_AGAIN_SECONDS: Final = 5.0


class Owners:
    """Remembers what it found while the process is on a card."""

    def __init__(self, ports: Mapping[int, str]) -> None:
        """`ports` of this machine -> the backend that is there."""
        self._ports = ports
        self._known: dict[int, str] = {}
        self._strangers: dict[int, float] = {}  # pid -> when it is looked at again: ComfyUI listens late in its start

    def name(self, gpus: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
        """The same, with the backends of the processes."""
        pids = {process.pid for gpu in gpus for process in gpu.processes or ()}
        self._known = {pid: name for pid, name in self._known.items() if pid in pids}
        self._strangers = {pid: at for pid, at in self._strangers.items() if pid in pids}
        for pid in pids - self._known.keys():
            self._look(pid)
        return tuple(replace(gpu, processes=self._named(gpu.processes)) if gpu.processes else gpu for gpu in gpus)

    def _named(self, processes: tuple[GpuProcess, ...]) -> tuple[GpuProcess, ...]:
        return tuple(replace(process, backend=self._known.get(process.pid)) for process in processes)

    def _look(self, pid: int) -> None:
        now = time.monotonic()
        if now < self._strangers.get(pid, now):
            return
        try:
            listening = [
                found.laddr.port
                for found in psutil.Process(pid).net_connections("tcp")
                if found.status == psutil.CONN_LISTEN
            ]
        except (psutil.Error, OSError):
            listening = []
        name = next((self._ports[port] for port in listening if port in self._ports), None)
        if name is None:
            self._strangers[pid] = now + _LOOK_AGAIN_SECONDS
        else:
            self._known[pid] = name
            self._strangers.pop(pid, None)
