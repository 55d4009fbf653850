"""What the queue needs of those who know where outputs have gone: records and events told with links to them.

Must never know where that is. Without uploads there is nobody to ask, and everything is told as it is stored.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from managers.events.log import EventLog, StoredFrame
from managers.events.types import Output, StoredEvent
from managers.workflows.model import Workflow

BeforeComplete = Callable[[str, Sequence[Output]], Awaitable[None]]
"""A workflow's id and what it made: awaited before it is told complete. Has a time limit, and raises nothing."""


class Linking(Protocol):
    """Adds links to what is told; where there is none, nothing is changed."""

    async def linked(self, workflows: Sequence[Workflow]) -> Sequence[Workflow]:
        """Records as they are read. Raises `StoreUnavailable`."""
        ...

    def live(self, pairs: Sequence[tuple[StoredEvent, StoredFrame]]) -> Sequence[tuple[StoredEvent, StoredFrame]]:
        """What was just committed. At once, from memory."""
        ...

    async def link(self, workflow_id: str, n: int) -> str | None:
        """To one output; None: it was not uploaded, or there is no link now. Raises `StoreUnavailable`."""
        ...

    def log(self, source: EventLog) -> EventLog:
        """The log as clients read it."""
        ...
