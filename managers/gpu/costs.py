"""Which workflow executes on which ComfyUI, and what it costs so far.

Must never keep more than one run a backend, and the ends of the last few hundred.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from msgspec import Struct

from managers.events.types import Cost
from managers.gpu.cost import Meter, Part

_KEPT = 512


class _Run(Struct, frozen=True):
    """`meter` is None when its beginning was not seen: its cost will never be known."""

    workflow_id: str
    meter: Meter | None


class Costs:
    """The books. All times are seconds of the monotonic clock."""

    def __init__(self) -> None:
        self._runs: dict[str, _Run] = {}  # by backend
        self._ended: dict[str, Cost | None] = {}

    @property
    def backends(self) -> Collection[str]:
        """Those on which a workflow executes."""
        return self._runs.keys()

    def begin(self, backend: str, workflow_id: str, at: float) -> None:
        """ComfyUI took it up. What ran there before has ended, whether we heard it or not."""
        self._end(backend, at)
        self._ended.pop(workflow_id, None)
        self._runs[backend] = _Run(workflow_id, Meter(at))

    def join(self, backend: str, workflow_id: str, at: float) -> bool:
        """It runs, and may have begun unseen: before a restart of ours, or while the socket was down. Whether new."""
        known = self._runs.get(backend)
        if workflow_id in self._ended or (known is not None and known.workflow_id == workflow_id):
            return False
        self._end(backend, at)
        self._runs[backend] = _Run(workflow_id, None)
        return True

    def end(self, workflow_id: str, at: float) -> None:
        """ComfyUI ended it, or the verdict is stored; the first of these counts."""
        for backend in [name for name, run in self._runs.items() if run.workflow_id == workflow_id]:
            self._end(backend, at)

    def forget(self, workflow_id: str) -> None:
        """Another attempt will come, and what it takes is told anew, also when its beginning is not seen."""
        self._ended.pop(workflow_id, None)

    def feed(self, backend: str, at: float, parts: Sequence[Part]) -> None:
        """A sample of the cards of a backend."""
        run = self._runs.get(backend)
        if run is not None and run.meter is not None:
            run.meter.feed(at, parts)

    def cost_of(self, workflow_id: str, now: float) -> Cost | None:
        """Of its last attempt: as it ended, or so far. None: nothing is known."""
        for run in self._runs.values():
            if run.workflow_id == workflow_id:
                return None if run.meter is None else run.meter.cost(now)
        return self._ended.get(workflow_id)

    def _end(self, backend: str, at: float) -> None:
        run = self._runs.pop(backend, None)
        if run is None:
            return
        if len(self._ended) >= _KEPT:
            del self._ended[next(iter(self._ended))]
        self._ended[run.workflow_id] = None if run.meter is None else run.meter.cost(at)
