"""Any sequence of calls to the embedded store, compared with a model so simple that it can be believed."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec.structs import replace

from managers.errors import Conflict
from managers.workflows.model import Outcome, Priority, Status, rank
from managers.workflows.sqlite_store import SqliteStore
from tests.store_kit import AGING_SECONDS, Kit

FINAL = {"completed", "failed", "cancelled"}
POOLS = {"a": ("local", "a"), "b": ("local", "b")}
index = st.integers(min_value=0, max_value=50)


@dataclass
class Record:
    id: str
    number: int
    created_at: int
    priority: Priority
    gpu: str
    status: str = "queued"
    charged: int = 0
    attempts: list[list[Any]] = field(default_factory=list)  # [prompt_id, number, state]

    @property
    def open(self) -> bool:
        return any(state in {"posted", "running"} for _, _, state in self.attempts)


class Machine(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.runner = asyncio.Runner()
        self.kit = Kit(lambda clock, ids, aging: SqliteStore(self.folder, clock=clock, ids=ids, aging_seconds=aging))
        self.runner.run(self.kit.open())
        self.aging = AGING_SECONDS
        self.paused = False
        self.records: list[Record] = []
        self.events: list[str] = []

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            self.runner.run(self.kit.store.close())
            self.runner.close()
            shutil.rmtree(self.folder)

    # ---- the model

    def line(self, gpu: str | None = None) -> list[Record]:
        waiting = [one for one in self.records if one.status == "queued" and gpu in (None, one.gpu)]
        return sorted(waiting, key=lambda one: (rank(one.priority, one.created_at, self.aging), one.number))

    def first(self, backend: str) -> Record | None:
        free = [one for one in self.line() if one.gpu in POOLS[backend] and not one.open]
        return free[0] if free and not self.paused else None

    def pick(self, n: int) -> tuple[Record, list[Any]]:
        attempts = [(one, attempt) for one in self.records for attempt in one.attempts]
        return attempts[n % len(attempts)]

    def tell(self, *events: str) -> None:
        self.events += [f"workflow:{event}" for event in events]

    # ---- what is done to both

    @rule(priority=st.sampled_from(Priority), gpu=st.sampled_from(["local", "a", "b"]), later=st.integers(0, 10**6))
    def submit(self, priority: Priority, gpu: str, later: int) -> None:
        self.kit.clock.now += later
        new = self.kit.new(priority, gpu=gpu)
        new = replace(new, rank=rank(priority, new.created_at, self.aging))
        result = self.runner.run(self.kit.store.submit(new))
        record = Record(new.id, result.workflow.number, new.created_at, priority, gpu)
        self.records.append(record)
        assert result.queue_position == self.line(gpu).index(record)
        self.tell("queued")

    @rule(backend=st.sampled_from(["a", "b"]))
    def claim(self, backend: str) -> None:
        expected, prompt = self.first(backend), self.kit.ids()
        claimed = self.runner.run(
            self.kit.store.claim(backend=backend, pools=POOLS[backend], prompt_id=prompt, now=self.kit.clock.now)
        )
        assert (claimed and claimed.workflow.id) == (expected and expected.id)
        if expected is not None:
            expected.charged += 1
            expected.attempts.append([prompt, expected.charged, "posted"])

    @precondition(lambda self: any(one.attempts for one in self.records))
    @rule(n=index)
    def start(self, n: int) -> None:
        record, attempt = self.pick(n)
        result = self.runner.run(self.kit.store.start(attempt[0], self.kit.clock.now))
        moved = attempt[2] == "posted" and record.status == "queued"
        if attempt[2] == "posted":
            attempt[2] = "running"
        if moved:
            record.status = "running"
            self.tell("started")
        assert (result is not None) == moved

    @precondition(lambda self: any(one.attempts for one in self.records))
    @rule(n=index, status=st.sampled_from([Status.COMPLETED, Status.FAILED, Status.CANCELLED]))
    def finish(self, n: int, status: Status) -> None:
        record, attempt = self.pick(n)
        outcome = Outcome(status=status, start_time=5, completion_time=6, error="e", error_type="node")
        result = self.runner.run(self.kit.store.finish(attempt[0], outcome))
        moved = attempt[2] in {"posted", "running"} and record.status not in FINAL
        if attempt[2] in {"posted", "running"}:
            attempt[2] = "ended"
        if moved:
            if record.status == "queued":
                self.tell("started")
            record.status = status.value
            self.tell("error" if status is Status.FAILED else status.value)
        assert (result is not None) == moved

    @precondition(lambda self: any(one.attempts for one in self.records))
    @rule(n=index, retry=st.booleans())
    def lose(self, n: int, retry: bool) -> None:
        record, attempt = self.pick(n)
        result = self.runner.run(
            self.kit.store.lose(attempt[0], error="e", error_type="lost", now=self.kit.clock.now, retry=retry)
        )
        moved = attempt[2] in {"posted", "running"} and record.status not in FINAL
        if attempt[2] in {"posted", "running"}:
            attempt[2] = "lost"
        if moved:
            record.status = "queued" if retry else "failed"
            self.tell(*(["error", "queued"] if retry else ["error"]))
        assert (result is not None) == moved

    @precondition(lambda self: any(one.attempts for one in self.records))
    @rule(n=index)
    def withdraw(self, n: int) -> None:
        record, attempt = self.pick(n)
        result = self.runner.run(self.kit.store.withdraw(attempt[0], self.kit.clock.now))
        moved = attempt[2] == "posted" and record.status == "queued"
        if attempt[2] == "posted":
            attempt[2] = "withdrawn"
        if moved:
            record.charged -= 1
        assert (result is not None) == moved

    @precondition(lambda self: any(one.attempts for one in self.records))
    @rule(n=index)
    def close_attempt(self, n: int) -> None:
        record, attempt = self.pick(n)
        self.runner.run(self.kit.store.close_attempt(attempt[0], self.kit.clock.now))
        if attempt[2] in {"posted", "running"} and record.status in FINAL:
            attempt[2] = "ended"

    @precondition(lambda self: self.records)
    @rule(n=index)
    def cancel(self, n: int) -> None:
        record = self.records[n % len(self.records)]
        try:
            self.runner.run(self.kit.store.cancel(record.id, self.kit.clock.now))
        except Conflict as conflict:
            assert record.status == conflict.current_status  # noqa: PT017 - both outcomes are compared
            assert record.status in {"completed", "failed"}
        else:
            if record.status != "cancelled":
                record.status = "cancelled"
                self.tell("cancelled")

    @precondition(lambda self: self.records)
    @rule(n=index, priority=st.sampled_from(Priority))
    def set_priority(self, n: int, priority: Priority) -> None:
        record = self.records[n % len(self.records)]
        try:
            self.runner.run(self.kit.store.set_priority(record.id, priority))
        except Conflict as conflict:
            assert record.status == conflict.current_status != "queued"  # noqa: PT017
        else:
            assert record.status == "queued"
            record.priority = priority

    @rule(paused=st.booleans())
    def pause(self, paused: bool) -> None:
        self.runner.run(self.kit.store.set_paused(paused))
        self.paused = paused

    @rule(aging=st.sampled_from([0, 1, AGING_SECONDS]))
    def reopen(self, aging: int) -> None:
        self.runner.run(self.kit.reopen(aging))
        self.aging = aging

    # ---- what must be the same after each step

    @invariant()
    def the_line_is_the_same(self) -> None:
        store = self.kit.store
        for gpu in ("local", "a", "b"):
            line = self.line(gpu)
            assert [store.position(one.id) for one in line] == list(range(len(line)))
        for backend, pools in POOLS.items():
            first = self.first(backend)
            assert store.next_in_line(pools) == (
                first and (rank(first.priority, first.created_at, self.aging), first.number)
            )
        counts = store.counts()
        assert counts.waiting == {
            priority: sum(one.priority is priority for one in self.line()) for priority in Priority
        }
        assert counts.running == sum(one.status == "running" for one in self.records)
        assert counts.oldest_created_at == min((one.created_at for one in self.line()), default=None)
        assert counts.paused == self.paused

    @invariant()
    def the_events_are_the_same(self) -> None:
        assert self.kit.told() == self.events
        assert [event.seq for event, _ in self.kit.heard] == list(range(1, len(self.events) + 1))

    @invariant()
    def the_records_are_the_same(self) -> None:
        async def read() -> None:
            store = self.kit.store
            snapshot = await store.snapshot([one.id for one in self.records])
            assert [(one.id, one.status, one.attempt, one.priority) for one in snapshot.workflows] == [
                (one.id, one.status, one.charged, one.priority) for one in self.records
            ]
            for one in self.records:
                attempts = [(a.prompt_id, a.number, a.state) for a in await store.attempts(one.id)]
                assert attempts == [tuple(attempt) for attempt in one.attempts]
            open_prompts = [claimed.attempt.prompt_id for claimed in await store.open_attempts()]
            assert set(open_prompts) == {
                prompt for one in self.records for prompt, _, state in one.attempts if state in {"posted", "running"}
            }

        self.runner.run(read())


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
