"""What an operator switches: the queue as a whole, and each backend (CONTRACT 4). No rule lives here."""

from __future__ import annotations

from litestar import get, post
from litestar.di import NamedDependency
from litestar.params import FromPath
from msgspec import Struct

from managers.errors import NotFound
from managers.workflows import backends
from managers.workflows.backends import BackendView
from managers.workflows.manager import WorkflowManager
from routes.problems import documented, problems

PATH = "/v1/comfyui/backends"


class QueueReply(Struct, frozen=True, rename="camel"):
    """The queue after the change."""

    length: int
    running: int
    paused: bool


class BackendsReply(Struct, frozen=True, rename="camel"):
    """All backends, as configured."""

    backends: tuple[BackendView, ...]


_EXAMPLE = {
    "name": "local",
    "url": "http://127.0.0.1:8188",
    "state": "connected",
    "draining": False,
    "busy": True,
    "version": "0.3.64",
    "queueRemaining": 2,
    "waiting": 7,
    "currentWorkflow": "3f0c6f1e-4d3b-4d55-9f6a-0d6f2a3c9b11",
    "prefetchedWorkflow": None,
    "interruptsById": True,
    "connections": 1,
    "ghosts": 0,
    "stalledSince": None,
    "stallReason": None,
    "silentSeconds": 0.4,
}


@get(
    PATH,
    summary="List the backends",
    description="Each ComfyUI: whether it is there, what it does, whether it gets work.",
    tags=["queue"],
    opt=documented(reply={"backends": [_EXAMPLE]}),
)
async def list_backends(workflows: NamedDependency[WorkflowManager]) -> BackendsReply:
    """All of them."""
    return BackendsReply(await backends.listed(workflows))


@get(
    PATH + "/{name:str}",
    summary="Look at a backend",
    description="One ComfyUI, by its name in the configuration.",
    tags=["queue"],
    responses=problems(404),
    opt=documented(reply=_EXAMPLE),
)
async def get_backend(workflows: NamedDependency[WorkflowManager], name: FromPath[str]) -> BackendView:
    """One of them."""
    return await backends.one(workflows, name)


@post(
    PATH + "/{name:str}/drain",
    summary="Give a backend no more work",
    description=(
        "Also after a restart. What executes there runs on, what was only posted ahead is taken back. Work for any "
        "backend goes to the others, work for this one waits. When it is `busy` no more it can be switched off."
    ),
    tags=["queue"],
    status_code=200,
    responses=problems(404),
    opt=documented(reply=_EXAMPLE | {"draining": True}),
)
async def drain_backend(workflows: NamedDependency[WorkflowManager], name: FromPath[str]) -> BackendView:
    """No more."""
    return await backends.set_drained(workflows, name, True)


@post(
    PATH + "/{name:str}/resume",
    summary="Give a backend work again",
    description="Undoes `drain`.",
    tags=["queue"],
    status_code=200,
    responses=problems(404),
    opt=documented(reply=_EXAMPLE),
)
async def resume_backend(workflows: NamedDependency[WorkflowManager], name: FromPath[str]) -> BackendView:
    """Go."""
    return await backends.set_drained(workflows, name, False)


@post(
    "/v1/comfyui/queue/{action:str}",
    summary="Pause or resume the queue",
    description="`pause`: no more work is handed out, also after a restart; what runs goes on. `resume` undoes it.",
    tags=["queue"],
    status_code=200,
    responses=problems(404),
    opt=documented(reply={"length": 3, "running": 1, "paused": True}),
)
async def pause_queue(workflows: NamedDependency[WorkflowManager], action: FromPath[str]) -> QueueReply:
    """Stop or go."""
    if action not in ("pause", "resume"):
        raise NotFound("There is only queue/pause and queue/resume")
    counts = await workflows.set_paused(action == "pause")
    return QueueReply(counts.length, counts.running, counts.paused)


backend_routes = [list_backends, get_backend, drain_backend, resume_backend, pause_queue]
