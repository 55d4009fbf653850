"""Any sequence of calls to the embedded store, with crashes and restarts, compared with a plain dict.

A crash is what kill -9 leaves: the files as they are on the disk, opened by somebody else. What was acknowledged is
there; what was on its way is there wholly or not at all. (tests/test_store_sqlite.py kills a real process.)
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec.structs import replace

from managers.errors import Conflict, IdempotencyMismatch, ShareFull
from managers.events.log import StoredFrame
from managers.workflows.model import Claimed, IdempotencyKey, NewWorkflow, Outcome, Priority, Status, rank
from managers.workflows.sqlite_schema import FILE_NAME
from managers.workflows.sqlite_store import SqliteStore
from managers.workflows.store import Snapshot
from tests.store_kit import AGING_SECONDS, Kit

FINAL = {"completed", "failed", "cancelled"}
OPEN = {"posted", "running"}
POOLS = {"a": ("local", "a"), "b": ("local", "b")}
SHARE = 3
LONGEST_COMMIT = 10

AFTER = {
    ("new", "queued"): "queued",
    ("queued", "started"): "running",
    ("queued", "error"): "failed",
    ("queued", "error, again"): "lost",
    ("queued", "cancelled"): "cancelled",
    ("running", "completed"): "completed",
    ("running", "error"): "failed",
    ("running", "error, again"): "lost",
    ("running", "cancelled"): "cancelled",
    ("lost", "queued"): "queued",
}
"""The legal moves, once more and by what is told of them: the log must lead to the rows."""

MOVES: list[tuple[str, dict[str, Any]]] = [
    ("start", {}),
    ("start", {}),
    *[
        ("finish", {"status": status, "seen": seen})
        for status in (Status.COMPLETED, Status.FAILED, Status.CANCELLED)
        for seen in (True, False)
    ],
    *[("lose", {"retry": retry, "died": died}) for retry in (True, True, False) for died in (True, False)],
    ("withdraw", {}),
    ("close_attempt", {}),
]
"""What can become of an attempt."""

_MEMORY = Path("/dev/shm")
"""Thousands of fsyncs: where there is a file system in memory they are quick, and as true for this."""

index = st.integers(min_value=0, max_value=50)
pools = st.sampled_from(["local", "a", "b"])
submitters = st.sampled_from([None, "ann"])
cuts = st.one_of(st.none(), st.floats(min_value=0, max_value=0.999))


@dataclass
class Record:
    id: str
    number: int
    created_at: int
    priority: Priority
    gpu: str
    submitter: str | None
    retry_of: str | None
    status: str = "queued"
    charged: int = 0
    error_type: str | None = None
    attempts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def held(self) -> bool:
        return any(attempt["state"] in OPEN for attempt in self.attempts)


def folder() -> Path:
    return Path(tempfile.mkdtemp(dir=_MEMORY if _MEMORY.is_dir() else None))


class Machine(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.folder = folder()
        self.runner = asyncio.Runner()
        self.kit = Kit(lambda clock, ids, aging: SqliteStore(self.folder, clock=clock, ids=ids, aging_seconds=aging))
        self.runner.run(self.kit.open())
        self.aging = AGING_SECONDS
        # The model.
        self.records: dict[str, Record] = {}
        self.keys: dict[str, tuple[str, int]] = {}
        self.events: list[tuple[str, str]] = []
        self.paused = False
        self.drained: set[str] = set()
        self.touched: set[str] = set()  # whose attempts are to be compared

    def teardown(self) -> None:
        if not hasattr(self, "runner"):
            return
        try:
            self.touched.update(self.records)
            self.all_is_the_same()
        finally:
            self.runner.run(self.kit.store.close())
            self.runner.close()
            shutil.rmtree(self.folder)

    # ---- questions to the model

    def line(self, gpu: str | None = None) -> list[Record]:
        waiting = [one for one in self.records.values() if one.status == "queued" and gpu in (None, one.gpu)]
        return sorted(waiting, key=self.place)

    def place(self, one: Record) -> tuple[int, int]:
        return rank(one.priority, one.created_at, self.aging), one.number

    def first(self, backend: str) -> Record | None:
        free = [one for one in self.line() if one.gpu in POOLS[backend] and not one.held]
        return free[0] if free and not self.paused else None

    def some(self, n: int) -> Record:
        return list(self.records.values())[n % len(self.records)]

    def some_attempt(self, n: int) -> tuple[Record, dict[str, Any]]:
        """Mostly an open one: nothing becomes of the others."""
        attempts = [(one, attempt) for one in self.records.values() for attempt in one.attempts]
        live = [found for found in attempts if found[1]["state"] in OPEN]
        found = live if live and n % 4 else attempts
        record, attempt = found[n % len(found)]
        self.touched.add(record.id)
        return record, attempt

    def tell(self, record: Record, *kinds: str) -> None:
        self.events += [(record.id, kind) for kind in kinds]

    # ---- what happens to the model

    def model_submitted(self, new: NewWorkflow) -> Record:
        record = self.records[new.id] = Record(
            id=new.id,
            number=len(self.records) + 1,
            created_at=new.created_at,
            priority=new.priority,
            gpu=new.gpu,
            submitter=new.submitted_by,
            retry_of=new.retry_of,
        )
        self.tell(record, "queued")
        return record

    def model_claimed(self, record: Record, prompt_id: str, backend: str) -> None:
        self.touched.add(record.id)
        record.charged += 1
        record.attempts.append(
            {
                "prompt_id": prompt_id,
                "number": record.charged,
                "backend": backend,
                "state": "posted",
                "died": False,
            }
        )

    def model_cancelled(self, record: Record) -> None:
        if record.status != "cancelled":
            record.status = "cancelled"
            self.tell(record, "cancelled")

    # ---- what is done to both

    def new(self, priority: Priority, gpu: str, submitter: str | None, retry_of: str | None = None) -> NewWorkflow:
        new = self.kit.new(priority, gpu=gpu, submitted_by=submitter, retry_of=retry_of)
        return replace(new, rank=rank(priority, new.created_at, self.aging))

    def submit_both(self, new: NewWorkflow, key: IdempotencyKey | None = None) -> None:
        share = None if new.submitted_by is None else SHARE
        waiting = sum(one.submitter == new.submitted_by for one in self.line())
        try:
            result = self.runner.run(self.kit.store.submit(new, key=key, max_queued=share))
        except ShareFull:
            assert share is not None
            assert waiting >= share
            return
        assert share is None or waiting < share
        record = self.model_submitted(new)
        assert (result.queue_position, result.status) == (self.line(record.gpu).index(record), Status.QUEUED)
        assert (result.workflow.id, result.workflow.number) == (record.id, record.number)
        if key is not None:
            self.keys[key.key] = (record.id, result.queue_position)

    @rule(priority=st.sampled_from(Priority), gpu=pools, submitter=submitters, later=st.integers(0, 10**6))
    def submit(self, priority: Priority, gpu: str, submitter: str | None, later: int) -> None:
        self.kit.clock.now += later
        self.submit_both(self.new(priority, gpu, submitter))

    @rule(key=st.sampled_from(["k1", "k2"]), gpu=pools)
    def submit_once(self, key: str, gpu: str) -> None:
        """A client that was not answered says it again; another workflow under that key is refused."""
        new, known = self.new(Priority.NORMAL, gpu, None), self.keys.get(key)
        promise = IdempotencyKey("route", key, "hash")
        if known is None:
            self.submit_both(new, promise)
            return
        again = self.runner.run(self.kit.store.submit(new, key=promise))
        assert (again.replayed, again.workflow.id, again.queue_position) == (True, *known)
        try:
            self.runner.run(self.kit.store.submit(new, key=replace(promise, body_hash="other")))
        except IdempotencyMismatch:
            return
        raise AssertionError("another body was taken under a known key")

    @precondition(lambda self: any(one.status in {"failed", "cancelled"} for one in self.records.values()))
    @rule(n=index)
    def retry(self, n: int) -> None:
        ended = [one for one in self.records.values() if one.status in {"failed", "cancelled"}]
        old = ended[n % len(ended)]
        self.submit_both(self.new(old.priority, old.gpu, old.submitter, retry_of=old.id))

    @rule(backend=st.sampled_from(["a", "b"]))
    def claim(self, backend: str) -> None:
        expected, prompt_id = self.first(backend), self.kit.ids()
        claimed = self.runner.run(
            self.kit.store.claim(backend=backend, pools=POOLS[backend], prompt_id=prompt_id, now=self.kit.clock.now)
        )
        assert (claimed and claimed.workflow.id) == (expected and expected.id)
        if expected is not None:
            self.model_claimed(expected, prompt_id, backend)

    @rule(backend=st.sampled_from(["a", "b"]), started=st.booleans())
    def get_going(self, backend: str, started: bool) -> None:
        """The usual beginning: without it most sequences would not get far."""
        self.submit_both(self.new(Priority.HIGH, backend, None))
        self.claim(backend)
        if started and any(one.attempts for one in self.records.values()):
            self.start(-1)

    @precondition(lambda self: any(one.attempts for one in self.records.values()))
    @rule(n=index, move=st.sampled_from(MOVES))
    def one_move(self, n: int, move: tuple[str, dict[str, Any]]) -> None:
        getattr(self, move[0])(n, **move[1])

    @precondition(lambda self: any(one.attempts for one in self.records.values()))
    @rule(moves=st.lists(st.tuples(index, st.sampled_from(MOVES)), min_size=2, max_size=5))
    def some_moves(self, moves: list[tuple[int, tuple[str, dict[str, Any]]]]) -> None:
        for n, move in moves:
            self.one_move(n, move)
            if move[0] == "lose" or n % 3 == 0:  # what was lost is often the first to go again
                self.claim("ab"[n % 2])

    def start(self, n: int) -> None:
        record, attempt = self.some_attempt(n)
        result = self.runner.run(self.kit.store.start(attempt["prompt_id"], self.kit.clock.now))
        moved = attempt["state"] == "posted" and record.status == "queued"
        if attempt["state"] == "posted":
            attempt["state"] = "running"
        if moved:
            record.status = "running"
            self.tell(record, "started")
        assert (result is not None) == moved

    def finish(self, n: int, status: Status, seen: bool) -> None:
        """With `seen` the start is named; without it nothing that waits can complete."""
        record, attempt = self.some_attempt(n)
        outcome = Outcome(
            status=status, start_time=5 if seen else None, completion_time=6, error="e", error_type="node"
        )
        waits = record.status == "queued" and attempt["state"] in OPEN
        try:
            result = self.runner.run(self.kit.store.finish(attempt["prompt_id"], outcome))
        except Conflict:
            assert waits
            assert not seen
            assert status is Status.COMPLETED
            return
        assert not (waits and not seen and status is Status.COMPLETED)
        moved = attempt["state"] in OPEN and record.status not in FINAL
        if attempt["state"] in OPEN:
            attempt["state"] = "ended"
        if moved:
            if waits and seen:
                self.tell(record, "started")
            record.status, record.error_type = status.value, "node"
            self.tell(record, "error" if status is Status.FAILED else status.value)
        assert (result is not None) == moved

    def lose(self, n: int, retry: bool, died: bool) -> None:
        record, attempt = self.some_attempt(n)
        result = self.runner.run(
            self.kit.store.lose(
                attempt["prompt_id"],
                error="e",
                error_type="lost",
                now=self.kit.clock.now,
                retry=retry,
                died=died,
            )
        )
        moved = attempt["state"] in OPEN and record.status not in FINAL
        if attempt["state"] in OPEN:
            attempt["state"], attempt["died"] = "lost", died
        if moved:
            poison = died and sum(one["died"] for one in record.attempts) >= 2
            again = retry and not poison
            record.status = "queued" if again else "failed"
            record.error_type = None if again else "poison" if poison else "lost"
            self.tell(record, *(["error, again", "queued"] if again else ["error"]))
        assert (result is not None) == moved

    def withdraw(self, n: int) -> None:
        record, attempt = self.some_attempt(n)
        result = self.runner.run(self.kit.store.withdraw(attempt["prompt_id"], self.kit.clock.now))
        moved = attempt["state"] == "posted" and record.status == "queued"
        if attempt["state"] == "posted":
            attempt["state"] = "withdrawn"
        if moved:
            record.charged -= 1
        assert (result is not None) == moved

    def close_attempt(self, n: int) -> None:
        record, attempt = self.some_attempt(n)
        self.runner.run(self.kit.store.close_attempt(attempt["prompt_id"], self.kit.clock.now))
        if attempt["state"] in OPEN and record.status in FINAL:
            attempt["state"] = "ended"

    @precondition(lambda self: self.records)
    @rule(n=index)
    def cancel(self, n: int) -> None:
        record = self.some(n)
        try:
            self.runner.run(self.kit.store.cancel(record.id, self.kit.clock.now))
        except Conflict as conflict:
            assert record.status == conflict.current_status  # noqa: PT017 - both outcomes are compared
            assert record.status in {"completed", "failed"}
        else:
            assert record.status not in {"completed", "failed"}
            self.model_cancelled(record)

    @precondition(lambda self: self.records)
    @rule(n=index, priority=st.sampled_from(Priority))
    def set_priority(self, n: int, priority: Priority) -> None:
        record = self.some(n)
        try:
            self.runner.run(self.kit.store.set_priority(record.id, priority))
        except Conflict as conflict:
            assert record.status == conflict.current_status != "queued"  # noqa: PT017
        else:
            assert record.status == "queued"
            record.priority = priority

    @rule(what=st.sampled_from(["pause", "a", "b"]), on=st.booleans())
    def switch(self, what: str, on: bool) -> None:
        """The whole queue, or one backend."""
        if what == "pause":
            self.runner.run(self.kit.store.set_paused(on))
            self.paused = on
        else:
            self.runner.run(self.kit.store.set_drained(what, on))
            (self.drained.add if on else self.drained.discard)(what)

    # ---- the end of the process

    @rule(aging=st.sampled_from([0, 1, AGING_SECONDS]))
    def restart(self, aging: int) -> None:
        self.runner.run(self.kit.reopen(aging))
        self.aging = aging
        self.touched.update(self.records)

    @rule()
    def crash(self) -> None:
        """Between two operations: everything was acknowledged."""
        self.open_copy(self.copy())

    @rule(what=st.sampled_from(["submit", "claim", "cancel"]), n=index, gpu=pools, cut=cuts)
    def crash_in_the_middle(self, what: str, n: int, gpu: str, cut: float | None) -> None:
        """Of one operation."""
        store, now = self.kit.store, self.kit.clock.now
        live = [one for one in self.records.values() if one.status not in FINAL]
        if what == "claim":
            backend, prompt_id = "ab"[n % 2], self.kit.ids()
            expected = self.first(backend)
            pools = POOLS[backend]
            self.crash_in(lambda: store.claim(backend=backend, pools=pools, prompt_id=prompt_id, now=now), cut)
            if cut is None and expected is not None:
                self.model_claimed(expected, prompt_id, backend)
        elif what == "cancel" and live:
            record = live[n % len(live)]
            self.crash_in(lambda: store.cancel(record.id, now), cut)
            if cut is None:
                self.model_cancelled(record)
        else:
            new = self.new(Priority.NORMAL, gpu, None)
            self.crash_in(lambda: store.submit(new), cut)
            if cut is None:
                self.model_submitted(new)

    def crash_in(self, operation: Callable[[], Awaitable[object]], cut: float | None) -> None:
        """The operation is on the disk and nobody has been told; with `cut` only this part of its last write is."""
        store, heard = self.kit.store, len(self.kit.heard)
        log = self.folder / f"{FILE_NAME}-wal"
        before, commits = log.stat().st_size, store.commits  # type: ignore[attr-defined]  # of SqliteStore
        loop = self.runner.get_loop()

        async def operate() -> object:
            return await operation()

        task = loop.create_task(operate())
        loop.call_soon(loop.stop)
        loop.run_forever()  # one turn: the writer has it, and its answer stays behind
        until = time.monotonic() + LONGEST_COMMIT
        while store.commits == commits and time.monotonic() < until:  # type: ignore[attr-defined]
            time.sleep(0.0005)  # another thread's commit, which the loop must not hear of
        assert not task.done()
        written = log.stat().st_size - before
        copy = self.copy()
        if cut is not None:
            with (copy / log.name).open("rb+") as file:
                file.truncate(before + int(written * cut))
        self.open_copy(copy)
        self.runner.run(_until(task))
        del self.kit.heard[heard:]  # the process that would have told it is dead

    def copy(self) -> Path:
        copy = folder()
        for file in self.folder.glob(f"{FILE_NAME}*"):
            shutil.copy(file, copy)
        return copy

    def open_copy(self, copy: Path) -> None:
        old, left = self.kit.store, self.folder
        self.folder = copy
        self.kit.store = self.kit._make(self.kit.clock, self.kit.ids, self.aging)
        self.runner.run(self.kit.open())
        self.runner.run(old.close())
        self.touched.update(self.records)
        shutil.rmtree(left)

    # ---- what must be the same after each step

    def the_line_is_the_same(self) -> None:
        store = self.kit.store
        for gpu in ("local", "a", "b"):
            line = self.line(gpu)
            assert [store.position(one.id) for one in line] == list(range(len(line)))
        for one in self.records.values():
            assert one.status == "queued" or store.position(one.id) is None
        for backend, of_backend in POOLS.items():
            first = self.first(backend)
            assert store.next_in_line(of_backend, backend) == (first and self.place(first))
        counts = store.counts()
        assert counts.waiting == {
            priority: sum(one.priority is priority for one in self.line()) for priority in Priority
        }
        assert counts.running == sum(one.status == "running" for one in self.records.values())
        assert counts.oldest_created_at == min((one.created_at for one in self.line()), default=None)
        assert counts.paused == self.paused

    @invariant()
    def all_is_the_same(self) -> None:
        self.the_line_is_the_same()
        self.runner.run(self.the_file_is_the_same())

    async def the_file_is_the_same(self) -> None:
        store = self.kit.store
        log, snapshot, opened, drained = await asyncio.gather(
            store.events_after(0, 10_000),
            store.snapshot(list(self.records)),
            store.open_attempts(),
            store.drained(),
        )
        attempts = await asyncio.gather(*(store.attempts(workflow_id) for workflow_id in sorted(self.touched)))
        self.the_log_is_the_same_and_leads_to_the_rows(log)
        self.the_records_are_the_same(snapshot)
        assert drained == self.drained
        self.the_open_attempts_are_the_same(opened)
        for workflow_id, found in zip(sorted(self.touched), attempts, strict=True):
            assert [
                {name: getattr(attempt, name) for name in ("prompt_id", "number", "backend", "state", "died")}
                for attempt in found
            ] == self.records[workflow_id].attempts
        self.touched.clear()

    def the_log_is_the_same_and_leads_to_the_rows(self, log: Sequence[StoredFrame]) -> None:
        store = self.kit.store
        assert [frame.seq for frame in log] == list(range(1, len(self.events) + 1))
        assert store.last_seq == len(self.events)
        told = [msgspec.json.decode(frame.data) for frame in log]
        kinds = [
            event["type"].removeprefix("workflow:") + (", again" if event.get("willRetry") else "") for event in told
        ]
        assert [(frame.workflow_id, kind) for frame, kind in zip(log, kinds, strict=True)] == self.events
        heard = [frame.seq for _, frame in self.kit.heard]
        assert heard == sorted(set(heard))
        assert all(log[frame.seq - 1] == frame for _, frame in self.kit.heard)
        statuses = dict.fromkeys(self.records, "new")
        for frame, kind in zip(log, kinds, strict=True):
            statuses[frame.workflow_id or ""] = AFTER[statuses[frame.workflow_id or ""], kind]
        assert statuses == {one.id: one.status for one in self.records.values()}

    def the_records_are_the_same(self, snapshot: Snapshot) -> None:
        assert snapshot.seq == len(self.events)
        assert [
            (one.id, one.number, one.status, one.attempt, one.priority, one.submitted_by, one.retry_of)
            for one in snapshot.workflows
        ] == [
            (one.id, one.number, one.status, one.charged, one.priority, one.submitter, one.retry_of)
            for one in self.records.values()
        ]
        for one, row in zip(self.records.values(), snapshot.workflows, strict=True):
            assert one.status in FINAL or row.rank == self.place(one)[0]
            if one.status in {"failed", "queued"}:
                assert row.error_type == one.error_type

    def the_open_attempts_are_the_same(self, opened: Sequence[Claimed]) -> None:
        left = [(claimed.workflow.id, claimed.attempt.prompt_id) for claimed in opened]
        assert sorted(left) == sorted(
            (one.id, attempt["prompt_id"])
            for one in self.records.values()
            for attempt in one.attempts
            if attempt["state"] in OPEN
        )
        assert len({workflow_id for workflow_id, _ in left}) == len(left)


async def _until(task: asyncio.Task[object]) -> None:
    await task


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=80, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
