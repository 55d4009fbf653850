"""GPUs: the two kept names (CONTRACT 8). Their values come from NVML, or from ComfyUI's /system_stats.

Must never ask a driver or a ComfyUI during a scrape: whoever samples keeps a snapshot, and `collect` reads that.
Nobody samples yet, so there are no values: absent when nobody knows, with HELP and TYPE in their place.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric


class GpuMetrics:
    """A collector of the registry. `gpu_id` is the index of a local GPU, `<backend>:<n>` of a remote one."""

    def collect(self) -> Iterator[Metric]:
        """Here the last sample goes in: `add_metric((gpu_id,), value)` for each GPU whose value is known."""
        yield GaugeMetricFamily("comfyui_gpu_utilization", "Utilization in percent.", labels=("gpu_id",))
        yield GaugeMetricFamily("comfyui_vram_usage_bytes", "VRAM in use.", labels=("gpu_id",))

    describe = collect
