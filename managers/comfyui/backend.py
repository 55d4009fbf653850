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
from urllib.parse import urlsplit

import msgspec
import structlog
from msgspec import Struct

from managers.clock import Clock
from managers.comfyui.client import ComfyUIClient
from managers.comfyui.measuring import measure
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
from managers.comfyui.socket import ComfyUISocket, Frame
from managers.comfyui.watchdog import Stall, StallReason, WatchConfig, Watchdog
from managers.errors import BackendUnavailable
from managers.events.types import (
    BackendConnected,
    BackendDisconnected,
    BackendStalled,
    ComfyUIMessage,
    LiveEvent,
    Output,
    StoredEvent,
)

log = structlog.get_logger(__name__)

_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
# The first release whose POST /interrupt honours prompt_id; older ones interrupt whatever runs (PROTOCOL §2).
_INTERRUPT_BY_ID_SINCE = (0, 3, 57)


class BackendConfig(Struct, frozen=True, kw_only=True):
    """Where a ComfyUI is. `outputs` is its output folder when it is on this machine, else None."""

    name: str
    url: str
    outputs: Path | None = None
    watch: WatchConfig = WatchConfig()


class BackendState(StrEnum):
    """What can be said of a ComfyUI. STALLED: it answers, and its worker is proven not to work."""

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
    STALLED = "stalled"
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
        on_event: Callable[[StoredEvent], None],
    ) -> None:
        """`publish` hears ComfyUI's own messages; `on_event` what is to be kept: changes of `state`, silences."""
        self.config = config
        self.name = config.name
        self.client_id = client_id
        self.client = ComfyUIClient(config.url)
        self.clock = clock
        self.publish = publish
        self.watchdog = Watchdog(config.watch)
        self.drained = False
        """Its operator may restart it at will: no workflow is charged with that."""
        self.version = "unknown"
        self.queue_remaining: int | None = None
        self.frames = 0
        self.connections = 0
        self.ghosts = 0
        self.workflow_of: dict[str, str] = {}
        self.remote = (urlsplit(config.url).hostname or "") not in _LOOPBACK
        self._on_event = on_event
        self._inboxes: dict[str, Inbox] = {}
        self._known: Callable[[], Collection[str]] = tuple
        self._swept: set[str] = set()
        self._excused = False  # until it is up again
        self._up = asyncio.Event()
        self._stalled = asyncio.Event()
        self._greet = asyncio.Event()
        self._trouble: str | None = None
        self._socket = ComfyUISocket(
            config.url,
            client_id,
            on_frame=self._frame,
            on_up=self._came_up,
            on_down=self._went_down,
            on_failed=self._unreachable,
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
            self._up.clear()
            self.watchdog.broke(charged=False)

    async def wait_up(self) -> None:
        """Return when the socket is connected."""
        await self._up.wait()

    @property
    def up(self) -> bool:
        """The socket is connected."""
        return self._up.is_set()

    @property
    def ready(self) -> bool:
        """It may be given work."""
        return self.up and self.watchdog.stall is None

    @property
    def state(self) -> BackendState:
        """What can be said of it now."""
        if not self.up:
            return BackendState.DISCONNECTED
        return BackendState.CONNECTED if self.ready else BackendState.STALLED

    @property
    def stalled_since(self) -> int | None:
        """When its worker was proven not to work (epoch ms); None while it is trusted."""
        stall = self.watchdog.stall
        return None if stall is None else stall.since

    @property
    def silent_seconds(self) -> float:
        """How long nothing was heard of the prompt of ours that executes; 0 when none does."""
        return self.watchdog.silence(self.clock.monotonic())

    @property
    def interrupts_by_id(self) -> bool:
        """An interrupt can name its prompt, so that a prefetched neighbour or somebody else's prompt is safe."""
        numbers = re.match(r"v?(\d+)\.(\d+)\.(\d+)", self.version)
        return numbers is not None and tuple(map(int, numbers.groups())) >= _INTERRUPT_BY_ID_SINCE

    async def reconnect(self) -> None:
        """Open a fresh socket: this one seems deaf (PROTOCOL §1.7)."""
        log.warning("socket is silent, reconnecting", backend=self.name)
        self.excuse_break()
        await self._socket.reconnect()

    # ---- trust

    def excuse_break(self) -> None:
        """The connection is about to break, or ComfyUI to end, by our own hand: no workflow is charged with that."""
        self._excused = True

    def distrust(self, reason: StallReason, words: str) -> None:
        """Its worker is proven not to work: no new work until `trust`."""
        stall = Stall(reason, words, self.clock.now_ms())
        if self.watchdog.distrust(stall, charged=not self.drained):
            log.error("backend is stalled", backend=self.name, reason=words)
            self._stalled.set()
            self._on_event(BackendStalled(timestamp=stall.since, backend=self.name, reason=words))
            self._tell_all(Signal.STALLED)

    def trust(self, reason: str) -> None:
        """It works again, as `reason` shows."""
        self.watchdog.trust()
        self._stalled.clear()
        log.info("backend is trusted again", backend=self.name, reason=reason)
        self._on_event(BackendConnected(timestamp=self.clock.now_ms(), backend=self.name, reason=reason))

    async def wait_stalled(self) -> Stall:
        """Return when it is not to be trusted any more, and why."""
        while self.watchdog.stall is None:
            await self._stalled.wait()
        return self.watchdog.stall

    def tell_silence(self, words: str) -> None:
        """It is trusted still, but people should know."""
        log.warning("backend is silent", backend=self.name, reason=words)
        self._on_event(BackendStalled(timestamp=self.clock.now_ms(), backend=self.name, reason=words, proven=False))

    # ---- prompts

    @contextmanager
    def inbox(self, prompt_id: str, workflow_id: str | None = None) -> Iterator[Inbox]:
        """While open, every frame about the prompt arrives here. A probe belongs to no workflow."""
        box: Inbox = asyncio.Queue()
        self._inboxes[prompt_id] = box
        if workflow_id is not None:
            self.workflow_of[prompt_id] = workflow_id
        try:
            yield box
        finally:
            del self._inboxes[prompt_id]
            self.workflow_of.pop(prompt_id, None)
            self.watchdog.forget(prompt_id)

    async def locate(self, prompt_id: str) -> Location:
        """Where the prompt is: the queue first, then the history, which is free of races (PROTOCOL §6).

        Raises `BackendUnavailable`.
        """
        queue = await self.client.queue()
        now = self.clock.monotonic()
        self.watchdog.looked(queue, now)
        await self._sweep(queue)
        if any(item.prompt_id == prompt_id for item in queue.queue_running):
            if self.up:
                self.watchdog.runs(prompt_id, now)
            return Location(Place.RUNNING)
        if any(item.prompt_id == prompt_id for item in queue.queue_pending):
            if self.watchdog.idle_worker(now):
                self.distrust(StallReason.NOTHING_RUNS, "Prompts wait in ComfyUI and none runs: its worker is dead")
            return Location(Place.PENDING)
        entry = await self.client.history(prompt_id)
        self.watchdog.left(prompt_id)
        return Location(Place.ENDED, entry) if entry is not None else Location(Place.ABSENT)

    async def measure(self, outputs: Sequence[Output]) -> tuple[Output, ...]:
        """The same outputs with size and etag; both stay None for what is not there (any more)."""
        return await measure(self.client, self.config.outputs, outputs)

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
        found = {*pending, *running}
        new, self._swept = found - self._swept, found  # one that does not stop is asked again, and counted once
        if new:
            self.ghosts += len(new)
            log.warning("removed prompts without an attempt", backend=self.name, count=len(new))

    def _unreachable(self, reason: str) -> None:
        """Not one line for each attempt: people know, until the reason is another."""
        if reason != self._trouble:
            self._trouble = reason
            log.warning("backend cannot be reached", backend=self.name, reason=reason)

    def _came_up(self) -> None:
        self._trouble = None
        log.info("backend is connected", backend=self.name)
        self.connections += 1
        self._excused = False
        self._up.set()
        self._greet.set()
        now = self.clock.now_ms()
        if self.watchdog.stall is None:
            self._on_event(BackendConnected(timestamp=now, backend=self.name))
        else:
            words = "Connected again; it gets work when a probe prompt has run"
            self._on_event(BackendStalled(timestamp=now, backend=self.name, reason=words))
        self._tell_all(Signal.UP)

    def _went_down(self, reason: str) -> None:
        self.queue_remaining = None
        self.watchdog.broke(charged=not (self.drained or self._excused))
        self._up.clear()
        log.info("backend is gone", backend=self.name, reason=reason)
        self._on_event(BackendDisconnected(timestamp=self.clock.now_ms(), backend=self.name, reason=reason))
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
                    if prompt_id in self._inboxes:
                        self.watchdog.runs(prompt_id, self.clock.monotonic())
                    else:
                        self._greet.set()  # a POST that came late: sweep
                case Executing(node=None) if prompt_id is not None:
                    self.watchdog.left(prompt_id)
                case _:
                    pass
            self._tell(frame.type, prompt_id, _without_secrets(frame))
        elif isinstance(frame, PreviewFrame) and frame.prompt_id is not None:
            prompt_id = frame.prompt_id
        else:
            # Type 1 and 3 frames name no prompt: they belong to the one that executes (PROTOCOL §3).
            prompt_id = self.watchdog.executing
        if isinstance(frame, TextFrame):
            self._tell("progress_text", prompt_id, msgspec.Raw(msgspec.json.encode(frame)))
        if prompt_id is None:
            return
        self.watchdog.heard(prompt_id, self.clock.monotonic())
        box = self._inboxes.get(prompt_id)
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
