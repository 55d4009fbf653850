"""Hands work to one ComfyUI: one workflow executing, at most one posted ahead so that the card never idles.

Must never decide what an attempt came to (that is `comfyui.attempt`) nor what is legal (that is the store): it
claims, runs, and writes down. One dispatcher a backend.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from typing import Protocol

import structlog
from msgspec import Struct

from managers.clock import Clock, IdMaker
from managers.comfyui.attempt import AttemptRun, Job, Result, Verdict
from managers.comfyui.backend import Backend, BackendConfig, BackendState, Signal
from managers.comfyui.tracker import GraphNode
from managers.errors import BackendUnavailable, StoreUnavailable
from managers.events.types import (
    BackendConnected,
    BackendDisconnected,
    ImagesGenerated,
    LiveEvent,
    Output,
    WorkflowProgress,
)
from managers.workflows.model import ANY_BACKEND, AttemptState, Claimed, Outcome, Status, Workflow
from managers.workflows.store import WorkflowStore

log = structlog.get_logger(__name__)

_STORE_RETRY_SECONDS = 1.0
_UNREACHABLE_SECONDS = 1.0
_OOM_ATTEMPTS = 2

Describe = Callable[[bytes], dict[str, GraphNode]]
"""A graph's JSON text -> its nodes, named (needs the display names of /object_info)."""


class Publisher(Protocol):
    """Where live events go."""

    def publish(self, event: LiveEvent) -> None:
        """Never blocks."""
        ...


class DispatcherConfig(Struct, frozen=True, kw_only=True):
    """`prefetch`: post the next workflow while one runs, where a single prompt can be interrupted.

    `free_when_idle_seconds`: after so much idleness ComfyUI is asked to free the card's memory; 0 is never.
    """

    backend: BackendConfig
    prefetch: bool = True
    free_when_idle_seconds: float = 0


