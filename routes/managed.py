"""ComfyUI as a program of this service: restart it, follow its log. No rule lives here."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from litestar import Request, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath
from litestar.response import Stream
from msgspec import Struct

from managers.errors import Conflict, NotFound
from managers.processes.comfyui import ManagedComfyUI, ManagedView
from managers.processes.following import Gap
from managers.workflows.manager import WorkflowManager
from routes.access import caller_of
from routes.loglines import gap_event, line_events, offset_in
from routes.problems import documented, problems
from routes.sse import SseEvent, sse

PATH = "/v1/comfyui/backends/{name:str}"


class Managed(Struct, frozen=True):
    """The ComfyUI that this service starts (`COMFY_AUTOSTART`); None: it starts none."""

    comfyui: ManagedComfyUI | None = None

    def drain(self) -> None:
        """Send away who follows its log."""
        if self.comfyui is not None:
            self.comfyui.drain()

    def named(self, name: str, workflows: WorkflowManager) -> ManagedComfyUI:
        """The one of this name. Raises `NotFound`, and `Conflict` for a backend that is not started by us."""
        if self.comfyui is not None and self.comfyui.name == name:
            return self.comfyui
        known = [dispatcher.name for dispatcher in workflows.dispatchers]
        if name not in known:
            raise NotFound(f"There is no backend named {name[:64]!r}; known: {', '.join(known)}")
        raise Conflict(f"The ComfyUI of {name} is not started by this service (COMFY_AUTOSTART)", "unmanaged")


@post(
    PATH + "/restart",
    summary="Restart a ComfyUI that this service started",
    description=(
        "It is told to end (SIGTERM, SIGKILL 10 s later) and started again. What executes there is lost and gets "
        "another attempt. 409 for one that was started elsewhere."
    ),
    tags=["queue"],
    status_code=202,
    responses=problems(404, 409),
    opt=documented(
        reply={
            "name": "local",
            "state": "restarting",
            "deaths": 0,
            "logFile": "/var/lib/comfyui-management-api/comfyui/local/output.log",
        }
    ),
)
async def restart_backend(
    managed: NamedDependency[Managed], workflows: NamedDependency[WorkflowManager], name: FromPath[str]
) -> ManagedView:
    """Restart."""
    return await managed.named(name, workflows).restart()


@get(
    PATH + "/logs/stream",
    summary="Follow the log of a ComfyUI that this service started",
    description=(
        "Server-sent events: each whole line once, from the last 50 on, over all its restarts; `id:` is the place in "
        "bytes, and `Last-Event-ID` goes on from there. 409 for one that was started elsewhere."
    ),
    tags=["queue"],
    media_type="text/event-stream",
    responses=problems(404, 409),
    opt=documented(reply='id: 10472\ndata: {"line":"To see the GUI go to: …","timestamp":1795349868012}\n\n'),
)
async def stream_backend_log(
    request: Request[Any, Any, Any],
    managed: NamedDependency[Managed],
    workflows: NamedDependency[WorkflowManager],
    name: FromPath[str],
) -> Stream:
    """Its output as it comes."""
    comfyui = managed.named(name, workflows)
    return sse(_events(comfyui, offset_in(request)), welcome=caller_of(request).welcome)


async def _events(comfyui: ManagedComfyUI, after: int | None) -> AsyncGenerator[SseEvent, None]:
    async with aclosing(comfyui.follow(after)) as told:
        async for one in told:
            yield gap_event(one) if isinstance(one, Gap) else line_events(one)


managed_routes = [restart_backend, stream_backend_log]
