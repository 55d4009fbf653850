"""Follows what others submit to a ComfyUI, and writes it down as if it had been submitted to us.

A found prompt becomes a workflow of the store under its own prompt id: so its events are durable, told once, and
everybody who reads the log (EventBridge, uploads) hears of it. Must never post, delete or interrupt anything, and
never tell an end that the store has already.

Node events come by the socket for prompts that were submitted under our client id. Of all others ComfyUI tells us
only that something has changed (`status`): what, is found in `/queue` and `/history` (PROTOCOL §3).
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence

import msgspec
import structlog
from msgspec import Struct

from managers.clock import Clock
from managers.comfyui.graph import parse_graph
from managers.comfyui.measuring import measure
from managers.comfyui.outputs import outputs_of
from managers.comfyui.protocol import (
    Executed,
    Executing,
    ExecutionStart,
    Message,
    Queue,
    QueueItem,
    StatusMessage,
    end_of,
)
from managers.comfyui.socket import ComfyUISocket, Frame
from managers.comfyui.tracker import Tracker, describe
from managers.comfyui.verdicts import Job, Verdict, concluded, outputs_in
from managers.delivery.monitor_reading import Ended, RecentClient, evidence, graph_of, vanished
from managers.errors import BackendUnavailable, Conflict, NotFound
from managers.events.hub import Hub
from managers.events.types import BackendConnected, BackendDisconnected, ImagesGenerated, Output, StoredEvent
from managers.workflows.model import AttemptState, Claimed, NewWorkflow, Priority, rank
from managers.workflows.settlement import outcome_of
from managers.workflows.store import WorkflowStore

log = structlog.get_logger(__name__)

LOOK_SECONDS = 10.0
"""After so long without a `status` frame it is looked all the same."""
_GRACE_SECONDS = 2.0
"""How long the history may be ahead of the socket, which tells of nodes, before the end is told without them."""
_FIRST_PAGE = 16
_REMEMBERED = 20_000  # twice what ComfyUI's history holds
_NO_LIMIT_SECONDS = 1e9

Counted = Callable[[str, int, int], None]
"""Backend, how many prompts wait, how many run."""


class _Watch(Struct):
    """A prompt that has not ended. `connection` is the one on which ComfyUI named it last.

    `over_at`: since when its history is there while its last frame is not (monotonic seconds).
    """

    job: Job
    tracker: Tracker
    connection: int
    started: bool
    told: set[str]
    heard_end: bool = False
    over_at: float | None = None


class Watcher:
    """One ComfyUI. `run` it as a task."""

    def __init__(
        self,
        *,
        name: str,
        client: RecentClient,
        client_id: str,
        store: WorkflowStore,
        hub: Hub,
        clock: Clock,
        horizon: int,
        counted: Counted,
        look_seconds: float = LOOK_SECONDS,
    ) -> None:
        """What ended before `horizon` (epoch ms) and was not seen before is history, and is not told."""
        self.name = name
        self.client_id = client_id
        self.up = False
        self._client = client
        self._store = store
        self._hub = hub
        self._clock = clock
        self._horizon = horizon
        self._counted = counted
        self._look_seconds = look_seconds
        self._inbox: asyncio.Queue[tuple[float, Frame | StoredEvent]] = asyncio.Queue()
        self._open: dict[str, _Watch] = {}
        self._known: OrderedDict[str, None] = OrderedDict()
        self._connection = 0
        self._looked_at = 0.0
        self._unannounced = 0
        self._trouble: str | None = None
        self._socket = ComfyUISocket(
            client.url,
            client_id,
            on_frame=self._put,
            on_up=self._came_up,
            on_down=self._went_down,
            on_failed=self._unreachable,
        )

    async def run(self) -> None:
        """Until cancelled."""
        self._open = {}
        for claimed in await self._store.open_attempts(self.name):
            await self._follow(claimed, connection=-1)
        await self._claim()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._socket.run(), name=f"socket {self.name}")
            while True:
                await self._step()

    # ---- from the socket

    def _put(self, item: Frame | StoredEvent) -> None:
        self._inbox.put_nowait((self._clock.monotonic(), item))

    def _came_up(self) -> None:
        log.info("backend is connected", backend=self.name)
        self._trouble, self.up = None, True
        self._put(BackendConnected(timestamp=self._clock.now_ms(), backend=self.name))

    def _went_down(self, reason: str) -> None:
        log.info("backend is gone", backend=self.name, reason=reason)
        self.up = False
        self._put(BackendDisconnected(timestamp=self._clock.now_ms(), backend=self.name, reason=reason))

    def _unreachable(self, reason: str) -> None:
        if reason != self._trouble:
            self._trouble = reason
            log.warning("backend cannot be reached", backend=self.name, reason=reason)

    # ---- one thing after another

    async def _step(self) -> None:
        try:
            waited_for = any(watch.over_at is not None for watch in self._open.values())
            async with asyncio.timeout(_GRACE_SECONDS if waited_for else self._look_seconds):
                came_at, item = await self._inbox.get()
        except TimeoutError:
            await self._look_unasked()
            return
        match item:
            case BackendConnected() | BackendDisconnected():
                self._connection += isinstance(item, BackendConnected)
                await self._store.append(item)
                await self._look()
            case Message(body=StatusMessage()):
                self._unannounced = 0
                if came_at >= self._looked_at:  # else what it announces was there when we looked
                    await self._look()
            case Message():
                await self._hear(item)
            case _:
                pass  # previews and texts are for those who listen to ComfyUI itself

    async def _hear(self, message: Message) -> None:
        prompt_id = getattr(message.body, "prompt_id", None)
        if prompt_id is None:
            return
        if prompt_id not in self._open and not await self._is_known(prompt_id):
            await self._look()
        watch = self._open.get(prompt_id)
        if watch is None:
            return
        now = self._clock.now_ms()
        events = watch.tracker.feed(message.body, now)
        if isinstance(message.body, ExecutionStart):
            await self._start(watch, message.body.timestamp or now)
        for event in events:
            self._hub.publish(event)
        if isinstance(message.body, Executed):
            node_id = message.body.display_node or message.body.node
            await self._tell_outputs(watch, tuple(outputs_of(node_id, message.body.output)))
        if isinstance(message.body, Executing) and message.body.node is None:
            watch.heard_end = True
            await self._look()

    # ---- looking

    async def _look_unasked(self) -> None:
        """Nobody has announced anything. Where something has changed all the same, twice: the socket is deaf."""
        if await self._look() and self.up:
            self._unannounced += 1
            if self._unannounced > 1:
                self._unannounced = 0
                log.warning("socket is silent, reconnecting", backend=self.name)
                await self._socket.reconnect()

    async def _look(self) -> bool:
        """Whether there is news. The queue first, then the history: a prompt is in one of them (PROTOCOL §6)."""
        self._looked_at = self._clock.monotonic()
        try:
            queue = await self._client.queue()
            return await self._compare(queue)
        except BackendUnavailable as error:
            log.debug("cannot look", backend=self.name, reason=str(error))
            return False

    async def _compare(self, queue: Queue) -> bool:
        running = {item.prompt_id for item in queue.queue_running}
        pending = sorted(queue.queue_pending, key=_place)
        news = False
        ends = await self._news_of_history()
        for ended in ends:
            news |= await self._end(ended)
        for item in (*queue.queue_running, *pending):
            news |= await self._enter(item.prompt_id, item.prompt, item.extra_data)
            watch = self._open.get(item.prompt_id)
            if watch is not None:
                watch.connection = self._connection
                if item.prompt_id in running:
                    await self._start(watch, self._clock.now_ms())
        listed = running | {item.prompt_id for item in pending}
        for prompt_id in [prompt_id for prompt_id in self._open if prompt_id not in listed]:
            news |= await self._gone(self._open[prompt_id])
        self._counted(self.name, len(pending), len(running))
        return news

    async def _news_of_history(self) -> list[Ended]:
        """What ended since the last look, oldest first: pages grow until something is known, or there is no more."""
        count = _FIRST_PAGE
        while True:
            page = await self._client.recent(count)
            news = []
            reached = len(page) < count
            for prompt_id, entry in reversed(page.items()):
                if prompt_id in self._open or not await self._is_known(prompt_id):
                    ended = Ended.read(prompt_id, entry)
                    if prompt_id in self._open or (ended.end_time or 0) >= self._horizon:
                        news.append(ended)
                        continue
                    self._remember(prompt_id)
                reached = True
            if reached:
                return news[::-1]
            count *= 4

    async def _is_known(self, prompt_id: str) -> bool:
        """Whether the store has it. That it has not is asked again: it may come."""
        if prompt_id in self._known:
            return True
        try:
            await self._store.get(prompt_id)
        except NotFound:
            return False
        self._remember(prompt_id)
        return True

    def _remember(self, prompt_id: str) -> None:
        self._known[prompt_id] = None
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)

    # ---- into the record

    async def _enter(self, prompt_id: str, prompt: msgspec.Raw, extra_data: object) -> bool:
        """A prompt that is new to us. Whether it is."""
        if prompt_id in self._open or await self._is_known(prompt_id):
            return False
        now = self._clock.now_ms()
        graph = graph_of(prompt)
        queue_id = extra_data.get("queue_id") if isinstance(extra_data, dict) else None
        new = NewWorkflow(
            id=prompt_id,
            graph=graph,
            priority=Priority.NORMAL,
            gpu=self.name,
            rank=rank(Priority.NORMAL, now, 0),
            created_at=now,
            max_attempts=1,
            timeout_seconds=_NO_LIMIT_SECONDS,
            # Keys of other people travel in there: only what is told is kept.
            extra_data=None if queue_id is None else msgspec.json.encode({"queue_id": queue_id}),
        )
        try:
            await self._store.submit(new)
        except Conflict:
            return False  # another backend has it
        await self._claim()
        return True

    async def _claim(self) -> None:
        """Give what was entered its attempt: its prompt is there already. Also what a crash left without one."""
        while (place := self._store.next_in_line((self.name,), self.name)) is not None:
            line = self._store.first_in_line(_REMEMBERED)
            entry = next(entry for entry in line if (entry.rank, entry.number) == place)
            now = self._clock.now_ms()
            claimed = await self._store.claim(backend=self.name, pools=(self.name,), prompt_id=entry.id, now=now)
            if claimed is not None:
                await self._follow(claimed, connection=self._connection)

    async def _follow(self, claimed: Claimed, *, connection: int) -> None:
        nodes = describe(parse_graph(msgspec.json.decode(claimed.graph)), lambda _: None)
        workflow_id = claimed.workflow.id
        told = set()
        for frame in await self._store.events_of(workflow_id):
            if frame.type == "images:generated":
                told.add(msgspec.json.decode(frame.data, type=ImagesGenerated).node_id)
        job = Job(
            workflow_id=workflow_id,
            prompt_id=claimed.attempt.prompt_id,
            graph=claimed.graph,
            extra_data=claimed.extra_data,
            nodes=nodes,
            timeout_seconds=_NO_LIMIT_SECONDS,
            posted=True,
            start_time=claimed.attempt.start_time,
        )
        started = claimed.attempt.state is AttemptState.RUNNING
        self._open[job.prompt_id] = _Watch(job, Tracker(workflow_id, nodes), connection, started, told)
        self._remember(job.prompt_id)

    async def _start(self, watch: _Watch, start_time: int) -> None:
        if not watch.started:
            watch.started = True
            await self._store.start(watch.job.prompt_id, start_time)

    async def _tell_outputs(self, watch: _Watch, outputs: Sequence[Output]) -> None:
        """Node by node, each once."""
        for node_id in dict.fromkeys(output.node_id for output in outputs):
            if node_id in watch.told:
                continue
            watch.told.add(node_id)
            own = tuple(output for output in outputs if output.node_id == node_id)
            now = self._clock.now_ms()
            event = ImagesGenerated(timestamp=now, workflow_id=watch.job.workflow_id, node_id=node_id, outputs=own)
            await self._store.append(event)

    async def _end(self, ended: Ended) -> bool:
        """ComfyUI has ended it."""
        await self._enter(ended.prompt_id, ended.graph, ended.extra_data)
        watch = self._open.get(ended.prompt_id)
        if watch is None or self._more_to_come(watch, ended):
            return False
        found = outputs_in(watch.job, ended.entry)
        end = end_of(ended.entry)
        await self._start(watch, end.start_time or self._clock.now_ms())
        await self._tell_outputs(watch, found)
        outputs = await measure(self._client, self._client.outputs, found)
        now = self._clock.now_ms()
        verdict = concluded(watch.job, watch.tracker, end, outputs, start_time=watch.job.start_time, now=now)
        await self._finish(watch, verdict)
        return True

    def _more_to_come(self, watch: _Watch, ended: Ended) -> bool:
        """Of what was submitted under our client id the socket has still to tell, and then says that it has ended."""
        if ended.client_id != self.client_id or not self.up or watch.heard_end:
            return False
        now = self._clock.monotonic()
        watch.over_at = now if watch.over_at is None else watch.over_at
        return now - watch.over_at < _GRACE_SECONDS

    async def _gone(self, watch: _Watch) -> bool:
        """Neither queue nor the newest of the history have it."""
        entry = await self._client.history(watch.job.prompt_id)
        if entry is not None:
            return await self._end(Ended(watch.job.prompt_id, entry))
        now = self._clock.now_ms()
        seen = evidence(watch.tracker)
        if seen is not None:
            end, found = seen
            outputs = await measure(self._client, self._client.outputs, found)
            verdict = concluded(watch.job, watch.tracker, end, outputs, start_time=watch.job.start_time, now=now)
        else:
            verdict = vanished(started=watch.started, same=watch.connection == self._connection, now=now)
        await self._finish(watch, verdict)
        return True

    async def _finish(self, watch: _Watch, verdict: Verdict) -> None:
        await self._store.finish(watch.job.prompt_id, outcome_of(verdict, self._clock.now_ms()))
        del self._open[watch.job.prompt_id]


def _place(item: QueueItem) -> tuple[float, str]:
    number = item.number
    return (number if isinstance(number, int | float) else 0.0), item.prompt_id
