"""How much room is left where the service and ComfyUI write.

Must never ask a disk: it reads what `DiskWatch` saw last.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from managers.system import DiskWatch


class DiskMetrics:
    """A collector of the registry."""

    def __init__(self, disks: DiskWatch) -> None:
        self._disks = disks

    def collect(self) -> Iterator[Metric]:
        """As last seen."""
        free = GaugeMetricFamily("comfyui_disk_free_bytes", "Bytes that may still be written.", labels=("volume",))
        size = GaugeMetricFamily("comfyui_disk_size_bytes", "Bytes of the file system.", labels=("volume",))
        for name, volume in self._disks.volumes.items():
            free.add_metric((name,), volume.free)
            size.add_metric((name,), volume.size)
        yield free
        yield size

    describe = collect
