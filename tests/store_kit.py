"""A store in a test: with its clock, its ids, what it announced, and short ways to put it in a state."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from managers.clock import Clock, IdMaker
from managers.events.log import StoredFrame
from managers.events.types import Output, StoredEvent
from managers.workflows.model import (
    AttemptState,
    Claimed,
    NewWorkflow,
    Outcome,
    Priority,
    Status,
    Workflow,
    rank,
)
from managers.workflows.store import WorkflowStore

AGING_SECONDS = 600
GRAPH = b'{"1":{"class_type":"EmptyImage","inputs":{"width":64,"height":64}},"2":{"class_type":"SaveImage"}}'


class ManualClock:
    """Time that the test owns."""

    def __init__(self, now_ms: int = 1_700_000_000_000) -> None:
        self.now = now_ms

    def now_ms(self) -> int:
        return self.now

    def monotonic(self) -> float:
        return self.now / 1000


def numbered_ids() -> IdMaker:
    numbers = iter(range(1, 10**9))
    return lambda: str(uuid.UUID(int=next(numbers)))


class Kit:
    """A store with its clock, its ids and what it announced; and short ways to put it in a state."""

    def __init__(self, make: Callable[[Clock, IdMaker, int], WorkflowStore]) -> None:
        self.clock = ManualClock()
        self.ids = numbered_ids()
        self.heard: list[tuple[StoredEvent, StoredFrame]] = []
        self._make = make
        self.store = make(self.clock, self.ids, AGING_SECONDS)

    async def open(self) -> None:
        await self.store.open(self.heard.extend)

    async def reopen(self, aging_seconds: int = AGING_SECONDS) -> None:
        await self.store.close()
        self.store = self._make(self.clock, self.ids, aging_seconds)
        await self.open()

    def new(self, priority: Priority = Priority.NORMAL, **changes: Any) -> NewWorkflow:
        self.clock.now += 1
        new = NewWorkflow(
            id=self.ids(),
            graph=GRAPH,
            priority=priority,
            gpu="local",
            rank=rank(priority, self.clock.now, AGING_SECONDS),
            created_at=self.clock.now,
            max_attempts=3,
            timeout_seconds=60.0,
            node_total=2,
        )
        return msgspec.structs.replace(new, **changes)

    async def submit(self, priority: Priority = Priority.NORMAL, **changes: Any) -> Workflow:
        return (await self.store.submit(self.new(priority, **changes))).workflow

    async def claim(
        self, prompt_id: str | None = None, backend: str = "a", pools: Sequence[str] = ("local",)
    ) -> Claimed:
        claimed = await self.store.claim(
            backend=backend, pools=pools, prompt_id=prompt_id or self.ids(), now=self.clock.now
        )
        assert claimed is not None
        return claimed

    async def running(self) -> tuple[Workflow, str]:
        await self.submit()
        claimed = await self.claim()
        workflow = await self.store.start(claimed.attempt.prompt_id, self.clock.now)
        assert workflow is not None
        return workflow, claimed.attempt.prompt_id

    def outcome(self, status: Status = Status.COMPLETED, **changes: Any) -> Outcome:
        outcome = Outcome(status=status, start_time=self.clock.now, completion_time=self.clock.now + 2500)
        return msgspec.structs.replace(outcome, **changes)

    def told(self, workflow_id: str | None = None) -> list[str]:
        """The types of what was announced."""
        return [frame.type for _, frame in self.heard if workflow_id in (None, frame.workflow_id)]

    async def states(self, workflow_id: str) -> list[tuple[int, AttemptState]]:
        return [(one.number, one.state) for one in await self.store.attempts(workflow_id)]


def image(name: str, **changes: Any) -> Output:
    output = Output(kind="image", node_id="2", filename=name, subfolder="", type="output", size=7)
    return msgspec.structs.replace(output, **changes)
