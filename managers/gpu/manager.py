"""The cards of the house: samples them, tells of them, and keeps the books on what workflows cost.

Must never wait for a driver or a ComfyUI when it is asked: everything asked for lies in memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import structlog
from msgspec import UNSET, Struct

from managers.clock import Clock
from managers.comfyui.backend import Backend
from managers.events.hub import Hub
from managers.events.types import (
    BackendConnected,
    BackendDisconnected,
    ComfyUIMessage,
    Cost,
    GpuSample,
    LiveEvent,
    StoredEvent,
    WorkflowCancelled,
    WorkflowCompleted,
    WorkflowError,
    WorkflowStarted,
)
from managers.gpu.cost import parts_of
from managers.gpu.costs import Costs
from managers.gpu.owners import Owners
from managers.gpu.remote import CRYSTOOLS, Pace, Remote
from managers.gpu.sampler import Sampler
from managers.gpu.values import Gpu, GpuStatus, Sample, view

log = structlog.get_logger(__name__)

_HUNG = "NVML: the driver does not answer"
_START = "comfyui:execution_start"
# An error is none: a blocked branch says that too, and the prompt goes on (PROTOCOL §3). Its verdict ends it.
_ENDS = frozenset({"comfyui:execution_success", "comfyui:execution_interrupted"})
# Sent while it runs, and never afterwards.
_RUNNING = "comfyui:progress_state"


class GpuConfig(Struct, frozen=True, kw_only=True):
    """How often, and where: seconds between samples of the cards of this machine, fewer while a workflow runs there.

    `sample_seconds` 0: nothing is read or asked. `here`: the backends that run on cards of this machine, with the ids
    of their cards where they are known; None: those at a loopback address. `pace`: for all others. `hung_seconds`:
    a driver that has not answered for so long is taken to hang.
    """

    sample_seconds: float = 2.0
    running_seconds: float = 0.25
    here: Mapping[str, Sequence[str]] | None = None
    pace: Pace = Pace()
    hung_seconds: float = 5.0


class GpuManager:
    """`run` it as a task, begun before any dispatcher; all else can be asked at any time."""

    def __init__(self, config: GpuConfig, *, backends: Sequence[Backend], hub: Hub, clock: Clock) -> None:
        self.name = "gpu"
        self._config = config
        self._hub = hub
        self._clock = clock
        self._costs = Costs()
        self._local: Sample | None = None
        self._had_driver = False
        self._told = False
        here = config.here
        self._here: Mapping[str, Sequence[str]] = (
            {backend.name: () for backend in backends if not backend.remote} if here is None else here
        )
        self._remotes = {backend.name: self._remote(backend) for backend in backends}
        self._handlers: dict[type, Callable[[Any], None]] = {
            ComfyUIMessage: self._message,
            WorkflowStarted: self._started,
            WorkflowCompleted: self._final,
            WorkflowCancelled: self._final,
            WorkflowError: self._final,
            BackendConnected: self._connected,
            BackendDisconnected: self._disconnected,
        }
        self._ports = _ports([backend for backend in backends if backend.name in self._here])
        self._sampler: Sampler | None = None

    async def run(self) -> None:
        """Sample and tell until cancelled."""
        if not self._config.sample_seconds:
            await asyncio.Event().wait()
        stop_listening = self._hub.listen(self._hear)
        self._sampler = Sampler(Owners(self._ports), self._clock, pause=self._pause, tell=self._sampled)
        self._sampler.start()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._watch(self._sampler), name="gpu driver")
                for remote in self._remotes.values():
                    tasks.create_task(remote.run(), name=f"gpus of {remote.name}")
        finally:
            stop_listening()
            await self._sampler.stop()

    # ---- to be asked

    def gpus(self) -> tuple[Gpu, ...]:
        """Every card of which something is known now."""
        local = () if self._local is None else self._local.gpus
        return (*local, *(gpu for remote in self._remotes.values() for gpu in remote.gpus))

    def snapshot(self) -> GpuStatus:
        """The same for clients, with what keeps the driver of this machine from telling (CONTRACT 3)."""
        gpus = self.gpus()
        error = "GPUs are not read: GPU_SAMPLE_SECONDS is 0"
        if self._config.sample_seconds:
            error = "" if self._local is None else self._local.error or ""
        # Without a driver of its own a machine with remote cards is in good order.
        told = error if self._had_driver or not gpus else ""
        return GpuStatus(available=bool(gpus), gpus=tuple(map(view, gpus)), error=told or UNSET)

    def cost_of(self, workflow_id: str) -> Cost | None:
        """What its last attempt cost, complete from ComfyUI's word that it ended on; until then, so far.

        None: nothing is known, as when it began unseen. Kept for the last few hundred that ended.
        """
        return self._costs.cost_of(workflow_id, self._clock.monotonic())

    # ---- samples

    def _sampled(self, sample: Sample) -> None:
        """The driver told, or it is known by now that it does not."""
        before, self._local = self._local, sample
        if before is None or bool(before.gpus) != bool(sample.gpus) or before.error != sample.error:
            self._log(sample)
            for remote in self._remotes.values():
                remote.wake()
        self._had_driver = self._had_driver or bool(sample.gpus)
        for name in self._costs.backends:
            if name in self._here:
                self._feed(name)
        self._tell()

    def _remote_changed(self, remote: Remote) -> None:
        if self._wanted(remote.name):
            self._feed(remote.name)
            self._tell()

    def _tell(self) -> None:
        """To everybody; where nothing was known before and nothing is now there is nothing to tell."""
        gpus = self.gpus()
        if gpus or self._told:
            self._hub.publish(GpuSample(timestamp=self._clock.now_ms(), gpus=tuple(map(view, gpus))))
        self._told = bool(gpus)

    def _pause(self) -> float:
        """Asked from the sampling thread."""
        slow = self._config.sample_seconds
        running = any(name in self._here for name in tuple(self._costs.backends))
        return min(self._config.running_seconds, slow) if running else slow

    async def _watch(self, sampler: Sampler) -> None:
        """A driver that hangs says nothing, so somebody else has to say that."""
        while True:
            await asyncio.sleep(self._config.hung_seconds / 4)
            since, now = sampler.busy_since, self._clock.monotonic()
            hung = since is not None and now - since > self._config.hung_seconds
            if hung and (self._local is None or self._local.error != _HUNG):
                self._sampled(Sample(at=now, error=_HUNG))

    def _log(self, sample: Sample) -> None:
        if sample.gpus:
            log.info("GPUs are read", count=len(sample.gpus), trouble=sample.error)
        elif self._had_driver:
            log.warning("GPUs cannot be read any more", reason=sample.error)
        else:
            log.debug("no GPUs to read here", reason=sample.error)

    # ---- whose cards

    def _remote(self, backend: Backend) -> Remote:
        name = backend.name
        return Remote(
            backend,
            self._clock,
            self._config.pace,
            wanted=lambda: self._wanted(name),
            busy=lambda: name in self._costs.backends,
            changed=self._remote_changed,
        )

    def _wanted(self, name: str) -> bool:
        """Its ComfyUI is the one to ask: it is elsewhere, or the driver here tells nothing of memory."""
        if name not in self._here:
            return True
        return self._local is not None and all(gpu.memory_total is None for gpu in self._local.gpus)

    def _feed(self, name: str) -> None:
        remote = self._remotes[name]
        if name in self._here and self._local is not None and self._local.gpus:
            parts = parts_of(self._local.gpus, name, cards=self._here[name], cpu_only=remote.cpu_only)
            self._costs.feed(name, self._local.at, parts)
        else:
            self._costs.feed(name, remote.at, parts_of(remote.gpus, name))

    # ---- what is heard

    def _hear(self, event: LiveEvent | StoredEvent) -> None:
        handler = self._handlers.get(type(event))
        if handler is not None:
            handler(event)

    def _message(self, message: ComfyUIMessage) -> None:
        """ComfyUI's own words come first, and in the order in which it did things."""
        if message.type == CRYSTOOLS:
            self._remotes[message.backend].frame(message.data)
        elif message.workflow_id is not UNSET:
            if message.type == _START:
                self._costs.begin(message.backend, message.workflow_id, self._clock.monotonic())
                self._feed(message.backend)
                self._quicken(message.backend)
            elif message.type in _ENDS:
                self._costs.end(message.workflow_id, self._clock.monotonic())
            elif message.type == _RUNNING:
                self._join(message.backend, message.workflow_id)

    def _started(self, event: WorkflowStarted) -> None:
        if event.workflow_id is not UNSET:
            self._join(event.backend, event.workflow_id)

    def _final(self, event: WorkflowCompleted | WorkflowCancelled | WorkflowError) -> None:
        if event.workflow_id is not UNSET:
            self._costs.end(event.workflow_id, self._clock.monotonic())
            if isinstance(event, WorkflowError) and event.will_retry:
                self._costs.forget(event.workflow_id)  # by now it is in the store

    def _connected(self, event: BackendConnected) -> None:
        if event.backend in self._remotes:
            self._remotes[event.backend].wake()

    def _disconnected(self, event: BackendDisconnected) -> None:
        """What only it told of is not known any more."""
        if event.backend in self._remotes:
            self._remotes[event.backend].forget()
            self._tell()

    def _join(self, name: str, workflow_id: str) -> None:
        if self._costs.join(name, workflow_id, self._clock.monotonic()):
            self._quicken(name)

    def _quicken(self, name: str) -> None:
        """A workflow runs there: a sample now, and more of them from now on."""
        self._remotes[name].wake()
        if name in self._here and self._sampler is not None:
            self._sampler.hurry()


def _ports(backends: Sequence[Backend]) -> dict[int, str]:
    """Where they listen; none where two seem to listen at the same port (each in a container of its own)."""
    found: dict[int, list[str]] = {}
    for backend in backends:
        parts = urlsplit(backend.config.url)
        found.setdefault(parts.port or (443 if parts.scheme == "https" else 80), []).append(backend.name)
    return {port: names[0] for port, names in found.items() if len(names) == 1}
