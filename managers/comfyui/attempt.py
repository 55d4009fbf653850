"""Run one attempt of a workflow on one ComfyUI, from the POST to the verdict.

Must never post the same prompt twice, and never call a prompt lost before ComfyUI has denied it twice (DESIGN 2).
When the task is cancelled the prompt is left to ComfyUI: the attempt stays open, and the next start follows it again.
"""

from __future__ import annotations

import asyncio

import structlog

from managers.comfyui.backend import Backend, Inbox, Location, Place, Signal
from managers.comfyui.client import Rejected, Unanswered
from managers.comfyui.measuring import Measuring, with_folder_url, with_run_url
from managers.comfyui.partial import partial
from managers.comfyui.preparing import Inputs, Preparing
from managers.comfyui.protocol import (
    End,
    Executed,
    Executing,
    ExecutionStart,
    HistoryEntry,
    Message,
    PreviewFrame,
    end_of,
)
from managers.comfyui.rejection import scrub
from managers.comfyui.tracker import Tracker
from managers.comfyui.verdicts import (
    Job,
    Result,
    Sink,
    Verdict,
    concluded,
    late,
    outputs_in,
    over_time,
    preview,
    refused,
)
from managers.comfyui.watchdog import StallReason
from managers.errors import BackendUnavailable
from managers.events.types import Event, Output

log = structlog.get_logger(__name__)

_DEAF_AFTER_SECONDS = 2.0
_LOOK_AFTER_SECONDS = 20.0
_LOST_AFTER_SECONDS, _LOST_AFTER_SECONDS_REMOTE = 1.0, 5.0
_REMOVE_EVERY_SECONDS = 0.5
_END_AGAIN_SECONDS = 1.0
_TOLERANCE_SECONDS = 0.01  # a timer may wake us a little early


