"""Tasks of the process manager (CONTRACT 7, 8). There are none yet: the names are here, and stay.

Must never be called to count: when tasks come, their events are heard as those of workflows are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

STATUSES = ("completed", "failed", "stopped")
DURATION_BUCKETS = (1, 5, 10, 30, 60, 300, 600, 1800, 3600)


class TaskMetrics:
    """A collector of the registry."""

    def __init__(self, active: Callable[[], int]) -> None:
        """`active` tells from memory how many run now."""
        self._active = active
        self._completed = Counter("completed_tasks_total", "Tasks that ended.", ("status",), registry=None)
        self._duration = Histogram(
            "task_duration_seconds",
            "How long tasks ran.",
            ("task_type", "status"),
            buckets=DURATION_BUCKETS,
            registry=None,
        )
        for status in STATUSES:
            self._completed.labels(status)

    def collect(self) -> Iterator[Metric]:
        """What is known."""
        yield GaugeMetricFamily("active_tasks_total", "Tasks that run now.", self._active())
        yield from self._completed.collect()
        yield from self._duration.collect()

    describe = collect
