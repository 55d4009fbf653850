"""How well the estimates hold: each completed workflow against what was told when it began.

Must never judge by a later estimate: those get better by themselves as the end comes nearer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import Counter
from prometheus_client.metrics_core import Metric

from managers.events.types import WorkflowCompleted, WorkflowProgress

WITHIN, BEYOND = "within_p90", "beyond_p90"
_MAX_WORKFLOWS = 256


class EtaJudge:
    """Keeps the estimate of each running workflow as it was before its first node began."""

    def __init__(self) -> None:
        self._total = Counter(
            "comfyui_eta_total",
            "Completed workflows by whether they took no longer than the 90 % estimate told when they began.",
            ("result",),
            registry=None,
        )
        for result in (WITHIN, BEYOND):
            self._total.labels(result)
        self._told: dict[object, float | None] = {}
        self.handlers: dict[type, Callable[[Any], None]] = {WorkflowProgress: self._progress}

    def collect(self) -> Iterator[Metric]:
        """What was judged so far."""
        yield from self._total.collect()

    def completed(self, event: WorkflowCompleted) -> None:
        """Judge it, where something was told. Estimates are told to a tenth of a second, and judged so."""
        p90 = self._told.pop(event.workflow_id, None)
        if p90 is not None:
            self._total.labels(WITHIN if round(event.duration, 1) <= p90 else BEYOND).inc()

    def forget(self, workflow_id: object) -> None:
        """Its attempt did not complete."""
        self._told.pop(workflow_id, None)

    def _progress(self, event: WorkflowProgress) -> None:
        # ComfyUI names what it has in its cache before the first node begins.
        if event.current_node_id is None:
            if len(self._told) >= _MAX_WORKFLOWS and event.workflow_id not in self._told:
                del self._told[next(iter(self._told))]
            self._told[event.workflow_id] = event.eta_p90_seconds