class AttemptRun:
    """One attempt in flight."""

    def __init__(self, backend: Backend, job: Job, sink: Sink, inputs: Inputs | None = None) -> None:
        """`inputs` fetches what the graph names elsewhere; None: it is posted as it is."""
        self.job = job
        self.started = job.start_time is not None
        self.ended = False
        self._whole = False  # we have heard that ComfyUI took all of it
        self._backend = backend
        self._sink = sink
        self._tracker = Tracker(job.workflow_id, job.nodes)
        self._inbox: Inbox | None = None
        self._start_time = job.start_time
        self._deadline: float | None = None
        self._signals: set[Signal] = set()
        self._given_up: Verdict | None = None
        self._leash = asyncio.timeout(None)
        self._following = False
        self._silence_told = False
        self._measuring = Measuring(backend.measure)
        self._preparing = Preparing(inputs, backend)

    def tell(self, signal: Signal) -> None:
        """WITHDRAW: take it back if it has not started. CANCEL: take it away in any case."""
        self._signals.add(signal)
        self._preparing.call_off()
        if self._inbox is not None:
            self._inbox.put_nowait(signal)

    def give_up(self, verdict: Verdict) -> None:
        """Nobody waits for this ComfyUI any more: `run` comes back with this, whatever it is waiting for."""
        if self._following and self._given_up is None:
            self._given_up = verdict
            self._leash.reschedule(0)

    async def run(self) -> Verdict:
        """Post it, or follow what was posted, until ComfyUI has ended it or let go of it, or it was given up."""
        try:
            async with self._leash:
                self._following = True
                return await self._follow()
        except TimeoutError:
            if self._given_up is None or not self._leash.expired():
                raise
            return self._given_up
        finally:
            self._following = False
            await self._measuring.aclose()

    async def _follow(self) -> Verdict:
        with self._backend.inbox(self.job.prompt_id, self.job.workflow_id) as self._inbox:
            if self._start_time is not None:
                self._set_deadline()
            graph = None if self.job.posted else await self._prepare()
            frames_at_post = self._backend.frames
            if isinstance(graph, Verdict):
                return graph
            verdict = await (self._look_until_answered() if graph is None else self._post(graph))
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
                elif item is Signal.DOWN:
                    verdict = await self._read_shown_end()
                elif item is Signal.STALLED:
                    verdict = await (self._look() if self.started else self._withdraw())
                elif deaf_at is not None and deaf_at <= self._backend.clock.monotonic() + _TOLERANCE_SECONDS:
                    deaf_at = None
                    await self._backend.reconnect()
                elif item is None:  # signals are heard by `_commanded`
                    verdict = await self._look_after()
            return verdict

    # ---- what comes in

    async def _next(self, deaf_at: float | None) -> object:
        """The next frame or signal; None when it was time to look after the prompt instead."""
        assert self._inbox is not None  # noqa: S101  # only called inside `run`
        if not self._inbox.empty():
            return self._inbox.get_nowait()
        now = self._backend.clock.monotonic()
        times = (now + self._patience(), self._deadline, deaf_at)
        until = min(at for at in times if at is not None)
        try:
            async with asyncio.timeout(max(until - now, 0)):
                return await self._inbox.get()
        except TimeoutError:
            return None

    def _patience(self) -> float:
        """Seconds until the next look at a prompt of which nothing is heard."""
        watchdog = self._backend.watchdog
        if Signal.WITHDRAW in self._signals:
            return _REMOVE_EVERY_SECONDS
        if self.ended:  # the socket has said all it will say: its history could not be read
            return _END_AGAIN_SECONDS
        if not self.started:
            return watchdog.config.doubt if watchdog.doubtful() else _LOOK_AFTER_SECONDS
        if self._silence_told or not watchdog.config.stall:
            return _LOOK_AFTER_SECONDS
        return min(_LOOK_AFTER_SECONDS, max(0.0, watchdog.config.stall - self._backend.silent_seconds))

    async def _look_after(self) -> Verdict | None:
        """Nothing was heard for a while."""
        if self._overdue():
            return await self._stop(over_time(self.job))
        verdict = await self._look()
        watchdog = self._backend.watchdog
        if verdict is None and not self._silence_told and watchdog.silent(self._backend.clock.monotonic()):
            self._silence_told = True
            words = f"ComfyUI has said nothing about the workflow it runs for {watchdog.config.stall:g} s"
            if watchdog.config.stall_interrupt:
                self._backend.tell_silence(f"{words}; the workflow is stopped")
                return await self._stop(f"{words}, and was told to stop then (COMFYUI_STALL_INTERRUPT)")
            self._backend.tell_silence(f"{words}; it is trusted still")
        return verdict

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
        self._silence_told = False
        now = self._backend.clock.now_ms()
        events: list[Event] = self._tracker.feed(message.body, now)
        if isinstance(message.body, ExecutionStart):
            self._start(message.body.timestamp or now)
        for event in events:
            self._sink.publish(event)
        if isinstance(message.body, Executed):
            for node_id, outputs in self._tracker.evidence.outputs.items():
                if node_id in (message.body.node, message.body.display_node):
                    self._sink.produced(
                        node_id, tuple(with_folder_url(output, self._backend.name) for output in outputs)
                    )
                    self._measuring.begin(outputs)

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
        self._silence_told = False
        self._sink.publish(preview(self.job, frame, self._backend.clock.now_ms()))

    # ---- what goes out

    async def _prepare(self) -> bytes | Verdict:
        """The graph to post, its inputs in place. Whoever wants it back need not wait for them."""
        if not self._signals:
            graph = await self._preparing.graph(self.job)
            if graph is not None:
                return graph
        return Verdict(result=Result.GONE if Signal.CANCEL in self._signals else Result.WITHDRAWN)

    async def _post(self, graph: bytes) -> Verdict | None:
        job = self.job
        try:
            answer = await self._backend.client.post_prompt(
                prompt_id=job.prompt_id,
                client_id=self._backend.client_id,
                graph=graph,
                extra_data=job.extra_data,
            )
        except BackendUnavailable as error:
            # ComfyUI never had it: nothing was charged, and it goes out again when the backend is back.
            log.warning("POST /prompt was not taken", prompt_id=job.prompt_id, reason=str(error))
            return Verdict(result=Result.WITHDRAWN, error=str(error))
        except Unanswered as error:
            log.warning("POST /prompt without an answer", prompt_id=job.prompt_id, reason=str(error))
            return await self._look_until_answered()
        now = self._backend.clock.now_ms()
        if isinstance(answer, Rejected):
            otherwise = scrub(answer.text) or str(answer.status)
            return refused(answer.body, said="ComfyUI refused the workflow", otherwise=otherwise, now=now)
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
            body = {"error": None, "node_errors": answer.node_errors}
            return refused(body, said="ComfyUI would run only a part of the workflow", otherwise="", now=now)
        self._whole = True
        return None

    async def _commanded(self) -> Verdict | None:
        if Signal.CANCEL in self._signals:
            await self._remove()
            return Verdict(result=Result.GONE)
        if Signal.WITHDRAW in self._signals:
            return await self._withdraw()
        return None

    async def _withdraw(self) -> Verdict | None:
        self._signals.discard(Signal.WITHDRAW)
        if self.started:
            return None
        try:
            await self._backend.client.delete_pending(self.job.prompt_id)
            location = await self._backend.locate(self.job.prompt_id)
        except BackendUnavailable:
            self._signals.add(Signal.WITHDRAW)  # again, soon
            return None
        if location.place is Place.ABSENT:
            return Verdict(result=Result.WITHDRAWN)
        return await self._judge(location)

    async def _remove(self) -> Location:
        """Make ComfyUI let go of the prompt, however long that takes. ENDED or ABSENT then; RUNNING where it is
        proven that no interrupt will ever move it: the backend is stalled, and others may take its work.
        """
        backend, prompt_id = self._backend, self.job.prompt_id
        interrupted: float | None = None
        while True:
            try:
                location = await backend.locate(prompt_id)
                now = backend.clock.monotonic()
                match location.place:
                    case Place.PENDING:
                        await backend.client.delete_pending(prompt_id)
                        continue
                    case Place.RUNNING if backend.watchdog.unmoved(interrupted, now):
                        patience = backend.watchdog.config.interrupt
                        words = f"ComfyUI was told to stop a workflow, and {patience:g} s later nothing has moved"
                        backend.distrust(StallReason.UNMOVED, words)
                        return location
                    case Place.RUNNING:
                        await backend.client.interrupt(prompt_id)
                        interrupted = now if interrupted is None else interrupted
                    case _:
                        return location
            except BackendUnavailable as error:
                log.info("cannot remove the prompt yet", prompt_id=prompt_id, reason=str(error))
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

    async def _stop(self, words: str) -> Verdict:
        """It has had its time: it fails as `timeout`, unless it succeeds while it is being removed."""
        location = await self._remove()
        if location.place is Place.ABSENT:
            return await self._perhaps_lost() or self._lost()  # an interrupt leaves a history: this was no interrupt
        if location.entry is not None and end_of(location.entry).verdict == "success":
            return await self._ended(location.entry)
        if location.place is Place.RUNNING:
            words = f"{words}, and ComfyUI does not stop it"
        now = self._backend.clock.now_ms()
        return late(self._tracker, words, start_time=self._start_time, now=now)

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
        died = self._backend.watchdog.died_of(self.job.prompt_id)
        return Verdict(
            result=Result.LOST,
            start_time=self._start_time,
            error="ComfyUI died while it ran this"
            if died
            else "ComfyUI no longer knows the prompt: it was restarted, or its queue was cleared",
            error_type="lost",
            died=died,
            unseen=self.job.posted and not self.started,
        )

    async def _read_end(self) -> Verdict | None:
        """`executing null` came: the history entry is there now (PROTOCOL §1.4)."""
        try:
            entry = await self._backend.client.history(self.job.prompt_id)
        except BackendUnavailable:
            return None
        return await self._ended(entry) if entry is not None else await self._look()

    async def _ended(self, entry: HistoryEntry) -> Verdict:
        if not self._whole:
            try:
                refusal = await partial(self._backend.client, self.job, entry, self._backend.clock.now_ms())
            except BackendUnavailable as error:
                log.warning("cannot tell whether all of it ran", prompt_id=self.job.prompt_id, reason=str(error))
                refusal = None
            if refusal is not None:
                return refusal
        return await self._conclude(end_of(entry), outputs_in(self.job, entry))

    async def _read_shown_end(self) -> Verdict | None:
        """The socket broke. An end that it had shown is told now: it would die with us while we wait for ComfyUI."""
        if self._tracker.evidence.verdict is None:
            return None
        try:
            entry = await self._backend.client.history(self.job.prompt_id)
        except BackendUnavailable:
            entry = None
        return await self._from_evidence() if entry is None else await self._ended(entry)

    async def _from_evidence(self) -> Verdict | None:
        """ComfyUI died, or forgot, after the socket had shown the end: what was seen counts (DESIGN 2)."""
        assert self._inbox is not None  # noqa: S101  # only called inside `run`
        while not self._inbox.empty():  # what came while nobody listened was seen too
            item = self._inbox.get_nowait()
            if isinstance(item, Message):
                self._feed(item)
        seen = self._tracker.evidence
        if seen.verdict is None:
            return None
        outputs = [output for node_outputs in seen.outputs.values() for output in node_outputs]
        return await self._conclude(End(seen.verdict, seen.started, seen.ended, (), seen.error), outputs)

    async def _conclude(self, end: End, found: list[Output]) -> Verdict:
        measured = await self._measuring.done(found)
        outputs = tuple(with_run_url(output, self.job.workflow_id, n) for n, output in enumerate(measured))
        now = self._backend.clock.now_ms()
        return concluded(self.job, self._tracker, end, outputs, start_time=self._start_time, now=now)
