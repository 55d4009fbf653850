"""How long a backend stood idle while work waited for it: the price of standing between ComfyUI and its queue.

Must never guess: a gap is measured between two messages of one ComfyUI, its end of a prompt and its start of the
next, both by our clock. Where one of them was not heard, or work was held back on purpose, there is no gap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from msgspec import Struct
from prometheus_client import Histogram
from prometheus_client.metrics_core import Metric

from managers.events.types import BackendDisconnected, ComfyUIMessage, QueueStatus, WorkflowStarted

BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5)
_START = "comfyui:execution_start"
_ENDS = frozenset({"comfyui:execution_success", "comfyui:execution_error", "comfyui:execution_interrupted"})


_UNTOLD = 64
"""Starts kept until they are on disk. A run of milliseconds is followed by others before its own start is told."""


class _Begun(Struct, frozen=True):
    """A prompt that began `at`, on a backend that had been idle since `idle_since` (epoch ms)."""

    idle_since: int
    at: int


class DispatchGaps:
    """The state is one entry a backend and a few starts. Other people's prompts in ComfyUI look like idleness."""

    def __init__(self) -> None:
        self._gap = Histogram(
            "comfyui_dispatch_gap_seconds",
            "Time a backend was idle while the workflow it took next was waiting.",
            buckets=BUCKETS,
            registry=None,
        )
        self._idle_since: dict[str, int] = {}
        self._begun: dict[object, _Begun] = {}  # by workflow
        self.handlers: dict[type, Callable[[Any], None]] = {
            ComfyUIMessage: self._message,
            BackendDisconnected: self._disconnected,
            QueueStatus: self._queue,
        }

    def collect(self) -> Iterator[Metric]:
        """What was measured so far."""
        yield from self._gap.collect()

    def started(self, event: WorkflowStarted) -> None:
        """The start is on disk, and with it since when the workflow waited; a later attempt waited less than that."""
        begun = self._begun.pop(event.workflow_id, None)
        if begun is not None and event.created_at is not None and event.attempt == 1:
            self._gap.observe(max(0, begun.at - max(begun.idle_since, event.created_at)) / 1000)

    def _message(self, message: ComfyUIMessage) -> None:
        # The socket keeps the order; the stored events of two workflows may come the other way round, because the
        # end of the first is read from the history while the second, posted ahead, begins.
        if message.type in _ENDS:
            self._idle_since[message.backend] = message.timestamp
        elif message.type == _START:
            idle_since = self._idle_since.pop(message.backend, None)
            if idle_since is not None and isinstance(message.workflow_id, str):
                self._begun[message.workflow_id] = _Begun(idle_since, message.timestamp)
                if len(self._begun) > _UNTOLD:
                    del self._begun[next(iter(self._begun))]

    def _disconnected(self, event: BackendDisconnected) -> None:
        self._idle_since.pop(event.backend, None)

    def _queue(self, event: QueueStatus) -> None:
        if event.paused:
            self._idle_since.clear()
