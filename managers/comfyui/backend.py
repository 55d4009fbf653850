"""One ComfyUI as the dispatcher sees it: up or down, and where a prompt is. `attempt` runs prompts on it.

Must never judge a prompt by what the socket says alone: `locate` is the only judge (DESIGN 2, PROTOCOL §6).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from urllib.parse import quote, urlsplit

import msgspec
import structlog
from msgspec import Struct

from managers.clock import Clock
from managers.comfyui.client import ComfyUIClient
from managers.comfyui.protocol import (
    Executing,
    ExecutionError,
    ExecutionStart,
    HistoryEntry,
    Message,
    PreviewFrame,
    Queue,
    StatusMessage,
    TextFrame,
)
from managers.comfyui.rejection import scrub
from managers.comfyui.remote_file import describe_remote
from managers.comfyui.socket import ComfyUISocket, Frame
from managers.errors import BackendUnavailable, NotFound
from managers.events.types import ComfyUIMessage, LiveEvent, Output

log = structlog.get_logger(__name__)

_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
# The first release whose POST /interrupt honours prompt_id; older ones interrupt whatever runs (PROTOCOL §2).
_INTERRUPT_BY_ID_SINCE = (0, 3, 57)


class BackendConfig(Struct, frozen=True, kw_only=True):
    """Where a ComfyUI is. `outputs` is its output folder when it is on this machine, else None."""

    name: str
    url: str
    outputs: Path | None = None


class BackendState(StrEnum):
    """What can be said of a ComfyUI."""

    CONNECTED = "connected"
    DISCONNECTED = "disconnected"
    STALLED = "stalled"


class Place(StrEnum):
    """Where `locate` found a prompt. ABSENT is not yet lost: a POST may still be on its way."""

    RUNNING = "running"
    PENDING = "pending"
    ENDED = "ended"
    ABSENT = "absent"


class Location(Struct, frozen=True):
    """The answer of `locate`; `entry` is the history of an ended prompt."""

    place: Place
    entry: HistoryEntry | None = None


class Signal(StrEnum):
    """What the backend or the dispatcher tells a running attempt, beside the socket's frames."""

    UP = "up"
    DOWN = "down"
    WITHDRAW = "withdraw"
    CANCEL = "cancel"


Inbox = asyncio.Queue[Frame | Signal]


