"""How long nodes take, by class, from the live node events.

Must never let the number of labels grow with what clients send: the first `MAX_TYPES` classes get their own, all
others share one. Nor make everything anew for each scrape: 200 classes are 2,400 samples, and few have changed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

from managers.events.types import NodeExecuted, NodeExecuting
from metrics.registry import Written, lines

BUCKETS = (0.01, 0.1, 0.5, 1, 5, 10, 30, 60, 300)
MAX_TYPES = 200
OTHER = "other"
_MAX_WORKFLOWS = 256
_NAME = "comfyui_node_duration_seconds"
_ENDS = (*(str(float(bound)) for bound in BUCKETS), "+Inf")


class _Class:
    """The durations of one class of node, in seconds."""

    def __init__(self, node_type: str) -> None:
        self._labels = {"node_type": node_type}
        self._counts = [0] * (len(BUCKETS) + 1)  # not cumulative; the last one is for what is longer
        self._sum = 0.0
        self._seen = self._written = 0
        self._lines = b""

    def observe(self, seconds: float) -> None:
        """One more."""
        self._counts[bisect_left(BUCKETS, seconds)] += 1
        self._sum += seconds
        self._seen += 1

    def lines(self) -> bytes:
        """Its part of the histogram as text, made again only when something was observed. May run in a thread."""
        seen = self._seen
        if seen != self._written:
            cumulative = list(accumulate(self._counts))
            samples = [
                Sample(f"{_NAME}_bucket", {**self._labels, "le": end}, float(count))
                for end, count in zip(_ENDS, cumulative, strict=True)
            ]
            samples.append(Sample(f"{_NAME}_count", self._labels, float(cumulative[-1])))
            samples.append(Sample(f"{_NAME}_sum", self._labels, self._sum))
            self._lines, self._written = lines(samples), seen
        return self._lines


class NodeTimes:
    """Nodes of the graph that ran. A node that expands into others is timed as a whole; cached ones are not timed."""

    def __init__(self) -> None:
        self._classes: dict[str, _Class] = {}
        self._running: dict[object, dict[str, int]] = {}  # workflow -> node -> since (epoch ms)
        self.handlers: dict[type, Callable[[Any], None]] = {
            NodeExecuting: self._executing,
            NodeExecuted: self._executed,
        }

    def collect(self) -> Iterator[Metric]:
        """What was measured so far."""
        classes = list(self._classes.values())
        yield Written(
            _NAME, "Execution time of nodes.", "histogram", lambda: b"".join(one.lines() for one in classes)
        )

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
            self._of(event.node_type).observe(max(0, event.timestamp - since) / 1000)

    def _of(self, node_type: str | None) -> _Class:
        name = node_type or OTHER
        found = self._classes.get(name)
        if found is None:
            if len(self._classes) >= MAX_TYPES:
                name = OTHER
            found = self._classes.setdefault(name, _Class(name))
        return found
