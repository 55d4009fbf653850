"""How long everything will take: what was learnt, what runs now, and what waits, brought together.

Must never touch the way of a workflow in: what waits is looked at when somebody asks, a limited part of the line at
a time. What it learns is a hint: when it cannot be written, nobody is held up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Protocol

from managers.clock import Clock
from managers.comfyui.tracker import GraphNode
from managers.events.types import StoredEvent, WorkflowCancelled, WorkflowError, WorkflowStarted
from managers.workflows.course import Course, NodeTime
from managers.workflows.durations import Durations, Estimate
from managers.workflows.eta import Eta, Schedule, Shape, Worker, expected, schedule, shape_of
from managers.workflows.model import Claimed, Status, Workflow
from managers.workflows.store import WorkflowStore

WALK = 256
"""Workflows of the line that are looked at one by one."""
_FRESH_SECONDS = 0.5
_AT_ONCE = 25
_MAX_SHAPES = 1000


class Feeder(Protocol):
    """A dispatcher, as far as this needs it."""

    @property
    def name(self) -> str:
        """That of its backend."""
        ...

    @property
    def pools(self) -> Collection[str]:
        """What it takes work from."""
        ...

    def open(self) -> bool:
        """It is given work."""
        ...

    @property
    def current(self) -> str | None:
        """The workflow that executes."""
        ...


class Forecast:
    """What is known of the times of nodes, the courses of what runs, and the shapes of what waits."""

    def __init__(
        self, *, store: WorkflowStore, clock: Clock, describe: Callable[[bytes], dict[str, GraphNode]]
    ) -> None:
        """`open` it when the store is open, and `attach` the dispatchers."""
        self._store = store
        self._clock = clock
        self._describe = describe
        self._durations = Durations()
        self._feeders: Sequence[Feeder] = ()
        self._courses: dict[str, Course] = {}
        self._shapes: dict[str, Shape] = {}
        self._same: dict[tuple[object, ...], Shape] = {}
        self._takes: dict[tuple[Shape, str], Estimate | None] = {}
        self._schedule: Schedule | None = None
        self._scheduled_at = 0.0

    async def open(self) -> None:
        """Read what earlier runs have taught. Raises `StoreUnavailable`."""
        self._durations = Durations(await self._store.durations())

    def attach(self, feeders: Iterable[Feeder]) -> None:
        """Those who hand out work."""
        self._feeders = tuple(feeders)

    # ---- one run

    def begin(self, claimed: Claimed, nodes: Mapping[str, GraphNode], *, late: bool) -> Course:
        """An attempt is in hand. `late`: it was found open after a restart, so it may have begun unheard."""
        course = Course(nodes, claimed.attempt.backend, self._durations, late=late)
        self._courses[claimed.workflow.id] = course
        return course

    async def end(self, claimed: Claimed, course: Course) -> None:
        """Its last word was heard: learn from it, and write it down. Raises `StoreUnavailable`."""
        workflow_id, now = claimed.workflow.id, self._clock.now_ms()
        try:
            if times := course.times(now):
                kinds = {self._durations.learn(node, course.backend, seconds) for node, seconds in course.learnt()}
                dropped = self._durations.shrink()
                self._takes.clear()
                learnt = self._durations.rows(kinds, now)
                await self._store.keep_times(claimed.attempt.prompt_id, times, learnt, dropped)
        finally:
            if self._courses.get(workflow_id) is course:
                del self._courses[workflow_id]

    async def node_times(self, workflow: Workflow) -> Sequence[NodeTime]:
        """What is known of the nodes of its attempt."""
        if workflow.status is Status.QUEUED:
            return ()
        course = self._courses.get(workflow.id)
        return await self._store.node_times(workflow.id) if course is None else course.times(self._clock.now_ms())

    # ---- when

    def committed(self, event: StoredEvent) -> None:
        """What waits no more needs no shape."""
        ends = isinstance(event, WorkflowStarted | WorkflowCancelled | WorkflowError)
        if ends and isinstance(event.workflow_id, str):
            self._shapes.pop(event.workflow_id, None)

    async def prepare(self, workflows: Collection[Workflow]) -> None:
        """See that `eta` has what it needs to tell about these. Raises `StoreUnavailable`."""
        waiting = [workflow.id for workflow in workflows if workflow.status is Status.QUEUED]
        if not waiting or self._store.counts().paused:  # nobody can know then
            return
        if self._is_old():
            waiting += (entry.id for entry in self._store.first_in_line(WALK))
        missing = [workflow_id for workflow_id in dict.fromkeys(waiting) if workflow_id not in self._shapes]
        for start in range(0, len(missing), _AT_ONCE):
            graphs = await self._store.graphs(missing[start : start + _AT_ONCE])
            found = await asyncio.to_thread(self._shapes_of, graphs)
            self._shapes.update((workflow_id, self._shared(shape)) for workflow_id, shape in found.items())

    def eta(self, workflow: Workflow) -> Eta | None:
        """When it ends; None when nobody can know, and for what has ended."""
        if workflow.status is Status.RUNNING:
            course = self._courses.get(workflow.id)
            return None if course is None else told(course.left(self._clock.now_ms()))
        if workflow.status is not Status.QUEUED or self._store.counts().paused:
            return None
        planned = self._plan(workflow.id)
        if workflow.id in planned.ends:
            return told(planned.ends[workflow.id])
        position = self._store.position(workflow.id)
        start = None if position is None else planned.start(workflow.gpu, position)
        names = (
            each.name for each in self._feeders if workflow.gpu in each.pools and each.name not in workflow.unfit
        )
        own = next((found for name in names if (found := self._takes_at(workflow.id, name)) is not None), None)
        return None if start is None or own is None else told(start + own)

    def _is_old(self) -> bool:
        return self._schedule is None or self._clock.monotonic() - self._scheduled_at > _FRESH_SECONDS

    def _plan(self, workflow_id: str) -> Schedule:
        """The schedule of some moments ago, unless it knows nothing of this one and should."""
        planned = self._schedule
        if planned is None or self._is_old() or (planned.whole and workflow_id not in planned.ends):
            line = self._store.first_in_line(WALK)
            workers = [Worker(each.name, each.pools, self._left_at(each)) for each in self._feeders if each.open()]
            planned = self._schedule = schedule(line, workers, self._takes_at, whole=len(line) < WALK)
            self._scheduled_at = self._clock.monotonic()
        return planned

    def _left_at(self, feeder: Feeder) -> Estimate | None:
        course = None if feeder.current is None else self._courses.get(feeder.current)
        return Estimate() if course is None else course.left(self._clock.now_ms())

    def _takes_at(self, workflow_id: str, backend: str) -> Estimate | None:
        shape = self._shapes.get(workflow_id)
        if shape is None:
            return None
        key = (shape, backend)
        if key not in self._takes:
            self._takes[key] = expected(shape, backend, self._durations)
        return self._takes[key]

    def _shapes_of(self, graphs: Mapping[str, bytes]) -> dict[str, Shape]:
        return {workflow_id: shape_of(self._describe(graph)) for workflow_id, graph in graphs.items()}

    def _shared(self, shape: Shape) -> Shape:
        """Most workflows of a queue have the same few shapes."""
        if len(self._same) >= _MAX_SHAPES:
            self._same.clear()
        return self._same.setdefault(shape.items, shape)


def told(estimate: Estimate | None) -> Eta | None:
    """As it is told: to a tenth of a second."""
    return None if estimate is None else Eta(round(estimate.seconds, 1), round(estimate.p90, 1))
