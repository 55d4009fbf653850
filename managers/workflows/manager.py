"""What routes ask of the queue: hand in, look, wait, cancel, reorder, pause. (To run again: `replay`.)

Must never know of HTTP, nor of a database: it checks a graph, gives it to the store, and wakes the dispatchers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import msgspec
from msgspec import Raw, Struct

from managers.clock import Clock, IdMaker
from managers.comfyui.catalogs import Catalogs
from managers.comfyui.graph import MAX_TEXT, REFUSED, find_long_text, parse_graph
from managers.comfyui.object_info import Catalog
from managers.comfyui.tracker import GraphNode, describe
from managers.comfyui.validation import Validation, concerned_classes, validate
from managers.errors import Conflict, Draining, InvalidRequest, InvalidWorkflow
from managers.events.log import EventLog, StoredFrame
from managers.events.types import Finding, LiveEvent, QueueStatus, StoredEvent, WorkflowProgress
from managers.workflows.dispatcher import Dispatcher
from managers.workflows.forecast import Forecast
from managers.workflows.linking import Linking
from managers.workflows.model import (
    ANY_BACKEND,
    CostOf,
    Filter,
    IdempotencyKey,
    MadeFrom,
    NewWorkflow,
    Priority,
    QueueCounts,
    Status,
    Submitted,
    Workflow,
    rank,
)
from managers.workflows.store import WorkflowStore
from managers.workflows.views import WorkflowView, attempt_view, node_time_views, view

_LARGE_GRAPH = 1000
"""Nodes whose check would hold up the loop: some 10 ms."""


class QueueConfig(Struct, frozen=True, kw_only=True):
    """`max_waiting` workflows, aging and time limit in seconds."""

    max_waiting: int = 10_000
    aging_seconds: float = 600
    timeout_seconds: float = 3600
    max_attempts: int = 3


class Submission(Struct, frozen=True, kw_only=True):
    """What a client hands in; `graph` and `extra_data` are JSON text. None: the configured value.

    `submitted_by` is the name of a key, of which `max_queued` may wait; None: as many as there is room for.
    `webhook_url`, checked already, is to be called when it starts and ends. Backends in `unfit` lack a model of it:
    others get it, where there are any.
    """

    graph: bytes
    priority: Priority = Priority.NORMAL
    gpu: str = ANY_BACKEND
    id: str | None = None
    metadata: dict[str, Any] | None = None
    extra_data: bytes | None = None
    max_attempts: int | None = None
    timeout_seconds: float | None = None
    submitted_by: str | None = None
    max_queued: int | None = None
    webhook_url: str | None = None
    made_from: MadeFrom | None = None
    unfit: tuple[str, ...] = ()


class DryRun(Struct, frozen=True, kw_only=True, rename="camel"):
    """What would become of a submission."""

    valid: bool
    status: Status
    errors: tuple[Finding, ...]
    eligible_backends: tuple[str, ...]
    queue_position: int


class Page(Struct, frozen=True, kw_only=True, rename="camel"):
    """A page of views, newest first."""

    workflows: tuple[WorkflowView, ...]
    next_cursor: str | None


class Events(Protocol):
    """The hub, as far as the queue needs it."""

    def publish(self, event: LiveEvent) -> None:
        """Tell what is live."""
        ...

    def publish_stored(self, pairs: Sequence[tuple[StoredEvent, StoredFrame]]) -> None:
        """Tell what was committed, in order."""
        ...


class WorkflowManager:
    """The queue's front desk."""

    def __init__(
        self,
        config: QueueConfig,
        *,
        store: WorkflowStore,
        events: Events,
        clock: Clock,
        new_id: IdMaker,
        cost_of: CostOf,
        links: Linking | None = None,
    ) -> None:
        """`attach` the dispatchers before the first call. `links`: who knows where outputs were uploaded to."""
        self.store = store
        self.log: EventLog = store if links is None else links.log(store)
        self._links = links
        self.live: dict[str, WorkflowProgress] = {}
        self.forecast = Forecast(store=store, clock=clock, describe=self.describe)
        self._config = config
        self._events = events
        self._clock = clock
        self._new_id = new_id
        self._cost_of = cost_of
        self._dispatchers: dict[str, Dispatcher] = {}
        self.catalogs = Catalogs([])
        self._watchers: dict[str, set[asyncio.Event]] = {}
        self._draining = False
        self._leaving = False

    def attach(self, dispatchers: Sequence[Dispatcher]) -> None:
        """Name those who do the work."""
        self._dispatchers = {dispatcher.name: dispatcher for dispatcher in dispatchers}
        for dispatcher in dispatchers:
            dispatcher.meet(dispatchers)
        self.catalogs = Catalogs([dispatcher.backend for dispatcher in dispatchers])
        self.forecast.attach(dispatchers)

    @property
    def dispatchers(self) -> Collection[Dispatcher]:
        """One for each backend."""
        return self._dispatchers.values()

    @property
    def draining(self) -> bool:
        """No new work is taken."""
        return self._draining

    def drain(self, *, leaving: bool = True) -> None:
        """Refuse new work and hand out none; what runs, runs on. `leaving`: nobody can wait for its end here."""
        self._draining = True
        self._leaving = self._leaving or leaving
        if leaving:
            for watchers in self._watchers.values():
                for changed in watchers:
                    changed.set()
        for dispatcher in self.dispatchers:
            dispatcher.halt(take_back=not leaving)

    def committed(self, pairs: Sequence[tuple[StoredEvent, StoredFrame]]) -> None:
        """The store's commit listener: tell everybody, wake who may have work, end who waited for an end."""
        if self._links is not None:
            pairs = self._links.live(pairs)
        self._events.publish_stored(pairs)
        for event, frame in pairs:
            self.forecast.committed(event)
            for changed in self._watchers.get(frame.workflow_id or "", ()):
                changed.set()
        self._wake()
        self._tell_queue()

    def describe(self, graph: bytes) -> dict[str, GraphNode]:
        """The nodes of a stored graph, named with what ComfyUI calls their classes."""
        nodes = parse_graph(msgspec.json.decode(graph))
        return describe(nodes, self.catalogs.node_class)

    # ---- in

    async def submit(
        self,
        submission: Submission,
        *,
        key: IdempotencyKey | None = None,
        strict: bool = False,
        retry_of: str | None = None,
    ) -> Submitted:
        """Check and store.

        Raises `InvalidRequest`, `InvalidWorkflow` (strict), `Conflict`, `IdempotencyMismatch`, `QueueFull`,
        `ShareFull`, `Draining`.
        """
        if key is not None and (replayed := await self.store.first_reply(key)) is not None:
            return replayed
        if self._draining:
            raise Draining("The service is about to stop and takes no new work")
        checked, node_total = await self._check(submission, strict=strict)
        if strict and checked.findings:
            raise InvalidWorkflow("The workflow has errors, and strict handling was asked for", checked.findings)
        failure = _failure(checked.findings)
        unfit: tuple[str, ...] = ()
        if failure is None:
            names = self.eligible(submission.gpu)
            fit = [name for name in checked.eligible if name not in submission.unfit] or checked.eligible
            unfit = tuple(name for name in names if name not in fit)
            any(self._dispatchers[name].expect() for name in fit)
        now = self._clock.now_ms()
        return await self.store.submit(
            NewWorkflow(
                id=submission.id or self._new_id(),
                graph=submission.graph,
                extra_data=submission.extra_data,
                priority=submission.priority,
                gpu=submission.gpu,
                rank=rank(submission.priority, now, self._config.aging_seconds),
                created_at=now,
                max_attempts=submission.max_attempts or self._config.max_attempts,
                timeout_seconds=submission.timeout_seconds or self._config.timeout_seconds,
                metadata=submission.metadata,
                errors=tuple(checked.findings),
                failure=failure,
                node_total=node_total,
                retry_of=retry_of,
                submitted_by=submission.submitted_by,
                unfit=unfit,
                webhook_url=submission.webhook_url,
                made_from=submission.made_from,
            ),
            key=key,
            max_waiting=self._config.max_waiting,
            max_queued=submission.max_queued,
        )

    async def dry_run(self, submission: Submission, *, strict: bool = False) -> DryRun:
        """What `submit` would say; nothing is stored."""
        checked, _ = await self._check(submission, strict=strict)
        failure = _failure(checked.findings)
        bad = bool(checked.findings) if strict else failure is not None
        place = rank(submission.priority, self._clock.now_ms(), self._config.aging_seconds)
        return DryRun(
            valid=not bad,
            status=Status.FAILED if bad else Status.QUEUED,
            errors=tuple(checked.findings),
            eligible_backends=tuple(checked.eligible),
            queue_position=0 if bad else self.store.ahead(submission.gpu, place),
        )

    # ---- look

    async def get(
        self, workflow_id: str, *, with_graph: bool = False, with_attempts: bool = False, with_nodes: bool = False
    ) -> WorkflowView:
        """Raises `NotFound`."""
        workflow = await self.store.get(workflow_id)
        (found,) = await self._views((workflow,))
        if with_graph or with_nodes:
            graph, _ = await self.store.graph(workflow_id)
            if with_graph:
                found = msgspec.structs.replace(found, workflow=Raw(graph))
            if with_nodes:
                nodes = await asyncio.to_thread(self.describe, graph)
                times = node_time_views(nodes, await self.forecast.node_times(workflow))
                found = msgspec.structs.replace(found, node_times=times)
        if with_attempts:
            attempts = await self.store.attempts(workflow_id)
            found = msgspec.structs.replace(found, attempts=tuple(map(attempt_view, attempts)))
        return found

    async def list(self, wanted: Filter) -> Page:
        """Newest first."""
        page = await self.store.list(wanted)
        return Page(workflows=await self._views(page.workflows), next_cursor=page.next_cursor)

    async def wait(self, workflow_id: str, seconds: float) -> Workflow:
        """The record when it is final, or after so many seconds as it is then. Raises `NotFound`."""
        with self._watch(workflow_id) as changed:
            workflow = await self.store.get(workflow_id)
            try:
                async with asyncio.timeout(seconds):
                    while not (workflow.final or self._leaving):
                        await changed.wait()
                        changed.clear()
                        workflow = await self.store.get(workflow_id)
            except TimeoutError:
                pass
            return workflow

    async def follow(self, workflow_id: str, after: int = 0) -> AsyncGenerator[StoredFrame, None]:
        """Its stored events behind `after`, then the new ones as they come; ends with the workflow."""
        with self._watch(workflow_id) as changed:
            while True:
                changed.clear()
                workflow = await self.store.get(workflow_id)
                for frame in await self.log.events_of(workflow_id, after):
                    after = frame.seq
                    yield frame
                if workflow.final or self._leaving:
                    return
                await changed.wait()

    async def snapshot(self, workflow_ids: Collection[str] | None) -> tuple[int, tuple[WorkflowView, ...]]:
        """The named workflows, else the running ones, with the `seq` they are up to."""
        found = await self.store.snapshot(workflow_ids)
        return found.seq, await self._views(found.workflows)

    def view(self, workflow: Workflow) -> WorkflowView:
        """The record with its place and its progress."""
        name, eta = workflow.id, self.forecast.eta(workflow)
        return view(workflow, self.store.position(name), self.live.get(name), self._cost_of(name), eta)

    def counts(self) -> QueueCounts:
        """The queue at a glance."""
        return self.store.counts()

    # ---- change

    async def cancel(self, workflow_id: str) -> Status:
        """Cancel; the status it has then. One that failed before it reached ComfyUI stays failed without complaint.

        Raises `NotFound`, `Conflict`.
        """
        try:
            workflow = await self.store.cancel(workflow_id, self._clock.now_ms(), self._cost_of(workflow_id))
        except Conflict:
            workflow = await self.store.get(workflow_id)
            if workflow.status is Status.FAILED and workflow.attempt == 0:
                return workflow.status
            raise
        for dispatcher in self.dispatchers:
            dispatcher.cancel(workflow_id)
        return workflow.status

    async def set_priority(self, workflow_id: str, priority: Priority) -> WorkflowView:
        """Raises `NotFound`, and `Conflict` when it waits no more."""
        workflow = await self.store.set_priority(workflow_id, priority)
        for dispatcher in self.dispatchers:
            dispatcher.moved(workflow)
        return (await self._views((workflow,)))[0]

    async def set_paused(self, paused: bool) -> QueueCounts:
        """Stop or resume handing out work; what is in ComfyUI runs on. Survives a restart."""
        await self.store.set_paused(paused)
        self._wake()
        self._tell_queue()
        return self.counts()

    # ---- inside

    async def _views(self, workflows: Sequence[Workflow]) -> tuple[WorkflowView, ...]:
        await self.forecast.prepare(workflows)
        if self._links is not None:
            workflows = await self._links.linked(workflows)
        return tuple(map(self.view, workflows))

    @contextmanager
    def _watch(self, workflow_id: str) -> Iterator[asyncio.Event]:
        """An event that is set whenever something about the workflow was committed."""
        changed = asyncio.Event()
        self._watchers.setdefault(workflow_id, set()).add(changed)
        try:
            yield changed
        finally:
            self._watchers[workflow_id].discard(changed)
            if not self._watchers[workflow_id]:
                del self._watchers[workflow_id]

    async def _check(self, submission: Submission, *, strict: bool) -> tuple[Validation, int]:
        names = self.eligible(submission.gpu)
        graph = _decoded(submission.graph, "/workflow")
        if submission.extra_data is not None and not isinstance(_decoded(submission.extra_data, "/extraData"), dict):
            raise _invalid("extraData must be an object", "/extraData")
        if len(submission.graph) > MAX_TEXT and (long := await asyncio.to_thread(find_long_text, graph)) is not None:
            raise InvalidRequest(long.message, [long])
        checked = await _validated(graph, await self.catalogs.current(names))
        refused = [finding for finding in checked.findings if finding.code in REFUSED]
        if refused:
            raise InvalidRequest(refused[0].message, refused)
        doubtful = concerned_classes(checked.findings, only_missing=not strict)
        if doubtful:
            # A stale cache must never refuse good work: ask again before saying no.
            checked = await _validated(graph, await self.catalogs.afresh(names, doubtful))
        return checked, len(graph) if isinstance(graph, dict) else 0

    def eligible(self, gpu: str) -> tuple[str, ...]:
        """The names of the backends that this `gpu` stands for. Raises `InvalidRequest` for one that is not known."""
        if gpu == ANY_BACKEND:
            return tuple(self._dispatchers)
        if gpu in self._dispatchers:
            return (gpu,)
        allowed = list(dict.fromkeys((ANY_BACKEND, *self._dispatchers)))
        message = f"There is no backend or pool named {gpu!r}; known: {', '.join(allowed)}"
        raise InvalidRequest(message, [Finding(code="unknown_gpu", message=message, pointer="/gpu", allowed=allowed)])

    def _wake(self) -> None:
        for dispatcher in self.dispatchers:
            dispatcher.wake()

    def _tell_queue(self) -> None:
        counts = self.store.counts()
        self._events.publish(
            QueueStatus(
                timestamp=self._clock.now_ms(), length=counts.length, running=counts.running, paused=counts.paused
            )
        )


async def _validated(graph: Any, catalogs: Sequence[Catalog]) -> Validation:
    if isinstance(graph, dict) and len(graph) > _LARGE_GRAPH:
        return await asyncio.to_thread(validate, graph, catalogs)
    return validate(graph, catalogs)


def _failure(findings: Sequence[Finding]) -> str | None:
    errors = [finding.message for finding in findings if finding.severity == "error"]
    return "; ".join(dict.fromkeys(errors)) or None


def _decoded(text: bytes, pointer: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise _invalid(f"{pointer[1:]} is not valid JSON: {error}", pointer) from error


def _invalid(message: str, pointer: str) -> InvalidRequest:
    return InvalidRequest(message, [Finding(code="invalid_value", message=message, pointer=pointer)])