class Dispatcher:
    """The one who feeds a backend."""

    def __init__(
        self,
        config: DispatcherConfig,
        *,
        store: WorkflowStore,
        events: Publisher,
        live: dict[str, WorkflowProgress],
        describe: Describe,
        clock: Clock,
        new_id: IdMaker,
        client_id: str,
    ) -> None:
        """`live` is where the progress of what runs can be read; this writes it."""
        self.name = config.backend.name
        self.pools = (ANY_BACKEND,) if self.name == ANY_BACKEND else (ANY_BACKEND, self.name)
        self.backend = Backend(
            config.backend, client_id, clock=clock, publish=events.publish, on_change=self._backend_changed
        )
        self._config = config
        self._store = store
        self._events = events
        self._live = live
        self._describe = describe
        self._clock = clock
        self._new_id = new_id
        self._slots: dict[str, _Slot] = {}
        self._wake = asyncio.Event()
        self._draining = False
        self._idle_since = clock.monotonic()
        self._freed = True  # until a first workflow has loaded something
        self._claiming = False
        self._expecting = False
        self._doomed: set[str] = set()  # cancelled while a claim was on its way, which may have taken them
        self._others: tuple[Dispatcher, ...] = ()
        self._tasks: asyncio.TaskGroup | None = None

    def meet(self, dispatchers: Collection[Dispatcher]) -> None:
        """Those with whom the work for any backend is shared."""
        self._others = tuple(other for other in dispatchers if other is not self)

    async def run(self) -> None:
        """Reconcile what was open, then hand out work until cancelled. Prompts in ComfyUI are left to it."""
        async with asyncio.TaskGroup() as self._tasks:
            for claimed in await self._store.open_attempts(self.name):
                self._begin(claimed, posted=True)
            self._tasks.create_task(self.backend.run(lambda: self._slots), name=f"backend {self.name}")
            while True:
                await self._woken()
                self._wake.clear()
                await self._fill()

    async def _woken(self) -> None:
        """Until there may be work; after long idleness the memory of the card is given back, once."""
        patience = self._config.free_when_idle_seconds
        while patience and not (self._slots or self._freed or self._wake.is_set()):
            left = self._idle_since + patience - self._clock.monotonic()
            try:
                async with asyncio.timeout(max(left, 0)):
                    await self._wake.wait()
            except TimeoutError:
                self._freed = True
                try:
                    await self.backend.client.free()
                except BackendUnavailable as error:
                    log.warning("could not free memory", backend=self.name, reason=str(error))
        await self._wake.wait()

    async def aclose(self) -> None:
        """After `run` has ended for good."""
        await self.backend.client.aclose()

    def wake(self) -> None:
        """Something waits, or may: look again."""
        self._wake.set()

    def expect(self) -> bool:
        """A workflow is about to be stored. With nothing in hand its claim can share that commit; whether it will."""
        if self._slots or self._claiming or self._draining or not self.backend.up:
            return False
        self._expecting = True
        self.wake()
        return True

    def drain(self) -> None:
        """Take no new work."""
        self._draining = True

    def resume(self) -> None:
        """Take work again."""
        self._draining = False
        self.wake()

    def cancel(self, workflow_id: str) -> None:
        """Its verdict is stored: make ComfyUI let go of it."""
        if self._claiming:
            self._doomed.add(workflow_id)
        for slot in self._slots.values():
            if slot.claimed.workflow.id == workflow_id:
                slot.cancelled = True
                slot.run.tell(Signal.CANCEL)

    def moved(self, workflow: Workflow) -> None:
        """It waits at another place now, perhaps behind others although it was posted ahead."""
        for slot in self._slots.values():
            if slot.claimed.workflow.id == workflow.id:
                slot.place = (workflow.rank, workflow.number)
        self.wake()

    @property
    def busy(self) -> bool:
        """A workflow of ours is in this ComfyUI."""
        return bool(self._slots)

    @property
    def current(self) -> str | None:
        """The workflow that executes."""
        return next((slot.claimed.workflow.id for slot in self._slots.values() if slot.run.started), None)

    @property
    def idle(self) -> bool:
        """It could begin something at once."""
        return self.backend.up and not self._draining and not self._there()

    def give_back(self) -> None:
        """Another backend is idle: what only waits behind something here can run there."""
        if any(slot.run.started for slot in self._there()):
            for slot in self._slots.values():
                if not (slot.run.started or slot.cancelled) and slot.claimed.workflow.gpu == ANY_BACKEND:
                    slot.run.tell(Signal.WITHDRAW)

    # ---- handing out

    async def _fill(self) -> None:
        while self.backend.up and not self._draining:
            pools = self._open_pools()
            waiting = self._store.next_in_line(pools)
            expecting, self._expecting = self._expecting and not self._slots, False
            if waiting is None and not expecting:
                if not (self._there() or self._store.counts().paused):
                    for other in self._others:
                        other.give_back()
                return
            ahead = next((slot for slot in self._slots.values() if not slot.run.started), None)
            if ahead is not None:
                if waiting is not None and waiting < ahead.place and not ahead.cancelled:
                    ahead.run.tell(Signal.WITHDRAW)
                return
            if not self._may_claim():
                return
            self._claiming = True
            try:
                claimed = await self._store.claim(
                    backend=self.name, pools=pools, prompt_id=self._new_id(), now=self._clock.now_ms()
                )
            except StoreUnavailable as error:
                log.error("cannot claim", backend=self.name, reason=str(error))
                self._spawn(self._wake_later())
                return
            finally:
                self._claiming = False
                doomed, self._doomed = self._doomed, set()
            if claimed is None:
                return
            self._begin(claimed, posted=False, cancelled=claimed.workflow.id in doomed)

    def _may_claim(self) -> bool:
        """Nothing of ours is in this ComfyUI, or only what executes and may get a neighbour."""
        there = self._there()
        return not there or (
            len(there) == 1
            and self._config.prefetch
            and self.backend.interrupts_by_id
            and not any(slot.cancelled for slot in there)
        )

    def _there(self) -> list[_Slot]:
        """What this ComfyUI has not ended yet."""
        return [slot for slot in self._slots.values() if not slot.run.ended]

    def _open_pools(self) -> tuple[str, ...]:
        """What may be claimed now: work for any backend is not posted ahead while another could begin it."""
        if self._there() and any(other.idle for other in self._others):
            return tuple(pool for pool in self.pools if pool != ANY_BACKEND)
        return self.pools

    def _begin(self, claimed: Claimed, *, posted: bool, cancelled: bool = False) -> None:
        self._freed = False
        slot = _Slot(self, claimed, posted=posted)
        self._slots[claimed.attempt.prompt_id] = slot
        if claimed.workflow.final or cancelled:
            slot.cancelled = True
            slot.run.tell(Signal.CANCEL)
        self._spawn(self._attend(slot))

    async def _attend(self, slot: _Slot) -> None:
        prompt_id = slot.claimed.attempt.prompt_id
        try:
            verdict = await self._verdict(slot)
            if verdict.result is Result.WITHDRAWN and verdict.error:
                await asyncio.sleep(_UNREACHABLE_SECONDS)
            slot.end()
            await self._until_stored(lambda: self._settle(slot, verdict))
        finally:
            del self._slots[prompt_id]
            self._idle_since = self._clock.monotonic()
            self._live.pop(slot.claimed.workflow.id, None)
            self.wake()
            for other in self._others:  # what was withdrawn here has no event that tells them
                other.wake()

    async def _verdict(self, slot: _Slot) -> Verdict:
        while True:
            try:
                return await slot.run.run()
            except Exception:
                # A fault of ours must not lose the prompt: follow it anew, as after a restart.
                log.exception("following a prompt failed", prompt_id=slot.claimed.attempt.prompt_id)
                await asyncio.sleep(_UNREACHABLE_SECONDS)
                slot.renew()

    async def _settle(self, slot: _Slot, verdict: Verdict) -> None:
        prompt_id, workflow = slot.claimed.attempt.prompt_id, slot.claimed.workflow
        now = self._clock.now_ms()
        number = slot.claimed.attempt.number
        match verdict.result:
            case Result.WITHDRAWN:
                await self._store.withdraw(prompt_id, now)
            case Result.GONE:
                await self._store.close_attempt(prompt_id, now)
            case Result.LOST:
                await self._store.lose(
                    prompt_id,
                    error=verdict.error or "lost",
                    error_type="lost",
                    now=now,
                    retry=number < workflow.max_attempts,
                )
            case Result.FAILED if verdict.error_type == "oom" and number < min(workflow.max_attempts, _OOM_ATTEMPTS):
                try:
                    await self.backend.client.free()
                except BackendUnavailable as error:
                    log.warning("could not free memory", backend=self.name, reason=str(error))
                await self._store.lose(
                    prompt_id, error=verdict.error or "out of memory", error_type="oom", now=now, retry=True
                )
            case _:
                await self._store.finish(prompt_id, _outcome(verdict, now))

    async def _until_stored(self, write: Callable[[], Awaitable[None]]) -> None:
        """A verdict must not be dropped because the disk is full now."""
        while True:
            try:
                return await write()
            except StoreUnavailable as error:
                log.error("cannot store a verdict, trying again", reason=str(error))
                await asyncio.sleep(_STORE_RETRY_SECONDS)

    # ---- small things

    def note(self, write: Awaitable[object]) -> None:
        """Store something that later writes would make good if it fails."""

        async def attempt() -> None:
            try:
                await write
            except StoreUnavailable as error:
                log.warning("not stored", reason=str(error))

        self._spawn(attempt())

    def _spawn(self, work: Awaitable[None]) -> None:
        assert self._tasks is not None  # noqa: S101  # only called inside `run`
        self._tasks.create_task(_as_coroutine(work))

    async def _wake_later(self) -> None:
        await asyncio.sleep(_STORE_RETRY_SECONDS)
        self.wake()

    def _backend_changed(self, backend: Backend, reason: str | None) -> None:
        kind = BackendConnected if backend.state is BackendState.CONNECTED else BackendDisconnected
        self.note(self._store.append(kind(timestamp=self._clock.now_ms(), backend=self.name, reason=reason)))
        self.wake()


