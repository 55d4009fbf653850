"""Tasks over HTTP (CONTRACT 7). No rule lives here: decode, call `ProcessManager`, encode."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, Literal

import msgspec
from litestar import Request, delete, get, post
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromPath, QueryParameter
from litestar.response import Stream
from msgspec import Meta, Struct

from managers.errors import NotFound
from managers.processes.following import Gap
from managers.processes.manager import Order, ProcessManager
from managers.processes.providers import DEFAULT
from managers.processes.records import Task, TaskStatus
from routes.access import caller_of
from routes.bodies import read_json
from routes.ids import UUID
from routes.loglines import gap_event, line_events, offset_in
from routes.problems import documented, problems
from routes.sse import SseEvent, sse

PATH = "/v1/tasks"


class TaskRequest(Struct, frozen=True, kw_only=True):
    """What POST /v1/tasks takes. A whole command line has its limit, which `task` shares."""

    agent: Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f]+$(?![\s\S])")]
    task: Annotated[str, Meta(min_length=1, max_length=30_000, pattern=r"^[^\x00]+$")]
    provider: Annotated[str, Meta(min_length=1, max_length=64)] = DEFAULT


class TaskAccepted(Struct, frozen=True, kw_only=True, rename="camel"):
    """202: the program was started."""

    task_id: str
    status: Literal["accepted"]
    message: str
    task_dir: str
    log_file: str


class TaskItem(Struct, frozen=True, kw_only=True, rename="camel"):
    """A task in a list. `startTime` in epoch ms, `duration` in ms; null when nobody saw its end."""

    task_id: str
    agent: str
    task: str
    provider: str
    status: TaskStatus
    start_time: int
    duration: int | None


class TaskList(Struct, frozen=True, rename="camel"):
    """The newest first. `count` is how many are here."""

    active_tasks: list[TaskItem]
    count: int


class TaskReply(Struct, frozen=True, kw_only=True, rename="camel"):
    """One task. Times in epoch ms, `duration` in ms. `exitCode` is null while it runs, and when a signal ended it."""

    task_id: str
    agent: str
    task: str
    provider: str
    status: TaskStatus
    start_time: int
    exit_time: int | None
    exit_code: int | None
    duration: int | None
    log_tail: str
    error: str | None
    task_dir: str
    log_file: str
    submitted_by: str | None


class TaskStopped(Struct, frozen=True, rename="camel"):
    """It is stopped, and stays so."""

    task_id: str
    status: TaskStatus
    message: str


_decoder = msgspec.json.Decoder(TaskRequest)

_ID = "0198c6f1-4d3b-7d55-9f6a-0d6f2a3c9b11"
_DIR = f"/var/lib/comfyui-management-api/tasks/{_ID}"
_ITEM = {
    "taskId": _ID,
    "agent": "coder",
    "task": "Write a hello world in Python",
    "provider": "claude-flow",
    "status": "running",
    "startTime": 1795349867341,
    "duration": 8126,
}
_TASK = _ITEM | {
    "exitTime": None,
    "exitCode": None,
    "logTail": "Reading the folder\nWriting hello.py",
    "error": None,
    "taskDir": f"{_DIR}/work",
    "logFile": f"{_DIR}/output.log",
    "submittedBy": "admin",
}
_LINES = (
    'id: 19\ndata: {"line":"Reading the folder","timestamp":1795349868012}\n\n'
    'event: task-complete\nid: 36\ndata: {"taskId":"' + _ID + '","status":"completed","exitCode":0}\n\n'
)


@post(
    PATH,
    summary="Start a task",
    description=(
        "Runs the program of a provider: a command from the configuration, in which `agent` and `task` take their "
        "places. 400 for an unknown provider, 503 when its program is not installed or as many run as it may have. "
        "It goes on when the service is restarted."
    ),
    tags=["tasks"],
    status_code=202,
    responses={
        202: ResponseSpec(TaskAccepted, description="It was started.", generate_examples=False),
        **problems(400, 413, 415, 503),
    },
    opt=documented(
        body=TaskRequest,
        request={"agent": "coder", "task": "Write a hello world in Python", "provider": "claude-flow"},
        reply={
            "taskId": _ID,
            "status": "accepted",
            "message": "Started with claude-flow",
            "taskDir": f"{_DIR}/work",
            "logFile": f"{_DIR}/output.log",
        },
    ),
)
async def create_task(request: Request[Any, Any, Any], tasks: NamedDependency[ProcessManager]) -> TaskAccepted:
    """Start one."""
    body = await read_json(request, _decoder)
    order = Order(
        agent=body.agent, task=body.task, provider=body.provider, submitted_by=caller_of(request).name or None
    )
    task = await tasks.start(order)
    task_dir, log_file = tasks.paths(task.id)
    return TaskAccepted(
        task_id=task.id,
        status="accepted",
        message=f"Started with {task.provider}",
        task_dir=str(task_dir),
        log_file=str(log_file),
    )


@get(
    PATH,
    summary="List the tasks",
    description="Those that run; with `?all=true` those that ended too. The newest first.",
    tags=["tasks"],
    opt=documented(reply={"activeTasks": [_ITEM], "count": 1}),
)
async def list_tasks(
    tasks: NamedDependency[ProcessManager],
    with_ended: Annotated[bool, QueryParameter(name="all", description="Those that ended too.")] = False,
    limit: Annotated[int, QueryParameter(ge=1, le=1000, description="How many at most.")] = 100,
) -> TaskList:
    """Some or all."""
    found = await tasks.newest(limit) if with_ended else tasks.active()[:limit]
    return TaskList([_item(tasks, task) for task in found], len(found))


@get(
    PATH + "/{task_id:str}",
    summary="Look at a task",
    description="Its state, how it ended, and the last 50 lines of its log.",
    tags=["tasks"],
    responses=problems(404),
    opt=documented(reply=_TASK),
)
async def get_task(tasks: NamedDependency[ProcessManager], task_id: FromPath[str]) -> TaskReply:
    """One."""
    task, log_tail = await tasks.get(_known(task_id))
    task_dir, log_file = tasks.paths(task.id)
    return TaskReply(
        task_id=task.id,
        agent=task.agent,
        task=task.task,
        provider=task.provider,
        status=task.status,
        start_time=task.start_time,
        exit_time=task.exit_time,
        exit_code=task.exit_code,
        duration=tasks.duration_ms(task),
        log_tail=log_tail,
        error=task.error,
        task_dir=str(task_dir),
        log_file=str(log_file),
        submitted_by=task.submitted_by,
    )


@delete(
    PATH + "/{task_id:str}",
    summary="Stop a task",
    description=(
        "Its process group gets SIGTERM, and SIGKILL 10 s later. It is `stopped` from now on, whatever exit status "
        "it will have. 409 when it does not run any more."
    ),
    tags=["tasks"],
    status_code=200,
    responses=problems(404, 409),
    opt=documented(reply={"taskId": _ID, "status": "stopped", "message": "It was told to stop"}),
)
async def stop_task(tasks: NamedDependency[ProcessManager], task_id: FromPath[str]) -> TaskStopped:
    """Stop."""
    task = await tasks.stop(_known(task_id))
    return TaskStopped(task.id, task.status, "It was told to stop")


@get(
    PATH + "/{task_id:str}/logs/stream",
    summary="Follow the log of a task",
    description=(
        "Server-sent events: each whole line once, from the beginning; `id:` is its place in bytes, and "
        "`Last-Event-ID` goes on from there. `log-gap` tells of lines that the size limit let go, `task-complete` of "
        "the end. `timestamp` is when the line was read."
    ),
    tags=["tasks"],
    media_type="text/event-stream",
    responses=problems(404),
    opt=documented(reply=_LINES),
)
async def stream_task_log(
    request: Request[Any, Any, Any], tasks: NamedDependency[ProcessManager], task_id: FromPath[str]
) -> Stream:
    """Its output as it comes."""
    await tasks.get(_known(task_id))
    return sse(_events(tasks, task_id, offset_in(request) or 0), welcome=caller_of(request).welcome)


async def _events(tasks: ProcessManager, task_id: str, after: int) -> AsyncGenerator[SseEvent, None]:
    async with aclosing(tasks.follow(task_id, after)) as told:
        async for one in told:
            match one:
                case list():
                    after = one[-1].end
                    yield line_events(one)
                case Gap():
                    yield gap_event(one)
                case Task():
                    end = {"taskId": one.id, "status": one.status, "exitCode": one.exit_code}
                    yield SseEvent(data=msgspec.json.encode(end), id=after, event="task-complete")


def _known(task_id: str) -> str:
    """The id, if it can be one; it is also the name of a folder."""
    if not re.fullmatch(UUID, task_id):
        raise NotFound(f"Task {task_id[:64]!r} not found: an id is a lower-case UUID")
    return task_id


def _item(tasks: ProcessManager, task: Task) -> TaskItem:
    return TaskItem(
        task_id=task.id,
        agent=task.agent,
        task=task.task,
        provider=task.provider,
        status=task.status,
        start_time=task.start_time,
        duration=tasks.duration_ms(task),
    )


task_routes = [create_task, list_tasks, get_task, stop_task, stream_task_log]
