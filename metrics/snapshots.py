"""What is the case at the moment of a scrape: the queue, the backends, the stream (CONTRACT 8).

Must never wait, lock, or do I/O: everything read here lies in memory, and the loop that owns it is the caller.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from managers.clock import Clock
from managers.comfyui.watchdog import StallReason
from managers.events.hub import Hub
from managers.workflows.manager import WorkflowManager


class Snapshots:
    """A collector of the registry."""

    def __init__(self, workflows: WorkflowManager, hub: Hub, clock: Clock) -> None:
        self._workflows = workflows
        self._hub = hub
        self._clock = clock

    def collect(self) -> Iterator[Metric]:
        """As it is now."""
        yield from self._queue()
        yield from self._backends()
        yield GaugeMetricFamily("comfyui_stream_clients", "Clients that listen to the stream.", self._hub.clients)
        yield CounterMetricFamily(
            "comfyui_stream_dropped",
            "Frames a slow client did not get: merged with a later one, or dropped.",
            self._hub.dropped,
        )

    describe = collect

    def _queue(self) -> Iterator[Metric]:
        counts = self._workflows.counts()
        yield GaugeMetricFamily("comfyui_queue_length", "Workflows that wait.", counts.length)
        depth = GaugeMetricFamily("comfyui_queue_depth", "Workflows that wait, by class.", labels=("priority",))
        for priority, waiting in counts.waiting.items():
            depth.add_metric((priority.value,), waiting)
        yield depth
        oldest = counts.oldest_created_at
        age = 0.0 if oldest is None else max(0, self._clock.now_ms() - oldest) / 1000
        yield GaugeMetricFamily("comfyui_queue_oldest_seconds", "Age of the oldest workflow that waits.", age)

    def _backends(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("comfyui_backend_up", "1 while ComfyUI's socket is connected.", labels=("backend",))
        busy = GaugeMetricFamily(
            "comfyui_backend_busy", "1 while a workflow of ours is in this ComfyUI.", labels=("backend",)
        )
        stalled = GaugeMetricFamily(
            "comfyui_backend_stalled",
            "1 while ComfyUI's worker is proven not to work, until a probe has run.",
            labels=("backend",),
        )
        stalls = CounterMetricFamily(
            "comfyui_backend_stalls", "How often that was proven, and how.", labels=("backend", "reason")
        )
        silent = GaugeMetricFamily(
            "comfyui_backend_silent_seconds",
            "Time since the last word about the running prompt.",
            labels=("backend",),
        )
        for dispatcher in self._workflows.dispatchers:
            backend, name = dispatcher.backend, dispatcher.name
            up.add_metric((name,), float(backend.up))
            busy.add_metric((name,), float(dispatcher.busy))
            stalled.add_metric((name,), float(backend.watchdog.stall is not None))
            silent.add_metric((name,), backend.silent_seconds)
            for reason in StallReason:
                stalls.add_metric((name, reason.value), backend.watchdog.stalls[reason])
        yield up
        yield busy
        yield stalled
        yield stalls
        yield silent
