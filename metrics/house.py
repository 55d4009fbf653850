"""All that is measured of a running house, put into the registry and taken out again.

Must never be called to count: it listens to the hub, and reads snapshots when it is scraped.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from managers.clock import Clock
from managers.delivery.office import Deliveries
from managers.events.hub import Hub
from managers.gpu import GpuManager
from managers.system import DiskWatch
from managers.workflows.manager import WorkflowManager
from managers.workflows.model import ANY_BACKEND
from metrics.deliveries import DeliveryMetrics
from metrics.disks import DiskMetrics
from metrics.gpus import GpuMetrics
from metrics.snapshots import Snapshots
from metrics.tasks import TaskMetrics, Tasks
from metrics.workflows import WorkflowMetrics


class HouseMetrics:
    """Make it when the dispatchers are attached and before they run; `close` it when they have ended."""

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        workflows: WorkflowManager,
        hub: Hub,
        gpus: GpuManager,
        clock: Clock,
        tasks: Tasks,
        disks: DiskWatch,
        deliveries: Deliveries,
    ) -> None:
        self._registry = registry
        counted = WorkflowMetrics((ANY_BACKEND, *(dispatcher.name for dispatcher in workflows.dispatchers)))
        counted_tasks = TaskMetrics(tasks)
        cards = GpuMetrics(gpus)
        self._collectors = (
            counted,
            Snapshots(workflows, hub, clock),
            cards,
            counted_tasks,
            DiskMetrics(disks),
            DeliveryMetrics(deliveries),
        )
        for collector in self._collectors:
            registry.register(collector)
        self._stop_listening = (
            hub.listen(counted.hear),
            hub.listen(cards.hear),
            tasks.listen(counted_tasks.hear),
        )

    def close(self) -> None:
        """Hear no more and leave the registry as it was."""
        for stop in self._stop_listening:
            stop()
        for collector in self._collectors:
            self._registry.unregister(collector)
