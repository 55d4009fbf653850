"""All that is measured of a running house, put into the registry and taken out again.

Must never be called to count: it listens to the hub, and reads snapshots when it is scraped.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry

from managers.clock import Clock
from managers.events.hub import Hub
from managers.workflows.manager import WorkflowManager
from managers.workflows.model import ANY_BACKEND
from metrics.gpus import GpuMetrics
from metrics.snapshots import Snapshots
from metrics.tasks import TaskMetrics
from metrics.workflows import WorkflowMetrics


class HouseMetrics:
    """Make it when the dispatchers are attached and before they run; `close` it when they have ended."""

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        workflows: WorkflowManager,
        hub: Hub,
        clock: Clock,
        active_tasks: Callable[[], int],
    ) -> None:
        self._registry = registry
        counted = WorkflowMetrics((ANY_BACKEND, *(dispatcher.name for dispatcher in workflows.dispatchers)))
        self._collectors = (
            counted,
            Snapshots(workflows, hub, clock),
            GpuMetrics(),
            TaskMetrics(active_tasks),
        )
        for collector in self._collectors:
            registry.register(collector)
        self._stop_listening = hub.listen(counted.hear)

    def close(self) -> None:
        """Hear no more and leave the registry as it was."""
        self._stop_listening()
        for collector in self._collectors:
            self._registry.unregister(collector)