class Backend:
    """The connection to one ComfyUI, shared by the attempts on it."""

    def __init__(
        self,
        config: BackendConfig,
        client_id: str,
        *,
        clock: Clock,
        publish: Callable[[LiveEvent], None],
        on_change: Callable[[Backend, str | None], None],
    ) -> None:
        """`publish` hears ComfyUI's own messages; `on_change` hears every change of `state`, with a reason."""
        self.config = config
        self.name = config.name
        self.client_id = client_id
        self.client = ComfyUIClient(config.url)
        self.clock = clock
        self.publish = publish
        self.state = BackendState.DISCONNECTED
        self.version = "unknown"
        self.queue_remaining: int | None = None
        self.frames = 0
        self.connections = 0
        self.ghosts = 0
        self.workflow_of: dict[str, str] = {}
        self.remote = (urlsplit(config.url).hostname or "") not in _LOOPBACK
        self._on_change = on_change
        self._inboxes: dict[str, Inbox] = {}
        self._known: Callable[[], Collection[str]] = tuple
        self._executing: str | None = None
        self._up = asyncio.Event()
        self._greet = asyncio.Event()
        self._socket = ComfyUISocket(
            config.url, client_id, on_frame=self._frame, on_up=self._came_up, on_down=self._went_down
        )

    # ---- its life

    async def run(self, known: Callable[[], Collection[str]]) -> None:
        """Stay connected until cancelled. Prompts of ours are removed wherever they show up, unless `known`."""
        self._known = known
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._socket.run(), name=f"socket {self.name}")
                while True:
                    await self._greet.wait()
                    self._greet.clear()
                    try:
                        self.version = (await self.client.system_stats()).system.comfyui_version
                        await self._sweep(await self.client.queue())
                    except BackendUnavailable as error:
                        log.warning("backend did not greet", backend=self.name, reason=str(error))
        finally:
            self.state = BackendState.DISCONNECTED
            self._up.clear()

    async def wait_up(self) -> None:
        """Return when the socket is connected."""
        await self._up.wait()

    @property
    def up(self) -> bool:
        """The socket is connected."""
        return self._up.is_set()

    @property
    def interrupts_by_id(self) -> bool:
        """An interrupt can name its prompt, so that a prefetched neighbour or somebody else's prompt is safe."""
        numbers = re.match(r"v?(\d+)\.(\d+)\.(\d+)", self.version)
        return numbers is not None and tuple(map(int, numbers.groups())) >= _INTERRUPT_BY_ID_SINCE

    async def reconnect(self) -> None:
        """Open a fresh socket: this one seems deaf (PROTOCOL §1.7)."""
        log.warning("socket is silent, reconnecting", backend=self.name)
        await self._socket.reconnect()

    # ---- prompts

    @contextmanager
    def inbox(self, prompt_id: str, workflow_id: str) -> Iterator[Inbox]:
        """While open, every frame about the prompt arrives here."""
        box: Inbox = asyncio.Queue()
        self._inboxes[prompt_id] = box
        self.workflow_of[prompt_id] = workflow_id
        try:
            yield box
        finally:
            del self._inboxes[prompt_id]
            del self.workflow_of[prompt_id]

    async def locate(self, prompt_id: str) -> Location:
        """Where the prompt is: the queue first, then the history, which is free of races (PROTOCOL §6).

        Raises `BackendUnavailable`.
        """
        queue = await self.client.queue()
        await self._sweep(queue)
        if any(item.prompt_id == prompt_id for item in queue.queue_running):
            return Location(Place.RUNNING)
        if any(item.prompt_id == prompt_id for item in queue.queue_pending):
            return Location(Place.PENDING)
        entry = await self.client.history(prompt_id)
        return Location(Place.ENDED, entry) if entry is not None else Location(Place.ABSENT)

    async def measure(self, outputs: Sequence[Output]) -> tuple[Output, ...]:
        """The same outputs with size and etag; both stay None for what is not there (any more)."""
        measured = list(outputs)
        if self.config.outputs is not None and any(output.filename for output in outputs):
            measured = await asyncio.to_thread(_measure_local, self.config.outputs, outputs)
        return tuple(
            [
                await self._measure_remote(output) if output.filename and output.size is None else output
                for output in measured
            ]
        )

    # ---- inside

    async def _sweep(self, queue: Queue) -> None:
        """Remove prompts that carry our client id and belong to no open attempt (a POST that arrived late)."""
        known = {*self._known(), *self._inboxes}
        pending, running = (
            [item.prompt_id for item in items if item.client_id == self.client_id and item.prompt_id not in known]
            for items in (queue.queue_pending, queue.queue_running)
        )
        if pending:
            await self.client.delete_pending(*pending)
        for prompt_id in running:
            await self.client.interrupt(prompt_id)
        if pending or running:
            self.ghosts += len(pending) + len(running)
            log.warning("removed prompts without an attempt", backend=self.name, count=len(pending) + len(running))

    async def _measure_remote(self, output: Output) -> Output:
        try:
            found = await describe_remote(
                self.client,
                name=output.filename or "",
                subfolder=output.subfolder or "",
                folder=output.type or "output",
            )
        except (NotFound, BackendUnavailable):
            return output
        return msgspec.structs.replace(output, size=found.size, etag=found.etag.strip('"'))

    def _came_up(self) -> None:
        self.state = BackendState.CONNECTED
        self.connections += 1
        self._up.set()
        self._greet.set()
        self._on_change(self, None)
        self._tell_all(Signal.UP)

    def _went_down(self, reason: str) -> None:
        self.state = BackendState.DISCONNECTED
        self.queue_remaining = None
        self._executing = None
        self._up.clear()
        self._on_change(self, reason)
        self._tell_all(Signal.DOWN)

    def _tell_all(self, signal: Signal) -> None:
        for box in self._inboxes.values():
            box.put_nowait(signal)

    def _frame(self, frame: Frame) -> None:
        self.frames += 1
        if isinstance(frame, Message):
            prompt_id = getattr(frame.body, "prompt_id", None)
            match frame.body:
                case StatusMessage():
                    self.queue_remaining = frame.body.status.exec_info.queue_remaining
                case ExecutionStart() | Executing(node=str()) if prompt_id is not None:
                    self._executing = prompt_id
                    if prompt_id not in self._inboxes:
                        self._greet.set()  # a POST that came late: sweep
                case _:
                    pass
            self._tell(frame.type, prompt_id, _without_secrets(frame))
        elif isinstance(frame, PreviewFrame) and frame.prompt_id is not None:
            prompt_id = frame.prompt_id
        else:
            # Type 1 and 3 frames name no prompt: they belong to the one that executes (PROTOCOL §3).
            prompt_id = self._executing
        if isinstance(frame, TextFrame):
            self._tell("progress_text", prompt_id, msgspec.Raw(msgspec.json.encode(frame)))
        box = self._inboxes.get(prompt_id or "")
        if box is not None:
            box.put_nowait(frame)

    def _tell(self, name: str, prompt_id: str | None, data: msgspec.Raw) -> None:
        self.publish(
            ComfyUIMessage(
                type=f"comfyui:{name}",
                timestamp=self.clock.now_ms(),
                backend=self.name,
                data=data,
                workflow_id=self.workflow_of.get(prompt_id or "", msgspec.UNSET),
            )
        )


def _without_secrets(message: Message) -> msgspec.Raw:
    """As it came, but for an error: its traceback has paths of that machine, its inputs tensors (PROTOCOL §5)."""
    if not isinstance(message.body, ExecutionError):
        return message.raw
    told = msgspec.structs.replace(
        message.body,
        exception_message=scrub(message.body.exception_message),
        exception_type=scrub(message.body.exception_type),
    )
    return msgspec.Raw(msgspec.json.encode(told))


def folder_of(outputs: Path, folder: str) -> Path:
    """ComfyUI keeps `temp` and `input` beside its `output` folder."""
    return outputs if folder == "output" else outputs.parent / folder


def local_etag(size: int, mtime_ns: int) -> str:
    """The same text that aiohttp's FileResponse, and so ComfyUI's /view, gives for the file."""
    return f"{mtime_ns:x}-{size:x}"


def _measure_local(root: Path, outputs: Sequence[Output]) -> list[Output]:
    return [_measure_one(root, output) if output.filename else output for output in outputs]


def _measure_one(root: Path, output: Output) -> Output:
    try:
        found = (folder_of(root, output.type or "output") / (output.subfolder or "") / (output.filename or "")).stat()
    except (OSError, ValueError):
        return output
    return msgspec.structs.replace(output, size=found.st_size, etag=local_etag(found.st_size, found.st_mtime_ns))


def output_url(workflow_id: str, n: int) -> str:
    """Where this service serves the n-th output of a run (CONTRACT 5)."""
    return f"/v1/comfyui/workflow/{quote(workflow_id)}/outputs/{n}"
