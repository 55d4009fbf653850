"""The backends as an operator sees them, and whether they are to get work (CONTRACT 3, 4).

Must never judge a backend: it tells what the connection to it knows. A drained one stays drained over a restart.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from urllib.parse import urlsplit, urlunsplit

from msgspec import Struct

from managers.comfyui.backend import BackendState
from managers.errors import Draining, NotFound
from managers.workflows.dispatcher import Dispatcher
from managers.workflows.manager import WorkflowManager
from managers.workflows.model import Claimed


class BackendView(Struct, frozen=True, kw_only=True, rename="camel"):
    """One ComfyUI.

    `queue_remaining` is ComfyUI's own number, with what others have in there; `waiting` is how many workflows wait
    for this one by its name. `prefetched_workflow` is posted and does not execute yet. `busy`: something of ours is
    in it, so a drained one that is not busy can be switched off. `ghosts` are prompts of ours that were removed
    because nobody waited for them any more. `stalled_since` is epoch ms; `silent_seconds` is how long what executes
    has shown nothing.
    """

    name: str
    url: str
    state: BackendState
    draining: bool
    busy: bool
    version: str | None
    queue_remaining: int | None
    waiting: int
    current_workflow: str | None
    prefetched_workflow: str | None
    interrupts_by_id: bool
    connections: int
    ghosts: int
    stalled_since: int | None
    stall_reason: str | None
    silent_seconds: float | None


async def listed(workflows: WorkflowManager) -> tuple[BackendView, ...]:
    """All of them, as configured."""
    attempts = await workflows.store.open_attempts()
    return tuple(_view(workflows, dispatcher, attempts) for dispatcher in workflows.dispatchers)


async def one(workflows: WorkflowManager, name: str) -> BackendView:
    """The one of this name. Raises `NotFound`, which lists the names."""
    dispatcher = _named(workflows, name)
    return _view(workflows, dispatcher, await workflows.store.open_attempts(name))


async def set_drained(workflows: WorkflowManager, name: str, drained: bool) -> BackendView:
    """Give it no more work, or work again. What executes runs on, what was only posted ahead is taken back.

    Raises `NotFound`, and `Draining` where work would be given out while the service stops.
    """
    dispatcher = _named(workflows, name)
    if workflows.draining and not drained:
        raise Draining("The service is about to stop and gives out no work")
    await workflows.store.set_drained(name, drained)
    if drained:
        dispatcher.drain()
    else:
        dispatcher.resume()
    for each in workflows.dispatchers:
        each.wake()
    return await one(workflows, name)


def _named(workflows: WorkflowManager, name: str) -> Dispatcher:
    known = {dispatcher.name: dispatcher for dispatcher in workflows.dispatchers}
    if name not in known:
        raise NotFound(f"There is no backend named {name[:64]!r}; known: {', '.join(known)}")
    return known[name]


def _view(workflows: WorkflowManager, dispatcher: Dispatcher, attempts: Sequence[Claimed]) -> BackendView:
    backend, current = dispatcher.backend, dispatcher.current
    there = [
        claimed.workflow.id
        for claimed in attempts
        if claimed.attempt.backend == dispatcher.name and not claimed.workflow.final
    ]
    return BackendView(
        name=dispatcher.name,
        url=_without_user(backend.config.url),
        state=backend.state,
        draining=dispatcher.draining,
        busy=dispatcher.busy,
        version=None if backend.version == "unknown" else backend.version,
        queue_remaining=backend.queue_remaining,
        waiting=workflows.store.ahead(dispatcher.name, sys.maxsize),
        current_workflow=current,
        prefetched_workflow=next((workflow_id for workflow_id in there if workflow_id != current), None),
        interrupts_by_id=backend.interrupts_by_id,
        connections=backend.connections,
        ghosts=backend.ghosts,
        stalled_since=backend.stalled_since,
        stall_reason=None if backend.watchdog.stall is None else backend.watchdog.stall.words,
        silent_seconds=None if backend.watchdog.executing is None else round(backend.silent_seconds, 3),
    )


def _without_user(url: str) -> str:
    """Addresses may carry `user:password@`, which is nobody's business."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
