"""What is known of graphics cards, as values; and the shapes in which it is told (CONTRACT 3, 6).

Must never guess: every field can be unknown on its own (STACK §4), and is None then.
"""

from __future__ import annotations

from msgspec import UNSET, Struct, UnsetType

from managers.events.types import GpuView, MemoryView

MIB = 2**20


class GpuProcess(Struct, frozen=True, kw_only=True):
    """A process that has a context on a card. `memory` in bytes; `backend` is the ComfyUI it is known to be."""

    pid: int
    memory: int | None = None
    backend: str | None = None


class Gpu(Struct, frozen=True, kw_only=True):
    """One card, or one instance of a card that is split by MIG, at one moment.

    `gpu_id` is `<index>` here, `<index>.<n>` for the n-th instance, `<backend>:<n>` for a card that only a ComfyUI
    tells of. Utilization in percent, memory in bytes, temperature in °C, power in watts; `energy` in joules since
    the driver was loaded. `split`: its memory and processes are those of its instances, which stand beside it.
    """

    gpu_id: str
    index: int
    uuid: str | None = None
    name: str | None = None
    utilization: float | None = None
    memory_used: int | None = None
    memory_total: int | None = None
    temperature: float | None = None
    power: float | None = None
    energy: float | None = None
    processes: tuple[GpuProcess, ...] | None = None
    backend: str | None = None
    split: bool = False


class Sample(Struct, frozen=True, kw_only=True):
    """What the driver said `at` a moment (seconds of the monotonic clock). `error`: why there is nothing, or less."""

    at: float
    gpus: tuple[Gpu, ...] = ()
    error: str | None = None


class GpuStatus(Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """All cards of which something is known now. `error`: what keeps the driver from telling."""

    available: bool
    gpus: tuple[GpuView, ...]
    error: str | UnsetType = UNSET


def view(gpu: Gpu) -> GpuView:
    """As clients see it."""
    memory = None
    if gpu.memory_used is not None and gpu.memory_total:
        memory = MemoryView(
            used=round(gpu.memory_used / MIB),
            total=round(gpu.memory_total / MIB),
            percent_used=round(100 * gpu.memory_used / gpu.memory_total, 1),
        )
    return GpuView(
        gpu_id=gpu.gpu_id,
        index=gpu.index,
        uuid=gpu.uuid,
        name=gpu.name,
        utilization=gpu.utilization,
        memory=memory,
        temperature=gpu.temperature,
        power_watts=UNSET if gpu.power is None else round(gpu.power, 1),
        backend=UNSET if gpu.backend is None else gpu.backend,
    )
