"""Run one attempt of a workflow on one ComfyUI, from the POST to the verdict.

Must never post the same prompt twice, and never call a prompt lost before ComfyUI has denied it twice (DESIGN 2).
When the task is cancelled the prompt is left to ComfyUI: the attempt stays open, and the next start follows it again.
"""

from __future__ import annotations

import asyncio
from enum import StrEnum
from typing import Protocol
from urllib.parse import quote, urlencode

import msgspec
import structlog
from msgspec import Struct

from managers.comfyui.backend import Backend, Inbox, Location, Place, Signal, output_url
from managers.comfyui.client import Rejected, Unanswered
from managers.comfyui.outputs import outputs_of
from managers.comfyui.protocol import (
    End,
    Executed,
    Executing,
    ExecutionError,
    ExecutionStart,
    HistoryEntry,
    Message,
    PreviewFrame,
    end_of,
)
from managers.comfyui.rejection import findings_from_rejection, scrub
from managers.comfyui.tracker import GraphNode, Tracker
from managers.errors import BackendUnavailable
from managers.events.types import ErrorType, Event, Finding, LiveEvent, NodeCounts, Output, Preview

log = structlog.get_logger(__name__)

_DEAF_AFTER_SECONDS = 2.0
_LOOK_AFTER_SECONDS = 20.0
_LOST_AFTER_SECONDS, _LOST_AFTER_SECONDS_REMOTE = 1.0, 5.0
_REMOVE_EVERY_SECONDS = 0.5


class Job(Struct, frozen=True, kw_only=True):
    """One attempt. `posted`: it was found open, so it may be there already. `start_time` is epoch ms, if it ran."""

    workflow_id: str
    prompt_id: str
    graph: bytes
    extra_data: bytes | None
    nodes: dict[str, GraphNode]
    timeout_seconds: float
    posted: bool = False
    start_time: int | None = None


class Result(StrEnum):
    """How an attempt came out. GONE: it was cancelled and ComfyUI has let go of it."""

    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"
    WITHDRAWN = "withdrawn"
    GONE = "gone"


class Verdict(Struct, frozen=True, kw_only=True):
    """The end of an attempt. Times are epoch ms."""

    result: Result
    start_time: int | None = None
    end_time: int | None = None
    outputs: tuple[Output, ...] = ()
    outputs_reused: bool = False
    nodes: NodeCounts | None = None
    progress: int | None = None
    error: str | None = None
    error_type: ErrorType | None = None
    errors: tuple[Finding, ...] = ()
    node_id: str | None = None
    node_type: str | None = None


class Sink(Protocol):
    """Who listens to an attempt. Called on the loop, in order; must not block."""

    def started(self, start_time: int) -> None:
        """ComfyUI executes it since `start_time` (epoch ms)."""
        ...

    def ended(self) -> None:
        """ComfyUI executes it no more; the verdict follows."""
        ...

    def produced(self, node_id: str, outputs: tuple[Output, ...]) -> None:
        """A node has written outputs."""
        ...

    def publish(self, event: LiveEvent) -> None:
        """Progress, node events, previews."""
        ...