class _Slot:
    """An attempt in hand; hears it as its sink."""

    def __init__(self, dispatcher: Dispatcher, claimed: Claimed, *, posted: bool) -> None:
        self.claimed = claimed
        self.cancelled = False
        self.place = (claimed.workflow.rank, claimed.workflow.number)
        self._dispatcher = dispatcher
        self._held: list[LiveEvent] | None = None  # what came before workflow:started was on disk
        self._nodes = dispatcher._describe(claimed.graph)  # noqa: SLF001  # a part of the dispatcher
        self.run = self._new_run(posted=posted)

    def renew(self) -> None:
        """Follow the same prompt with a fresh run."""
        self.run = self._new_run(posted=True)
        if self.cancelled:
            self.run.tell(Signal.CANCEL)

    def _new_run(self, *, posted: bool) -> AttemptRun:
        claimed = self.claimed
        running = claimed.attempt.state is AttemptState.RUNNING
        job = Job(
            workflow_id=claimed.workflow.id,
            prompt_id=claimed.attempt.prompt_id,
            graph=claimed.graph,
            extra_data=claimed.extra_data,
            nodes=self._nodes,
            timeout_seconds=claimed.workflow.timeout_seconds,
            posted=posted,
            start_time=claimed.attempt.start_time if running else None,
        )
        return AttemptRun(self._dispatcher.backend, job, self)

    def started(self, start_time: int) -> None:
        """Write the start, and see whether another may be posted ahead now."""
        self._held = []
        self._dispatcher.note(self._write_start(start_time))
        self._dispatcher.wake()

    async def _write_start(self, start_time: int) -> None:
        """What is live is told after workflow:started, which waits for the disk."""
        try:
            await self._dispatcher._store.start(self.claimed.attempt.prompt_id, start_time)  # noqa: SLF001
        finally:
            held, self._held = self._held, None
            for event in held or ():
                self.publish(event)

    def end(self) -> None:
        """The verdict is about to be written. After it there is no more progress; nodes that ran are still told."""
        held, self._held = self._held, None
        for event in held or ():
            if not isinstance(event, WorkflowProgress):
                self.publish(event)

    def ended(self) -> None:
        """The next may go there while the verdict of this one is read and written."""
        self._dispatcher.wake()

    def produced(self, node_id: str, outputs: tuple[Output, ...]) -> None:
        """Tell of outputs as they appear; the verdict's list is the one that counts."""
        dispatcher = self._dispatcher
        event = ImagesGenerated(
            timestamp=dispatcher._clock.now_ms(),  # noqa: SLF001
            workflow_id=self.claimed.workflow.id,
            node_id=node_id,
            outputs=outputs,
        )
        dispatcher.note(dispatcher._store.append(event, patient=True))  # noqa: SLF001

    def publish(self, event: LiveEvent) -> None:
        """Pass on what is live."""
        if self.cancelled:
            return
        if isinstance(event, WorkflowProgress):
            self._dispatcher._live[self.claimed.workflow.id] = event  # noqa: SLF001
        if self._held is not None:
            self._held.append(event)
            return
        self._dispatcher._events.publish(event)  # noqa: SLF001


def _outcome(verdict: Verdict, now: int) -> Outcome:
    return Outcome(
        status=Status(verdict.result.value),
        start_time=verdict.start_time,
        completion_time=verdict.end_time or now,
        outputs=verdict.outputs,
        outputs_reused=verdict.outputs_reused,
        nodes=verdict.nodes,
        progress=verdict.progress,
        error=verdict.error,
        error_type=verdict.error_type,
        errors=verdict.errors,
        node_id=verdict.node_id,
        node_type=verdict.node_type,
    )


async def _as_coroutine(work: Awaitable[None]) -> None:
    await work
