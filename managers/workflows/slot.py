"""An attempt in a dispatcher's hand: hears it as its sink, writes down that it began, passes on what is live.

Must never claim, settle or decide: that is the dispatcher's. Nothing live is told before workflow:started is on disk.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from msgspec import Struct
from msgspec.structs import replace

from managers.clock import Clock
from managers.comfyui.attempt import AttemptRun
from managers.comfyui.backend import Backend, Signal
from managers.comfyui.preparing import Inputs
from managers.comfyui.tracker import GraphNode
from managers.comfyui.verdicts import Job
from managers.events.types import ImagesGenerated, LiveEvent, NodeEvent, Output, WorkflowProgress
from managers.workflows.forecast import Forecast, told
from managers.workflows.model import AttemptState, Claimed
from managers.workflows.store import WorkflowStore


class Publisher(Protocol):
    """Where live events go."""

    def publish(self, event: LiveEvent) -> None:
        """Never blocks."""
        ...


class Surroundings(Struct, frozen=True, kw_only=True):
    """What the slots of a dispatcher share. `live` is where the progress of what runs can be read.

    `note` stores something without waiting for it; `wake` says that there may be work to hand out.
    """

    backend: Backend
    store: WorkflowStore
    events: Publisher
    live: dict[str, WorkflowProgress]
    forecast: Forecast
    inputs: Inputs | None
    clock: Clock
    note: Callable[[Awaitable[object]], None]
    wake: Callable[[], None]


class Slot:
    """An attempt in hand. `cancelled`: its workflow is final, and ComfyUI is only to let go of it."""

    def __init__(
        self, claimed: Claimed, nodes: dict[str, GraphNode], surroundings: Surroundings, *, posted: bool
    ) -> None:
        self.claimed = claimed
        self.cancelled = False
        self.place = (claimed.workflow.rank, claimed.workflow.number)
        self._nodes = nodes
        self._around = surroundings
        self._held: list[LiveEvent] | None = None  # what came before workflow:started was on disk
        self._course = surroundings.forecast.begin(claimed, nodes, late=posted)
        self.run = self._new_run(posted=posted)

    def cancel(self) -> None:
        """Make ComfyUI let go of it."""
        self.cancelled = True
        self.run.tell(Signal.CANCEL)

    def renew(self) -> None:
        """Follow the same prompt with a fresh run."""
        self.run = self._new_run(posted=True)
        if self.cancelled:
            self.run.tell(Signal.CANCEL)

    def end(self, *, completed: bool) -> None:
        """The verdict is about to be written. After it there is no more progress; nodes that ran are still told."""
        self._course.end(self._around.clock.now_ms(), completed=completed)
        self._around.note(self._around.forecast.end(self.claimed, self._course))
        held, self._held = self._held, None
        for event in held or ():
            if not isinstance(event, WorkflowProgress):
                self._tell(event)

    # ---- the sink of its run

    def started(self, start_time: int) -> None:
        """Write the start, and see whether another may be posted ahead now."""
        self._held = []
        self._around.note(self._write_start(start_time))
        self._around.wake()

    def ended(self) -> None:
        """The next may go there while the verdict of this one is read and written."""
        self._around.wake()

    def produced(self, node_id: str, outputs: tuple[Output, ...]) -> None:
        """Tell of outputs as they appear; the verdict's list is the one that counts."""
        event = ImagesGenerated(
            timestamp=self._around.clock.now_ms(),
            workflow_id=self.claimed.workflow.id,
            node_id=node_id,
            outputs=outputs,
        )
        self._around.note(self._around.store.append(event, patient=True))

    def publish(self, event: LiveEvent) -> None:
        """Take the times of it, and pass it on."""
        if isinstance(event, NodeEvent):
            self._course.hear(event)
        elif isinstance(event, WorkflowProgress):
            eta = told(self._course.left(event.timestamp))
            if eta is not None:
                event = replace(event, eta_seconds=eta.seconds, eta_p90_seconds=eta.p90)
        self._tell(event)

    # ---- inside

    def _tell(self, event: LiveEvent) -> None:
        if self.cancelled:
            return
        if isinstance(event, WorkflowProgress):
            self._around.live[self.claimed.workflow.id] = event
        if self._held is not None:
            self._held.append(event)
            return
        self._around.events.publish(event)

    async def _write_start(self, start_time: int) -> None:
        """What is live is told after workflow:started, which waits for the disk."""
        try:
            await self._around.store.start(self.claimed.attempt.prompt_id, start_time)
        finally:
            held, self._held = self._held, None
            for event in held or ():
                self._tell(event)

    def _new_run(self, *, posted: bool) -> AttemptRun:
        claimed = self.claimed
        running = claimed.attempt.state is AttemptState.RUNNING
        job = Job(
            workflow_id=claimed.workflow.id,
            prompt_id=claimed.attempt.prompt_id,
            graph=claimed.graph,
            extra_data=claimed.extra_data,
            nodes=self._nodes,
            timeout_seconds=claimed.workflow.timeout_seconds,
            posted=posted,
            start_time=claimed.attempt.start_time if running else None,
        )
        return AttemptRun(self._around.backend, job, self, self._around.inputs)