class AttemptRun:
    """One attempt in flight."""

    def __init__(self, backend: Backend, job: Job, sink: Sink) -> None:
        self.job = job
        self.started = job.start_time is not None
        self.ended = False
        self._backend = backend
        self._sink = sink
        self._tracker = Tracker(job.workflow_id, job.nodes)
        self._inbox: Inbox | None = None
        self._start_time = job.start_time
        self._deadline: float | None = None
        self._signals: set[Signal] = set()
        self._measuring: list[asyncio.Task[tuple[Output, ...]]] = []

    def tell(self, signal: Signal) -> None:
        """WITHDRAW: take it back if it has not started. CANCEL: take it away in any case."""
        self._signals.add(signal)
        if self._inbox is not None:
            self._inbox.put_nowait(signal)

    async def run(self) -> Verdict:
        """Post it, or follow what was posted, until ComfyUI has ended it or let go of it."""
        try:
            return await self._follow()
        finally:
            for measuring in self._measuring:
                measuring.cancel()

    async def _follow(self) -> Verdict:
        with self._backend.inbox(self.job.prompt_id, self.job.workflow_id) as self._inbox:
            if self._start_time is not None:
                self._set_deadline()
            frames_at_post = self._backend.frames
            verdict = await (self._look_until_answered() if self.job.posted else self._post())
            deaf_at = None if self.job.posted else self._backend.clock.monotonic() + _DEAF_AFTER_SECONDS
            while verdict is None:
                verdict = await self._commanded()
                if verdict is not None:
                    break
                item = await self._next(deaf_at)
                if deaf_at is not None and (item is not None or self._backend.frames != frames_at_post):
                    deaf_at = None
                if isinstance(item, Message):
                    verdict = await self._hear(item)
                elif isinstance(item, PreviewFrame):
                    self._preview(item)
                elif item is Signal.UP:
                    verdict = await self._look()
                elif item is None and deaf_at is not None:
                    deaf_at = None
                    await self._backend.reconnect()
                elif item is None:
                    verdict = await (self._time_out() if self._overdue() else self._look())
            return verdict

    # ---- what comes in

    async def _next(self, deaf_at: float | None) -> object:
        """The next frame or signal; None when it was time to look after the prompt instead."""
        assert self._inbox is not None  # noqa: S101  # only called inside `run`
        now = self._backend.clock.monotonic()
        until = min(at for at in (now + _LOOK_AFTER_SECONDS, self._deadline, deaf_at) if at is not None)
        if not self._inbox.empty():
            return self._inbox.get_nowait()
        try:
            async with asyncio.timeout(max(until - now, 0)):
                return await self._inbox.get()
        except TimeoutError:
            return None

    async def _hear(self, message: Message) -> Verdict | None:
        body = message.body
        self._feed(message)
        if isinstance(body, Executing) and body.node is None:
            if self.started:
                self.ended = True
                self._sink.ended()
            return await self._read_end()
        return None

    def _feed(self, message: Message) -> None:
        now = self._backend.clock.now_ms()
        events: list[Event] = self._tracker.feed(message.body, now)
        if isinstance(message.body, ExecutionStart):
            self._start(message.body.timestamp or now)
        for event in events:
            self._sink.publish(event)
        if isinstance(message.body, Executed):
            for node_id, outputs in self._tracker.evidence.outputs.items():
                if node_id in (message.body.node, message.body.display_node):
                    self._sink.produced(node_id, tuple(self._with_folder_url(output) for output in outputs))
                    # Its files are there now: by the time of the verdict this is done.
                    self._measuring.append(asyncio.create_task(self._backend.measure(outputs)))

    def _with_folder_url(self, output: Output) -> Output:
        """Before the verdict an output has no number in the run yet: it is named by its folder and backend."""
        if output.filename is None:
            return output
        path = f"{output.subfolder}/{output.filename}" if output.subfolder else output.filename
        query = urlencode({"backend": self._backend.name, "type": output.type or "output"})
        return msgspec.structs.replace(output, url=f"/v1/comfyui/output/{quote(path)}?{query}")

    def _start(self, start_time: int) -> None:
        if not self.started:
            self.started = True
            self._start_time = start_time
            self._set_deadline()
            self._sink.started(start_time)

    def _set_deadline(self) -> None:
        clock = self._backend.clock
        ran = max(0, clock.now_ms() - (self._start_time or clock.now_ms())) / 1000
        self._deadline = clock.monotonic() + self.job.timeout_seconds - ran

    def _overdue(self) -> bool:
        return self._deadline is not None and self._backend.clock.monotonic() >= self._deadline

    def _preview(self, frame: PreviewFrame) -> None:
        self._sink.publish(
            Preview(
                timestamp=self._backend.clock.now_ms(),
                workflow_id=self.job.workflow_id,
                prompt_id=self.job.prompt_id,
                node_id=frame.node_id,
                display_node_id=frame.display_node_id or frame.node_id,
                mime=frame.mime,
                image=frame.image,
            )
        )

    # ---- what goes out

    async def _post(self) -> Verdict | None:
        job = self.job
        if Signal.CANCEL in self._signals:
            return Verdict(result=Result.GONE)
        try:
            answer = await self._backend.client.post_prompt(
                prompt_id=job.prompt_id,
                client_id=self._backend.client_id,
                graph=job.graph,
                extra_data=job.extra_data,
            )
        except BackendUnavailable as error:
            # It never left us: nothing was charged, and it goes out again when the backend is back.
            return Verdict(result=Result.WITHDRAWN, error=str(error))
        except Unanswered as error:
            log.warning("POST /prompt without an answer", prompt_id=job.prompt_id, reason=str(error))
            return await self._look_until_answered()
        if isinstance(answer, Rejected):
            findings = tuple(findings_from_rejection(answer.body))
            text = "; ".join(dict.fromkeys(finding.message for finding in findings)) or scrub(answer.text)
            return self._refused(f"ComfyUI refused the workflow: {text or answer.status}", findings)
        if answer.prompt_id != job.prompt_id:
            await self._backend.client.delete_pending(answer.prompt_id)
            return Verdict(
                result=Result.FAILED,
                error="This ComfyUI gives prompts ids of its own, so none could be found again: use 0.3.45 or newer",
                error_type="backend",
            )
        if answer.node_errors:
            # ComfyUI would run the good outputs only: half a result is no result (CONTRACT 4).
            await self._remove()
            findings = tuple(findings_from_rejection({"error": None, "node_errors": answer.node_errors}))
            text = "; ".join(dict.fromkeys(finding.message for finding in findings))
            return self._refused(f"ComfyUI would run only a part of the workflow: {text}", findings)
        return None

    def _refused(self, error: str, findings: tuple[Finding, ...]) -> Verdict:
        return Verdict(
            result=Result.FAILED,
            end_time=self._backend.clock.now_ms(),
            error=error,
            error_type="validation",
            errors=findings,
        )

    async def _commanded(self) -> Verdict | None:
        if Signal.CANCEL in self._signals:
            await self._remove()
            return Verdict(result=Result.GONE)
        if Signal.WITHDRAW in self._signals:
            self._signals.discard(Signal.WITHDRAW)
            if not self.started:
                return await self._withdraw()
        return None

    async def _withdraw(self) -> Verdict | None:
        try:
            await self._backend.client.delete_pending(self.job.prompt_id)
            location = await self._backend.locate(self.job.prompt_id)
        except BackendUnavailable:
            return None
        if location.place is Place.ABSENT:
            return Verdict(result=Result.WITHDRAWN)
        return await self._judge(location)

    async def _remove(self) -> HistoryEntry | None:
        """Make ComfyUI let go of the prompt, however long that takes; its history, if it left one."""
        while True:
            try:
                location = await self._backend.locate(self.job.prompt_id)
                match location.place:
                    case Place.PENDING:
                        await self._backend.client.delete_pending(self.job.prompt_id)
                        continue
                    case Place.RUNNING:
                        await self._backend.client.interrupt(self.job.prompt_id)
                    case _:
                        return location.entry
            except BackendUnavailable as error:
                log.info("cannot remove the prompt yet", prompt_id=self.job.prompt_id, reason=str(error))
            await self._until_let_go()

    async def _until_let_go(self) -> None:
        """Wait for `executing null`, the sign that an interrupt took, but not long: an interrupt can be lost."""
        assert self._inbox is not None  # noqa: S101  # only called inside `run`
        try:
            async with asyncio.timeout(_REMOVE_EVERY_SECONDS):
                while True:
                    item = await self._inbox.get()
                    if isinstance(item, Message):
                        self._feed(item)
                        if isinstance(item.body, Executing) and item.body.node is None:
                            return
        except TimeoutError:
            return

    async def _time_out(self) -> Verdict:
        entry = await self._remove()
        if entry is None:
            return await self._perhaps_lost() or self._lost()  # an interrupt leaves a history: this was no interrupt
        if end_of(entry).verdict == "success":
            return await self._ended(entry)
        return Verdict(
            result=Result.FAILED,
            start_time=self._start_time,
            end_time=self._backend.clock.now_ms(),
            nodes=self._tracker.counts(),
            progress=self._tracker.percent,
            error=f"The workflow ran longer than its time limit of {self.job.timeout_seconds:g} s",
            error_type="timeout",
        )

    # ---- the truth

    async def _look(self) -> Verdict | None:
        try:
            return await self._judge(await self._backend.locate(self.job.prompt_id))
        except BackendUnavailable:
            return None  # the next UP, or the next look, asks again

    async def _look_until_answered(self) -> Verdict | None:
        while True:
            await self._backend.wait_up()
            try:
                return await self._judge(await self._backend.locate(self.job.prompt_id))
            except BackendUnavailable as error:
                log.info("cannot locate the prompt yet", prompt_id=self.job.prompt_id, reason=str(error))
                await asyncio.sleep(_LOST_AFTER_SECONDS)

    async def _judge(self, location: Location) -> Verdict | None:
        match location:
            case Location(Place.ENDED, HistoryEntry() as entry):
                return await self._ended(entry)
            case Location(Place.RUNNING):
                self._start(self._backend.clock.now_ms())
                return None
            case Location(Place.ABSENT):
                return await self._perhaps_lost()
            case _:
                return None

    async def _perhaps_lost(self) -> Verdict | None:
        """Absent once. A POST may still be on its way: ask again after a while with the socket up all the time."""
        while True:
            await self._backend.wait_up()
            await asyncio.sleep(_LOST_AFTER_SECONDS_REMOTE if self._backend.remote else _LOST_AFTER_SECONDS)
            if not self._backend.up:
                continue
            try:
                location = await self._backend.locate(self.job.prompt_id)
            except BackendUnavailable:
                continue
            if location.place is not Place.ABSENT:
                return await self._judge(location)
            return await self._from_evidence() or self._lost()

    def _lost(self) -> Verdict:
        return Verdict(
            result=Result.LOST,
            start_time=self._start_time,
            error="ComfyUI no longer knows the prompt: it was restarted, or its queue was cleared",
            error_type="lost",
        )

    async def _read_end(self) -> Verdict | None:
        """`executing null` came: the history entry is there now (PROTOCOL §1.4)."""
        try:
            entry = await self._backend.client.history(self.job.prompt_id)
        except BackendUnavailable:
            return None
        return await self._ended(entry) if entry is not None else await self._look()

    async def _ended(self, entry: HistoryEntry) -> Verdict:
        outputs = [
            output
            for node_id, node_output in entry.outputs.items()
            if node_id.split(".", 1)[0] in self.job.nodes  # 0.3.64 may list what other prompts left in its cache
            for output in outputs_of(node_id, node_output)
        ]
        return await self._conclude(end_of(entry), outputs)

    async def _from_evidence(self) -> Verdict | None:
        """ComfyUI died, or forgot, after the socket had shown the end: what was seen counts (DESIGN 2)."""
        seen = self._tracker.evidence
        if seen.verdict is None:
            return None
        outputs = [output for node_outputs in seen.outputs.values() for output in node_outputs]
        return await self._conclude(End(seen.verdict, seen.started, seen.ended, (), seen.error), outputs)

    async def _conclude(self, end: End, found: list[Output]) -> Verdict:
        job, clock = self.job, self._backend.clock
        outputs = await self._measured(found)
        outputs = tuple(
            msgspec.structs.replace(output, url=output_url(job.workflow_id, n)) if output.filename else output
            for n, output in enumerate(outputs)
        )
        files = [output for output in outputs if output.filename is not None]
        errors = [_blocked(error) for error in self._tracker.evidence.blocked]
        errors += [_missing(output) for output in files if output.size is None]
        total = len(job.nodes)
        cached = sum(node_id in end.cached for node_id in job.nodes)
        succeeded = end.verdict == "success"
        verdict = Verdict(
            result=Result.COMPLETED,
            start_time=end.start_time or self._start_time,
            end_time=end.end_time or clock.now_ms(),
            outputs=outputs,
            outputs_reused=bool(files) and all(output.node_id in end.cached for output in files),
            nodes=NodeCounts(total=total, done=total, cached=cached) if succeeded else self._tracker.counts(),
            progress=100 if succeeded else self._tracker.percent,
            errors=tuple(errors),
        )
        if succeeded:
            return verdict
        if end.verdict == "interrupted":
            return msgspec.structs.replace(
                verdict, result=Result.CANCELLED, error="It was interrupted in ComfyUI by somebody else"
            )
        error = end.error or ExecutionError(job.prompt_id, exception_message="ComfyUI says error without a reason")
        text = scrub(error.exception_message).strip() or scrub(error.exception_type) or "A node failed"
        return msgspec.structs.replace(
            verdict,
            result=Result.FAILED,
            error=f"{self._node_words(error)}{text}",
            error_type="oom" if is_out_of_memory(error) else "node",
            node_id=error.node_id or None,
            node_type=error.node_type or None,
        )

    async def _measured(self, found: list[Output]) -> tuple[Output, ...]:
        """With size and etag: known since ComfyUI named the file, or asked for now."""
        known = {_file(output): output for measuring in self._measuring for output in await measuring if output.etag}
        outputs = [
            msgspec.structs.replace(output, size=same.size, etag=same.etag) if same is not None else output
            for output, same in ((output, known.get(_file(output))) for output in found)
        ]
        if any(output.filename and output.size is None for output in outputs):
            return await self._backend.measure(found)
        return tuple(outputs)

    def _node_words(self, error: ExecutionError) -> str:
        node = self.job.nodes.get(error.node_id)
        return f"{node.name} (node {error.node_id}): " if node else ""


def _file(output: Output) -> tuple[str | None, ...]:
    return output.node_id, output.type, output.subfolder, output.filename


def is_out_of_memory(error: ExecutionError) -> bool:
    """By class or by text: a plain RuntimeError has only the text (PROTOCOL §5)."""
    return "OutOfMemory" in error.exception_type or "out of memory" in error.exception_message.lower()


def _blocked(error: ExecutionError) -> Finding:
    return Finding(
        code="execution_blocked",
        message=scrub(error.exception_message).strip() or "A node blocked this branch",
        severity="warning",
        node_id=error.node_id or None,
        class_type=error.node_type or None,
    )


def _missing(output: Output) -> Finding:
    return Finding(
        code="output_missing",
        message=f"ComfyUI names {output.filename}, which is not in its folder (a cached run does not write it anew)",
        severity="warning",
        node_id=output.node_id,
    )
