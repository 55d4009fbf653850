"""GET /v1/status (CONTRACT 3): the whole house at a glance. Every part is asked of the one who knows it.

Must never ask a ComfyUI or a driver: what is told is what is known.
"""

from __future__ import annotations

import os
from typing import Literal, Protocol
from urllib.parse import urlsplit

from litestar import get
from litestar.di import NamedDependency
from litestar.params import SkipValidation
from msgspec import Struct

from managers.comfyui.backend import BackendState
from managers.gpu.values import GpuStatus
from managers.processes.manager import ProcessManager
from managers.system import Cpu, Disk, Memory, SystemMonitor
from managers.workflows.dispatcher import Dispatcher
from managers.workflows.manager import WorkflowManager
from routes.problems import documented
from routes.service import ServiceInfo, iso_timestamp


class GpuSource(Protocol):
    """Whoever samples the GPUs. It answers from memory."""

    def snapshot(self) -> GpuStatus:
        """The last sample."""
        ...


class ApiPart(Struct, frozen=True):
    """This process. `uptime` in whole seconds."""

    uptime: int
    version: str
    pid: int


class TasksPart(Struct, frozen=True):
    """How many tasks run."""

    active: int


class SystemPart(Struct, frozen=True):
    """The machine; MiB and percent. `disk` is null while it does not answer."""

    cpu: Cpu
    memory: Memory
    disk: Disk | None


class BackendPart(Struct, frozen=True, kw_only=True, rename="camel"):
    """One ComfyUI; `version` and `queueRemaining` are null while they are not known."""

    name: str
    url: str
    state: BackendState
    version: str | None
    queue_remaining: int | None
    current_workflow: str | None


class QueuePart(Struct, frozen=True, kw_only=True, rename="camel"):
    """The queue; `oldestAgeSeconds` is null when nothing waits."""

    length: int
    running: int
    oldest_age_seconds: float | None
    paused: bool


class ComfyUIPart(Struct, frozen=True):
    """All of ComfyUI."""

    backends: list[BackendPart]
    queue: QueuePart


class StatusReport(Struct, frozen=True, kw_only=True):
    """The reply of GET /v1/status. `uptime` in seconds."""

    timestamp: str
    api: ApiPart
    tasks: TasksPart
    gpu: GpuStatus
    providers: dict[str, Literal["configured", "not_configured"]]
    system: SystemPart
    comfyui: ComfyUIPart
    uptime: float


_EXAMPLE = {
    "timestamp": "2026-11-22T16:03:11.482Z",
    "api": {"uptime": 86, "version": "1.0.0", "pid": 4711},
    "tasks": {"active": 1},
    "gpu": {
        "available": True,
        "gpus": [
            {
                "gpuId": "0",
                "index": 0,
                "uuid": "GPU-6f2c1d1e-9a3b-4c5d-8e7f-60718293a4b5",
                "name": "NVIDIA GeForce RTX 4090",
                "utilization": 97.0,
                "memory": {"used": 14212, "total": 24564, "percentUsed": 57.9},
                "temperature": 67.0,
                "powerWatts": 388.4,
            }
        ],
    },
    "providers": {"claude-flow": "configured", "agentic-flow": "not_configured"},
    "system": {
        "cpu": {"loadAverage": {"load1": 1.42, "load5": 1.1, "load15": 0.9}, "count": 16},
        "memory": {"total": 64216, "used": 21340, "free": 42876, "percentUsed": 33.2},
        "disk": {"size": 938014, "used": 512340, "available": 377953, "percentUsed": 57.5},
    },
    "comfyui": {
        "backends": [
            {
                "name": "local",
                "url": "http://127.0.0.1:8188",
                "state": "connected",
                "version": "0.3.64",
                "queueRemaining": 2,
                "currentWorkflow": "3f0c6f1e-4d3b-4d55-9f6a-0d6f2a3c9b11",
            }
        ],
        "queue": {"length": 7, "running": 1, "oldestAgeSeconds": 12.4, "paused": False},
    },
    "uptime": 86.411,
}


@get(
    "/v1/status",
    summary="The whole service at a glance",
    description="This process, tasks and their providers, GPUs, the machine, the backends and the queue.",
    tags=["monitoring"],
    opt=documented(reply=_EXAMPLE),
)
async def status(
    service: NamedDependency[SkipValidation[ServiceInfo]],
    workflows: NamedDependency[WorkflowManager],
    tasks: NamedDependency[ProcessManager],
    system: NamedDependency[SystemMonitor],
    gpus: NamedDependency[SkipValidation[GpuSource]],
) -> StatusReport:
    """Answer GET /v1/status."""
    machine = await system.look()
    providers = await tasks.configured()
    uptime = service.clock.monotonic() - service.started
    return StatusReport(
        timestamp=iso_timestamp(service.clock),
        api=ApiPart(uptime=int(uptime), version=service.version, pid=os.getpid()),
        tasks=TasksPart(tasks.active_count),
        gpu=gpus.snapshot(),
        providers={name: "configured" if there else "not_configured" for name, there in providers.items()},
        system=SystemPart(machine.cpu, machine.memory, machine.disk),
        comfyui=ComfyUIPart([_backend(one) for one in workflows.dispatchers], _queue(workflows, service)),
        uptime=round(uptime, 3),
    )


def _backend(dispatcher: Dispatcher) -> BackendPart:
    backend = dispatcher.backend
    parts = urlsplit(backend.config.url)
    return BackendPart(
        name=dispatcher.name,
        url=parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl(),  # a password is nobody's business
        state=backend.state,
        version=None if backend.version == "unknown" else backend.version,
        queue_remaining=backend.queue_remaining,
        current_workflow=dispatcher.current,
    )


def _queue(workflows: WorkflowManager, service: ServiceInfo) -> QueuePart:
    counts = workflows.counts()
    oldest = counts.oldest_created_at
    return QueuePart(
        length=counts.length,
        running=counts.running,
        oldest_age_seconds=None if oldest is None else max(0, service.clock.now_ms() - oldest) / 1000,
        paused=counts.paused,
    )


status_routes = [status]
