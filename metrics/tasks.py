"""Tasks of the process manager (CONTRACT 7, 8), counted as they end.

Must never be called to count but by the manager's own word, nor take a label from a client: `task_type` is the name
of the provider, of which there are as many as are configured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from prometheus_client import Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from managers.processes.records import Task, TaskStatus

STATUSES = tuple(status.value for status in TaskStatus if status is not TaskStatus.RUNNING)
DURATION_BUCKETS = (1, 5, 10, 30, 60, 300, 600, 1800, 3600)


class Tasks(Protocol):
    """The process manager, as far as it is measured."""

    @property
    def active_count(self) -> int:
        """How many run now, from memory."""
        ...

    def listen(self, listener: Callable[[Task], None]) -> Callable[[], None]:
        """Hear of each task that ended, once; gives what ends the listening."""
        ...


class TaskMetrics:
    """A collector of the registry, and a listener (`hear`)."""

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks
        self._completed = Counter("completed_tasks_total", "Tasks that ended.", ("status",), registry=None)
        self._duration = Histogram(
            "task_duration_seconds",
            "How long tasks ran, by provider.",
            ("task_type", "status"),
            buckets=DURATION_BUCKETS,
            registry=None,
        )
        for status in STATUSES:
            self._completed.labels(status)

    def hear(self, task: Task) -> None:
        """Count one that ended. How long it ran is not known when nobody saw its end."""
        self._completed.labels(task.status.value).inc()
        if task.exit_time is not None:
            seconds = max(0, task.exit_time - task.start_time) / 1000
            self._duration.labels(task.provider, task.status.value).observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """What is known."""
        yield GaugeMetricFamily("active_tasks_total", "Tasks that run now.", self._tasks.active_count)
        yield from self._completed.collect()
        yield from self._duration.collect()

    describe = collect
