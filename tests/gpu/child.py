"""A process that finds the stub driver, told what to do by lines on stdin; it answers with lines of JSON.

`read`: one reading of the adapter for each line `read`; `close` lets go of the driver. `manage SAMPLE HUNG`: the
manager without a backend; a line for each `gpu:sample`, and for each `snapshot`; ends with stdin, as a service does.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

import msgspec
import structlog

from managers.clock import SystemClock
from managers.events.hub import Hub
from managers.events.log import StoredFrame
from managers.events.types import GpuSample, LiveEvent, StoredEvent
from managers.gpu import GpuConfig, GpuManager
from managers.gpu.nvml import Nvml, NvmlUnavailable


class NoLog:
    """A log in which nothing is."""

    last_seq = 0

    async def first_seq(self) -> int:
        return 1

    async def events_after(self, seq: int, limit: int) -> Sequence[StoredFrame]:
        return []

    async def events_of(self, workflow_id: str, after: int = 0) -> Sequence[StoredFrame]:
        return []


def say(value: object) -> None:
    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")
    sys.stdout.flush()


def read() -> None:
    nvml = Nvml()
    for line in sys.stdin:
        if line == "close\n":
            nvml.close()
            say("closed")
            continue
        try:
            say(nvml.read())
        except NvmlUnavailable as error:
            say({"unavailable": str(error)})


async def manage(sample: float, hung: float) -> None:
    hub = Hub(NoLog())

    def heard(event: LiveEvent | StoredEvent) -> None:
        if isinstance(event, GpuSample):
            say(event)

    hub.listen(heard)
    config = GpuConfig(sample_seconds=sample, hung_seconds=hung)
    manager = GpuManager(config, backends=[], hub=hub, clock=SystemClock())
    running = asyncio.create_task(manager.run())
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while await lines.readline():
        say(manager.snapshot())
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    say("stopped")


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    if sys.argv[1] == "read":
        read()
    else:
        asyncio.run(manage(float(sys.argv[2]), float(sys.argv[3])))
