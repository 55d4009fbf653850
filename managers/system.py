"""The machine this runs on: load, memory, disk (CONTRACT 3).

Must never hold up the loop, nor anybody for long: a disk that hangs is told as unknown, and holds one thread at most.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import structlog
from msgspec import Struct

log = structlog.get_logger(__name__)

_MIB = 2**20
_PATIENCE_SECONDS = 2.0
_EVERY_SECONDS = 60.0


class LoadAverage(Struct, frozen=True):
    """How many wanted to run, over 1, 5 and 15 minutes."""

    load1: float
    load5: float
    load15: float


class Cpu(Struct, frozen=True, rename="camel"):
    """`count` is that of logical cores."""

    load_average: LoadAverage
    count: int


class Memory(Struct, frozen=True, rename="camel"):
    """In MiB. `free` is what programs can get, with what caches would give back; `used` is the rest."""

    total: int
    used: int
    free: int
    percent_used: float


class Disk(Struct, frozen=True, rename="camel"):
    """In MiB, of the file system the data folder is on. `available` is what this service may still write."""

    size: int
    used: int
    available: int
    percent_used: float


class SystemState(Struct, frozen=True):
    """The machine at a glance. `disk` is None while it does not answer."""

    cpu: Cpu
    memory: Memory
    disk: Disk | None


class SystemMonitor:
    """Looks when it is asked."""

    def __init__(
        self,
        folder: Path,
        *,
        usage: Callable[[str], Any] = psutil.disk_usage,
        patience_seconds: float = _PATIENCE_SECONDS,
    ) -> None:
        """The disk is that of `folder`."""
        self._folder = folder
        self._usage = usage
        self._patience = patience_seconds
        self._looking: asyncio.Future[Disk | None] | None = None

    async def look(self) -> SystemState:
        """As it is now."""
        cpu, memory = await asyncio.to_thread(_processor_and_memory)
        return SystemState(cpu, memory, await self.disk())

    async def disk(self) -> Disk | None:
        """The disk alone; None while it does not answer, or where the folder is not there."""
        if self._looking is None:
            # A thread of its own: a hanging disk would take one after the other from those that others need, and
            # hold up the end of the process.
            self._looking = asyncio.get_running_loop().create_future()
            threading.Thread(target=self._ask, args=(self._looking,), name="disk usage", daemon=True).start()
        try:
            async with asyncio.timeout(self._patience):
                return await asyncio.shield(self._looking)
        except TimeoutError:
            log.warning("the disk of the data folder does not answer", seconds=self._patience)
            return None

    def _ask(self, answer: asyncio.Future[Disk | None]) -> None:
        """In the thread."""
        try:
            found = self._usage(str(self._folder))
            disk = Disk(
                size=found.total // _MIB,
                used=found.used // _MIB,
                available=found.free // _MIB,
                percent_used=float(found.percent),
            )
        except OSError:
            disk = None
        with suppress(RuntimeError):  # the loop has ended meanwhile
            answer.get_loop().call_soon_threadsafe(self._answered, answer, disk)

    def _answered(self, answer: asyncio.Future[Disk | None], disk: Disk | None) -> None:
        self._looking = None
        if not answer.done():
            answer.set_result(disk)


class Volume(Struct, frozen=True):
    """Bytes of a file system: all, and those this service may still write."""

    size: int
    free: int


class DiskWatch:
    """How full the disks of some folders are. Nothing tells of that by itself, so they are looked at now and then."""

    name = "disks"

    def __init__(self, folders: Mapping[str, Path], *, every_seconds: float = _EVERY_SECONDS) -> None:
        """`folders` by the names they are told under."""
        self._monitors = {name: SystemMonitor(folder) for name, folder in folders.items()}
        self._every = every_seconds
        self.volumes: dict[str, Volume] = {}

    async def run(self) -> None:
        """Look until cancelled. A folder that does not answer is not told."""
        while True:
            for name, monitor in self._monitors.items():
                disk = await monitor.disk()
                if disk is None:
                    self.volumes.pop(name, None)
                else:
                    self.volumes[name] = Volume(size=disk.size * _MIB, free=disk.available * _MIB)
            await asyncio.sleep(self._every)


def _processor_and_memory() -> tuple[Cpu, Memory]:
    load = LoadAverage(*(round(value, 2) for value in psutil.getloadavg()))
    memory = psutil.virtual_memory()
    return (
        Cpu(load, psutil.cpu_count() or os.cpu_count() or 1),
        Memory(
            total=memory.total // _MIB,
            used=(memory.total - memory.available) // _MIB,
            free=memory.available // _MIB,
            percent_used=round(100 * (1 - memory.available / memory.total), 1),
        ),
    )
