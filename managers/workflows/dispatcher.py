"""Hands work to one ComfyUI: one workflow executing, at most one posted ahead so that the card never idles.

Must never decide what an attempt came to (that is `comfyui.attempt`) nor what is legal (that is the store): it
claims, runs, and writes down. One dispatcher a backend.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection

import structlog
from msgspec import Struct

from managers.clock import Clock, IdMaker
from managers.comfyui.backend import Backend, BackendConfig, Signal
from managers.comfyui.preparing import Inputs
from managers.comfyui.recovery import keep_trust
from managers.comfyui.restart import RestartConfig
from managers.comfyui.tracker import GraphNode
from managers.comfyui.verdicts import Result, Verdict
from managers.errors import BackendUnavailable, StoreUnavailable
from managers.events.types import BackendDisconnected, StoredEvent, WorkflowProgress
from managers.workflows.forecast import Forecast
from managers.workflows.linking import BeforeComplete
from managers.workflows.model import ANY_BACKEND, Claimed, CostOf, Workflow
from managers.workflows.settlement import settle
from managers.workflows.slot import Publisher, Slot, Surroundings
from managers.workflows.store import WorkflowStore

log = structlog.get_logger(__name__)

_STORE_RETRY_SECONDS = 1.0
_UNREACHABLE_SECONDS = 1.0

Describe = Callable[[bytes], dict[str, GraphNode]]
"""A graph's JSON text -> its nodes, named (needs the display names of /object_info)."""


class DispatcherConfig(Struct, frozen=True, kw_only=True):
    """`prefetch`: post the next workflow while one runs, where a single prompt can be interrupted.

    `free_when_idle_seconds`: after so much idleness ComfyUI is asked to free the card's memory; 0 is never.
    `gone_seconds`: a ComfyUI that is away for so long is not waited for where another may run its work; 0 is never.
    """

    backend: BackendConfig
    prefetch: bool = True
    free_when_idle_seconds: float = 0
    gone_seconds: float = 120
    restart: RestartConfig = RestartConfig()


