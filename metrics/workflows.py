"""Workflows, counted and timed from the events about them (CONTRACT 8).

Must never keep a workflow id, a prompt or a file name as a label, wait, or do I/O: `hear` runs on the loop, in the
middle of the work it counts. Counts are of this process and begin at 0 with it, as Prometheus expects of counters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, get_args

from prometheus_client import Counter, Histogram
from prometheus_client.metrics_core import Metric

from managers.events.types import (
    ErrorType,
    LiveEvent,
    StoredEvent,
    WorkflowCancelled,
    WorkflowCompleted,
    WorkflowError,
    WorkflowQueued,
    WorkflowStarted,
)
from managers.workflows.model import Priority
from metrics.etas import EtaJudge
from metrics.gaps import DispatchGaps
from metrics.nodes import NodeTimes

STATUSES = ("queued", "started", "completed", "failed", "cancelled")
DURATION_BUCKETS = (1, 5, 10, 30, 60, 120, 300, 600)
WAIT_BUCKETS = (0.01, 0.1, 1, 5, 10, 30, 60, 300, 600, 1800, 3600)
UNKNOWN = "unknown"


class WorkflowMetrics:
    """A listener of the hub (`hear`) and a collector of the registry (`collect`)."""

    def __init__(self, gpu_types: Iterable[str]) -> None:
        """`gpu_types` are the `gpu` values known in advance: they are there with 0 from the first scrape."""
        self._total = Counter(
            "comfyui_workflow_total", "Workflows by what became of them.", ("status",), registry=None
        )
        self._errors = Counter(
            "comfyui_workflow_errors_total", "Workflows that failed for good.", ("error_type",), registry=None
        )
        self._retries = Counter(
            "comfyui_retries_total", "Attempts that failed and are made again.", ("error_type",), registry=None
        )
        self._duration = Histogram(
            "comfyui_workflow_duration_seconds",
            "Execution time of completed workflows.",
            ("gpu_type",),
            buckets=DURATION_BUCKETS,
            registry=None,
        )
        self._wait = Histogram(
            "comfyui_workflow_queue_seconds",
            "From submission to the first start.",
            ("priority",),
            buckets=WAIT_BUCKETS,
            registry=None,
        )
        self._bytes = Counter(
            "comfyui_outputs_bytes_total", "Bytes of the files that completed workflows wrote.", registry=None
        )
        self._gaps = DispatchGaps()
        self._nodes = NodeTimes()
        self._etas = EtaJudge()
        for status in STATUSES:
            self._total.labels(status)
        for error_type in get_args(ErrorType):
            self._errors.labels(error_type)
            self._retries.labels(error_type)
        for priority in Priority:
            self._wait.labels(priority.value)
        for gpu_type in gpu_types:
            self._duration.labels(gpu_type)
        self._handlers: dict[type, Callable[[Any], None]] = {
            WorkflowQueued: self._queued,
            WorkflowStarted: self._started,
            WorkflowCompleted: self._completed,
            WorkflowCancelled: self._cancelled,
            WorkflowError: self._failed,
            **self._gaps.handlers,
            **self._nodes.handlers,
            **self._etas.handlers,
        }

    def hear(self, event: LiveEvent | StoredEvent) -> None:
        """Count one event; most kinds are none of our business."""
        handler = self._handlers.get(type(event))
        if handler is not None:
            handler(event)

    def collect(self) -> Iterator[Metric]:
        """What was counted so far."""
        for metric in (self._total, self._duration, self._errors, self._wait, self._retries, self._bytes):
            yield from metric.collect()
        yield from self._gaps.collect()
        yield from self._nodes.collect()
        yield from self._etas.collect()

    describe = collect

    # ---- one event

    def _queued(self, event: WorkflowQueued) -> None:
        if event.attempt == 0:
            self._total.labels("queued").inc()

    def _started(self, event: WorkflowStarted) -> None:
        self._gaps.started(event)
        if event.started_before:
            return
        self._total.labels("started").inc()
        if event.created_at is not None:
            # The start is ComfyUI's word, and a remote clock may be ahead: nothing starts after we were told of it.
            seconds = (min(event.start_time, event.timestamp) - event.created_at) / 1000
            self._wait.labels(event.priority or UNKNOWN).observe(max(0.0, seconds))

    def _completed(self, event: WorkflowCompleted) -> None:
        self._total.labels("completed").inc()
        self._duration.labels(event.gpu or UNKNOWN).observe(event.duration)
        if not event.outputs_reused:
            self._bytes.inc(sum(output.size or 0 for output in event.outputs))
        self._nodes.forget(event.workflow_id)
        self._etas.completed(event)

    def _cancelled(self, event: WorkflowCancelled) -> None:
        self._total.labels("cancelled").inc()
        self._nodes.forget(event.workflow_id)
        self._etas.forget(event.workflow_id)

    def _failed(self, event: WorkflowError) -> None:
        if event.will_retry:
            self._retries.labels(event.error_type).inc()
        else:
            self._total.labels("failed").inc()
            self._errors.labels(event.error_type).inc()
        self._nodes.forget(event.workflow_id)
        self._etas.forget(event.workflow_id)
