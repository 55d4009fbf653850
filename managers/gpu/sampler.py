"""The thread that reads the driver, so that nobody else has to wait for it.

Must never hold anything up: a driver that hangs keeps this thread, and the service goes on, and ends, without it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import structlog

from managers.clock import Clock
from managers.gpu.nvml import Nvml, NvmlUnavailable, Reading
from managers.gpu.owners import Owners
from managers.gpu.values import Sample

log = structlog.get_logger(__name__)

_STOP_SECONDS = 1.0
_MOST_PATIENCE_SECONDS = 60.0


class Sampler:
    """Start it once, on the loop; `stop` it there."""

    def __init__(
        self, owners: Owners, clock: Clock, *, pause: Callable[[], float], tell: Callable[[Sample], None]
    ) -> None:
        """`pause`: seconds until the next sample, asked from the thread. `tell` is called on the loop."""
        self.busy_since: float | None = None
        """Since when the driver has been asked without an answer (monotonic seconds), None while it is not."""
        self._owners = owners
        self._clock = clock
        self._pause = pause
        self._tell = tell
        self._nvml = Nvml()
        self._wake = threading.Event()
        self._stopping = False
        self._failures = 0
        self._fresh_start_at = 0.0
        self._done = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """From now on samples come."""
        self._loop = asyncio.get_running_loop()
        # A daemon: the interpreter must not wait for a call that never comes back.
        threading.Thread(target=self._work, name="gpu", daemon=True).start()

    def hurry(self) -> None:
        """The next sample is wanted now."""
        self._wake.set()

    async def stop(self) -> None:
        """No more samples. The driver is let go of, unless it hangs."""
        self._stopping = True
        self._wake.set()
        if self._loop is None:
            return
        try:
            async with asyncio.timeout(_STOP_SECONDS):
                await self._done.wait()
        except TimeoutError:
            log.warning("the GPU driver does not answer, its thread is left behind")

    # ---- in the thread

    def _work(self) -> None:
        while not self._stopping:
            self._wake.clear()
            self.busy_since = self._clock.monotonic()
            sample = self._sample()
            self.busy_since = None
            self._on_loop(self._deliver, sample)
            self._wait(sample)
        self._nvml.close()
        self._on_loop(self._done.set)

    def _wait(self, sample: Sample) -> None:
        """Where there is nothing to read there is no hurry either, until it is time for a fresh start."""
        if sample.gpus:
            self._wake.wait(self._pause())
            return
        while not self._stopping and (left := self._fresh_start_at - self._clock.monotonic()) > 0:
            self._wake.wait(left)
            self._wake.clear()

    def _sample(self) -> Sample:
        if self._failures and self._clock.monotonic() >= self._fresh_start_at:
            self._nvml.close()
        try:
            reading = self._nvml.read()
            gpus = self._owners.name(reading.gpus)
        except NvmlUnavailable as error:
            reading, gpus = Reading((), str(error)), ()
        except Exception as error:
            log.exception("reading the GPUs failed")
            reading, gpus = Reading((), type(error).__name__), ()
        now = self._clock.monotonic()
        if reading.trouble is None:
            self._failures = 0
        elif now >= self._fresh_start_at:
            self._fresh_start_at = now + min(self._pause() * 2**self._failures, _MOST_PATIENCE_SECONDS)
            self._failures = min(self._failures + 1, 16)
        return Sample(at=now, gpus=gpus, error=reading.trouble)

    def _deliver(self, sample: Sample) -> None:
        if not self._stopping:
            self._tell(sample)

    def _on_loop(self, call: Callable[..., object], *args: object) -> None:
        assert self._loop is not None  # noqa: S101  # `start` has set it
        try:
            self._loop.call_soon_threadsafe(call, *args)
        except RuntimeError:  # the loop is closed: this call came back after the end
            self._stopping = True