class Dispatcher:
    """The one who feeds a backend."""

    def __init__(
        self,
        config: DispatcherConfig,
        *,
        store: WorkflowStore,
        events: Publisher,
        live: dict[str, WorkflowProgress],
        forecast: Forecast,
        describe: Describe,
        clock: Clock,
        new_id: IdMaker,
        client_id: str,
        cost_of: CostOf,
        before_complete: BeforeComplete | None = None,
        inputs: Inputs | None = None,
    ) -> None:
        """`live` is where the progress of what runs can be read; this writes it."""
        self.name = config.backend.name
        self.pools = (ANY_BACKEND,) if self.name == ANY_BACKEND else (ANY_BACKEND, self.name)
        self.backend = Backend(
            config.backend, client_id, clock=clock, publish=events.publish, on_event=self._backend_told
        )
        self._surroundings = Surroundings(
            backend=self.backend,
            store=store,
            events=events,
            live=live,
            forecast=forecast,
            inputs=inputs,
            clock=clock,
            note=self.note,
            wake=self.wake,
        )
        self._config = config
        self._store = store
        self._live = live
        self._describe = describe
        self._clock = clock
        self._new_id = new_id
        self._cost_of = cost_of
        self._before_complete = before_complete
        self._slots: dict[str, Slot] = {}
        self._wake = asyncio.Event()
        self._halted = False
        self._away_since: float | None = None
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
        self._away_since = self._clock.monotonic()
        async with asyncio.TaskGroup() as self._tasks:
            for claimed in await self._store.open_attempts(self.name):
                self._begin(claimed, posted=True)
            self._tasks.create_task(self.backend.run(lambda: self._slots), name=f"backend {self.name}")
            self._tasks.create_task(
                keep_trust(self.backend, self._config.restart, self._new_id), name=f"trust {self.name}"
            )
            while True:
                await self._woken()
                self._wake.clear()
                self._give_up()
                await self._fill()

    async def _woken(self) -> None:
        """Until there may be work, or ComfyUI has been away for too long; the card is freed after long idleness."""
        while not self._wake.is_set():
            free, gone = self._until_free(), self._until_gone()
            try:
                async with asyncio.timeout(min((left for left in (free, gone) if left is not None), default=None)):
                    await self._wake.wait()
            except TimeoutError:
                if self._until_free() == 0:
                    await self._free()
                elif self._is_gone():
                    return

    def _until_free(self) -> float | None:
        """Seconds until the card's memory is to be given back, once; None: not now."""
        patience = self._config.free_when_idle_seconds
        if not patience or self._slots or self._freed:
            return None
        return max(0.0, self._idle_since + patience - self._clock.monotonic())

    async def _free(self) -> None:
        self._freed = True
        try:
            await self.backend.client.free()
        except BackendUnavailable as error:
            log.warning("could not free memory", backend=self.name, reason=str(error))

    async def aclose(self) -> None:
        """After `run` has ended for good."""
        await self.backend.client.aclose()

    def wake(self) -> None:
        """Something waits, or may: look again."""
        self._wake.set()

    def expect(self) -> bool:
        """A workflow is about to be stored. With nothing in hand its claim can share that commit; whether it will."""
        if self._slots or self._claiming or not self.open():
            return False
        self._expecting = True
        self.wake()
        return True

    def drain(self) -> None:
        """An operator takes this ComfyUI out: no new work, and what was only posted ahead is taken back.

        What executes runs to its end. The caller keeps it in the store.
        """
        self.backend.drained = True
        self._take_back()

    def resume(self) -> None:
        """It is back: work again."""
        self.backend.drained = False
        self.wake()

    @property
    def draining(self) -> bool:
        """An operator has taken it out."""
        return self.backend.drained

    def halt(self, *, take_back: bool) -> None:
        """The service stops: no new work. What was posted ahead may stay, so that the card works on meanwhile."""
        self._halted = True
        if take_back:
            self._take_back()

    def cancel(self, workflow_id: str) -> None:
        """Its verdict is stored: make ComfyUI let go of it."""
        if self._claiming:
            self._doomed.add(workflow_id)
        for slot in self._slots.values():
            if slot.claimed.workflow.id == workflow_id:
                slot.cancel()

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
        return next((slot.claimed.workflow.id for slot in self._there() if slot.run.started), None)

    @property
    def idle(self) -> bool:
        """It could begin something at once."""
        return self.open() and not self._there()

    def open(self) -> bool:
        """It is given work."""
        return self.backend.ready and not (self._halted or self.draining)

    def serves(self, workflow: Workflow) -> bool:
        """It could run here now."""
        return workflow.gpu in self.pools and self.name not in workflow.unfit and self.open()

    def give_back(self, idle: str) -> None:
        """Another backend is idle: what only waits behind something here can run there."""
        if any(slot.run.started for slot in self._there()):
            for slot in self._slots.values():
                workflow = slot.claimed.workflow
                shared = workflow.gpu == ANY_BACKEND and idle not in workflow.unfit
                if shared and not (slot.run.started or slot.cancelled):
                    slot.run.tell(Signal.WITHDRAW)

    # ---- handing out

    async def _fill(self) -> None:
        while self.open():
            pools = self._open_pools()
            waiting = self._store.next_in_line(pools, self.name)
            expecting, self._expecting = self._expecting and not self._slots, False
            if waiting is None and not expecting:
                if not (self._there() or self._store.counts().paused):
                    for other in self._others:
                        other.give_back(self.name)
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
            if not self.open():
                self._take_back()

    def _may_claim(self) -> bool:
        """Nothing of ours is in this ComfyUI, or only what executes and may get a neighbour."""
        there = self._there()
        return not there or (
            len(there) == 1
            and self._config.prefetch
            and self.backend.interrupts_by_id
            and not any(slot.cancelled for slot in there)
        )

    def _there(self) -> list[Slot]:
        """What this ComfyUI has not ended yet."""
        return [slot for slot in self._slots.values() if not slot.run.ended]

    def _open_pools(self) -> tuple[str, ...]:
        """What may be claimed now: work for any backend is not posted ahead while another could begin it."""
        if self._there() and any(other.idle for other in self._others):
            return tuple(pool for pool in self.pools if pool != ANY_BACKEND)
        return self.pools

    def _take_back(self) -> None:
        """All that is only posted ahead."""
        for slot in self._slots.values():
            if not (slot.run.started or slot.cancelled):
                slot.run.tell(Signal.WITHDRAW)

    # ---- gone

    def _until_gone(self) -> float | None:
        """Seconds until a ComfyUI that is away counts as gone; None: there is nothing to wait for."""
        if not self._config.gone_seconds or self._away_since is None or not self._slots:
            return None
        left = self._away_since + self._config.gone_seconds - self._clock.monotonic()
        return left if left > 0 else None

    def _is_gone(self) -> bool:
        away, patience = self._away_since, self._config.gone_seconds
        return bool(patience) and away is not None and self._clock.monotonic() - away >= patience

    def _give_up(self) -> None:
        """What is in a ComfyUI that is gone waits again where another may run it; its prompt is a ghost then."""
        if not self._slots or not self._is_gone():
            return
        words = f"ComfyUI {self.name} has not been reached for {self._config.gone_seconds:g} s, and others can run it"
        for slot in self._slots.values():
            workflow = slot.claimed.workflow
            if not slot.cancelled and any(other.serves(workflow) for other in self._others):
                slot.run.give_up(Verdict(result=Result.LOST, error=words, error_type="backend"))

    # ---- attempts

    def _begin(self, claimed: Claimed, *, posted: bool, cancelled: bool = False) -> None:
        self._freed = False
        slot = Slot(claimed, self._describe(claimed.graph), self._surroundings, posted=posted)
        self._slots[claimed.attempt.prompt_id] = slot
        if claimed.workflow.final or cancelled:
            slot.cancel()
        self._spawn(self._attend(slot))

    async def _attend(self, slot: Slot) -> None:
        prompt_id = slot.claimed.attempt.prompt_id
        try:
            verdict = await self._verdict(slot)
            if verdict.result is Result.WITHDRAWN and verdict.error:
                await asyncio.sleep(_UNREACHABLE_SECONDS)
            slot.end(completed=verdict.result is Result.COMPLETED)
            cost = self._cost_of(slot.claimed.workflow.id)
            if self._before_complete is not None and verdict.result is Result.COMPLETED and not slot.cancelled:
                slot.run.ended = True  # ComfyUI may have the next one meanwhile
                self.wake()
                await self._before_complete(slot.claimed.workflow.id, verdict.outputs)
            await self._until_stored(
                lambda: settle(self._store, self.backend, slot.claimed, verdict, now=self._clock.now_ms(), cost=cost)
            )
        finally:
            del self._slots[prompt_id]
            self._idle_since = self._clock.monotonic()
            self._live.pop(slot.claimed.workflow.id, None)
            self.wake()
            for other in self._others:  # what was withdrawn here has no event that tells them
                other.wake()

    async def _verdict(self, slot: Slot) -> Verdict:
        while True:
            try:
                return await slot.run.run()
            except Exception:
                # A fault of ours must not lose the prompt: follow it anew, as after a restart.
                log.exception("following a prompt failed", prompt_id=slot.claimed.attempt.prompt_id)
                await asyncio.sleep(_UNREACHABLE_SECONDS)
                slot.renew()
                self.wake()

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

    def _backend_told(self, event: StoredEvent) -> None:
        if isinstance(event, BackendDisconnected):
            self._away_since = self._clock.monotonic()
        elif self.backend.up:
            self._away_since = None
        self.note(self._store.append(event))
        self.wake()


async def _as_coroutine(work: Awaitable[None]) -> None:
    await work
