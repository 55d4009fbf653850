"""How long nodes take, by class, from the live node events.

Must never let the number of labels grow with what clients send: the first `MAX_TYPES` classes get their own, all
others share one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import Histogram
from prometheus_client.metrics_core import Metric

from managers.events.types import NodeEvent, NodeExecuted, NodeExecuting

BUCKETS = (0.01, 0.1, 0.5, 1, 5, 10, 30, 60, 300)
MAX_TYPES = 200
OTHER = "other"
_MAX_WORKFLOWS = 256


class NodeTimes:
    """Nodes of the graph that ran. A node that expands into others is timed as a whole; cached ones are not timed."""

    def __init__(self) -> None:
        self._seconds = Histogram(
            "comfyui_node_duration_seconds",
            "Execution time of nodes.",
            ("node_type",),
            buckets=BUCKETS,
            registry=None,
        )
        self._types: set[str] = set()
        self._running: dict[object, dict[str, int]] = {}  # workflow -> node -> since (epoch ms)
        self.handlers: dict[type, Callable[[Any], None]] = {
            NodeExecuting: self._executing,
            NodeExecuted: self._executed,
        }

    def collect(self) -> Iterator[Metric]:
        """What was measured so far."""
        yield from self._seconds.collect()

    def forget(self, workflow_id: object) -> None:
        """Its attempt ended: what still seems to run does not."""
        self._running.pop(workflow_id, None)

    def _executing(self, event: NodeExecuting) -> None:
        if event.node_id != event.display_node_id:
            return
        nodes = self._running.get(event.workflow_id)
        if nodes is None:
            if len(self._running) >= _MAX_WORKFLOWS:
                # Only those are left over that said something after their end.
                del self._running[next(iter(self._running))]
            nodes = self._running[event.workflow_id] = {}
        nodes.setdefault(event.node_id, event.timestamp)

    def _executed(self, event: NodeExecuted) -> None:
        since = self._running.get(event.workflow_id, {}).pop(event.node_id, None)
        if since is not None:
            self._seconds.labels(self._label(event)).observe(max(0, event.timestamp - since) / 1000)

    def _label(self, event: NodeEvent) -> str:
        name = event.node_type
        if name is None:
            return OTHER
        if name not in self._types:
            if len(self._types) >= MAX_TYPES:
                return OTHER
            self._types.add(name)
        return name
