"""GPUs, and what workflows took of them (CONTRACT 8). Values come from NVML, or from what a ComfyUI tells.

Must never ask a driver or a ComfyUI during a scrape: whoever samples keeps a snapshot, and `collect` reads that. What
nobody knows has no value, and its name stands with HELP and TYPE alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from msgspec import UNSET
from prometheus_client import Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from managers.events.types import LiveEvent, StoredEvent, WorkflowCompleted
from managers.gpu import Gpu, GpuManager

VRAM_BUCKETS = tuple(gibibytes * 2**30 for gibibytes in (1, 2, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 80, 141))
ENERGY_BUCKETS = (10, 100, 500, 1000, 2500, 5000, 10_000, 25_000, 50_000, 100_000, 500_000, 1_000_000)

_GAUGES: tuple[tuple[str, str, Callable[[Gpu], float | None]], ...] = (
    ("comfyui_gpu_utilization", "Utilization in percent.", lambda gpu: gpu.utilization),
    ("comfyui_vram_usage_bytes", "VRAM in use.", lambda gpu: gpu.memory_used),
    ("comfyui_gpu_memory_total_bytes", "VRAM there is.", lambda gpu: gpu.memory_total),
    ("comfyui_gpu_temperature_celsius", "Temperature.", lambda gpu: gpu.temperature),
    ("comfyui_gpu_power_watts", "Power drawn now.", lambda gpu: gpu.power),
)


class GpuMetrics:
    """A listener of the hub (`hear`) and a collector of the registry (`collect`)."""

    def __init__(self, gpus: GpuManager) -> None:
        """`gpus` has the last samples."""
        self._gpus = gpus
        self._vram = Histogram(
            "comfyui_workflow_vram_peak_bytes",
            "Most VRAM in use while a workflow ran; of completed ones.",
            buckets=VRAM_BUCKETS,
            registry=None,
        )
        self._energy = Histogram(
            "comfyui_workflow_energy_joules",
            "Energy its GPUs drew while a workflow ran; of completed ones.",
            buckets=ENERGY_BUCKETS,
            registry=None,
        )

    def hear(self, event: LiveEvent | StoredEvent) -> None:
        """A workflow completed: what the event says is what was stored, of all its attempts."""
        if not isinstance(event, WorkflowCompleted) or event.cost is None:
            return
        cost = event.cost
        if cost.vram_peak_bytes is not UNSET:
            self._vram.observe(cost.vram_peak_bytes)
        if cost.energy_joules is not UNSET:
            self._energy.observe(cost.energy_joules)

    def collect(self) -> Iterator[Metric]:
        """The last samples, as far as they are fresh."""
        gpus = self._gpus.gpus()
        for name, told, read in _GAUGES:
            gauge = GaugeMetricFamily(name, told, labels=("gpu_id",))
            for gpu in gpus:
                value = read(gpu)
                if value is not None:
                    gauge.add_metric((gpu.gpu_id,), value)
            yield gauge
        energy = CounterMetricFamily(
            "comfyui_gpu_energy_joules", "Energy drawn since the driver was loaded.", labels=("gpu_id",)
        )
        info = GaugeMetricFamily("comfyui_gpu_info", "1; says which GPU it is.", labels=("gpu_id", "uuid", "name"))
        for gpu in gpus:
            info.add_metric((gpu.gpu_id, gpu.uuid or "", gpu.name or ""), 1)
            if gpu.energy is not None:
                energy.add_metric((gpu.gpu_id,), gpu.energy)
        yield energy
        yield info
        yield from self._vram.collect()
        yield from self._energy.collect()

    describe = collect
