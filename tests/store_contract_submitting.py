"""What every store promises to those who submit. Part of `store_contract`."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from managers.clock import Clock, IdMaker
from managers.errors import (
    Conflict,
    IdempotencyMismatch,
    QueueFull,
    ShareFull,
)
from managers.events.types import Finding, NodeCounts
from managers.workflows.model import (
    Filter,
    IdempotencyKey,
    Priority,
    Status,
    Submitted,
)
from managers.workflows.store import WorkflowStore
from tests.store_kit import Kit

DAY_MS = 86_400_000


class SubmittingContract:
    @abstractmethod
    def make(self, folder: Path, clock: Clock, ids: IdMaker, aging_seconds: int) -> WorkflowStore: ...

    @pytest.fixture
    async def kit(self, tmp_path: Path) -> AsyncIterator[Kit]:
        kit = Kit(lambda clock, ids, aging: self.make(tmp_path / "data", clock, ids, aging))
        await kit.open()
        yield kit
        await kit.store.close()

    # ---- in

    async def test_submitted_is_read_back_as_it_was(self, kit: Kit) -> None:
        finding = Finding(code="value_not_in_list", message="m", severity="warning", node_id="1", allowed=["a"])
        new = kit.new(
            Priority.LOW,
            extra_data=b'{"extra_pnginfo":{"workflow":"\xc3\xa4"}}' * 99,
            metadata={"a": [1, None, {"b": "ä\u0000"}]},
            errors=(finding,),
            retry_of="another",
            timeout_seconds=1.5,
        )
        submitted = await kit.store.submit(new)
        workflow = await kit.store.get(new.id)
        assert workflow == submitted.workflow
        assert (submitted.queue_position, submitted.status, submitted.replayed) == (0, Status.QUEUED, False)
        assert (workflow.id, workflow.status, workflow.priority) == (new.id, Status.QUEUED, Priority.LOW)
        assert (workflow.metadata, workflow.errors, workflow.retry_of) == (new.metadata, new.errors, "another")
        assert (workflow.timeout_seconds, workflow.nodes) == (1.5, NodeCounts(total=2))
        assert await kit.store.graph(new.id) == (new.graph, new.extra_data)

    @pytest.mark.parametrize("size", [0, 300, 100_000])
    async def test_graphs_of_every_size_come_back_byte_for_byte(self, kit: Kit, size: int) -> None:
        graph = b'{"1":"%s"}' % (b"x" * size)
        workflow = await kit.submit(graph=graph)
        assert await kit.store.graph(workflow.id) == (graph, None)
        assert (await kit.claim()).graph == graph

    async def test_submitted_is_announced_with_its_place(self, kit: Kit) -> None:
        first, second = await kit.submit(), await kit.submit(Priority.HIGH)
        assert [event.seq for event, _ in kit.heard] == [1, 2]
        data = [msgspec.json.decode(frame.data) for _, frame in kit.heard]
        assert data[1] == {
            "type": "workflow:queued",
            "timestamp": second.created_at,
            "workflowId": second.id,
            "seq": 2,
            "queuePosition": 0,
            "priority": "high",
            "gpu": "local",
            "attempt": 0,
        }
        assert kit.store.position(first.id) == 1

    async def test_what_can_never_run_is_stored_as_failed(self, kit: Kit) -> None:
        finding = Finding(code="no_output", message="no output node")
        submitted = await kit.store.submit(kit.new(failure="No output node", errors=(finding,)))
        workflow = await kit.store.get(submitted.workflow.id)
        assert (submitted.status, submitted.queue_position) == (Status.FAILED, 0)
        assert (workflow.status, workflow.error, workflow.error_type) == (
            Status.FAILED,
            "No output node",
            "validation",
        )
        assert workflow.completion_time == workflow.created_at
        assert kit.told() == ["workflow:error"]
        assert kit.store.counts().length == 0
        assert kit.store.next_in_line(["local"], "local") is None

    async def test_a_known_id_is_a_conflict(self, kit: Kit) -> None:
        workflow = await kit.submit()
        with pytest.raises(Conflict) as caught:
            await kit.store.submit(kit.new(id=workflow.id))
        assert caught.value.current_status == "queued"
        await kit.store.cancel(workflow.id, kit.clock.now)
        with pytest.raises(Conflict) as caught:
            await kit.store.submit(kit.new(id=workflow.id), max_waiting=0)
        assert caught.value.current_status == "cancelled"
        assert kit.told() == ["workflow:queued", "workflow:cancelled"]

    async def test_one_known_id_among_many_hurts_only_itself(self, kit: Kit) -> None:
        known = await kit.submit()
        new = [kit.new(id=known.id) if n in {3, 7} else kit.new() for n in range(10)]
        results = await asyncio.gather(*map(kit.store.submit, new), return_exceptions=True)
        assert [isinstance(result, Conflict) for result in results] == [n in {3, 7} for n in range(10)]
        assert kit.store.position(known.id) == 0
        assert kit.store.counts().length == 9
        assert [event.seq for event, _ in kit.heard] == list(range(1, 10))

    async def test_the_queue_can_be_full(self, kit: Kit) -> None:
        results = await asyncio.gather(
            *(kit.store.submit(kit.new(), max_waiting=4) for _ in range(6)), return_exceptions=True
        )
        assert sum(isinstance(result, QueueFull) for result in results) == 2
        assert kit.store.counts().length == 4
        await kit.claim()
        with pytest.raises(QueueFull):
            await kit.store.submit(kit.new(), max_waiting=4)

    async def test_a_submitter_has_a_share_of_what_waits(self, kit: Kit) -> None:
        def submit(name: str | None, share: int | None = 2, **changes: Any) -> Awaitable[Submitted]:
            return kit.store.submit(kit.new(submitted_by=name, **changes), max_queued=share)

        results = await asyncio.gather(
            *(submit("shop") for _ in range(5)), submit("other"), submit(None, None), return_exceptions=True
        )
        assert [isinstance(result, ShareFull) for result in results] == [False] * 2 + [True] * 3 + [False] * 2
        assert kit.store.counts().length == 4
        assert kit.told() == ["workflow:queued"] * 4
        await submit("other", 2)
        claimed = await kit.claim()
        assert claimed.workflow.submitted_by == "shop"
        with pytest.raises(ShareFull, match="2 workflows of the key shop"):
            await submit("shop")  # what is only posted waits still
        with pytest.raises(Conflict):
            await submit("shop", id=claimed.workflow.id)
        await kit.store.start(claimed.attempt.prompt_id, kit.clock.now)
        third = (await submit("shop")).workflow
        await submit("shop", failure="No output node", share=3)  # never waits
        for _ in range(2):
            with pytest.raises(ShareFull):
                await submit("shop")
            await kit.reopen()
        await kit.store.cancel(third.id, kit.clock.now)
        await submit("shop")
        await kit.store.lose(
            claimed.attempt.prompt_id, error="e", error_type="lost", now=kit.clock.now, retry=True
        )  # it comes back, over its share
        with pytest.raises(ShareFull, match="3 workflows"):
            await submit("shop", 3)

    async def test_two_hundred_at_once_have_two_hundred_places(self, kit: Kit) -> None:
        results = await asyncio.gather(*(kit.store.submit(kit.new()) for _ in range(200)))
        assert [result.queue_position for result in results] == list(range(200))
        assert [result.workflow.number for result in results] == sorted(result.workflow.number for result in results)
        assert [kit.store.position(result.workflow.id) for result in results] == list(range(200))

    # ---- idempotency

    async def test_the_same_request_again_gets_the_first_result(self, kit: Kit) -> None:
        await kit.submit()
        key = IdempotencyKey("alice POST", "k", "hash")
        first = await kit.store.submit(kit.new(), key=key)
        await kit.submit(Priority.HIGH)
        await kit.store.cancel(first.workflow.id, kit.clock.now)
        await kit.reopen()
        again = await kit.store.submit(kit.new(), key=key, max_waiting=0)
        assert again.replayed
        assert (again.workflow.id, again.workflow.status) == (first.workflow.id, Status.CANCELLED)
        assert (again.status, again.queue_position) == (Status.QUEUED, 1)
        assert len((await kit.store.list(Filter())).workflows) == 3

    async def test_a_key_belongs_to_its_body_its_scope_and_its_day(self, kit: Kit) -> None:
        key = IdempotencyKey("alice", "k", "hash")
        first = await kit.store.submit(kit.new(), key=key)
        with pytest.raises(IdempotencyMismatch):
            await kit.store.submit(kit.new(), key=IdempotencyKey("alice", "k", "other"))
        other = await kit.store.submit(kit.new(), key=IdempotencyKey("bob", "k", "other"))
        kit.clock.now += DAY_MS + 1
        later = await kit.store.submit(kit.new(), key=IdempotencyKey("alice", "k", "other"))
        assert len({first.workflow.id, other.workflow.id, later.workflow.id}) == 3
        assert not later.replayed

    async def test_keys_of_yesterday_are_forgotten_however_many(self, kit: Kit) -> None:
        keys = [IdempotencyKey("alice", f"k{n}", "hash") for n in range(6)]
        for key in keys:
            await kit.store.submit(kit.new(), key=key)
        kit.clock.now += DAY_MS
        assert [(await kit.store.submit(kit.new(), key=key)).replayed for key in keys[::-1]] == [False] * 6

    async def test_the_same_request_twice_at_once_is_stored_once(self, kit: Kit) -> None:
        key = IdempotencyKey("alice", "k", "hash")
        results = await asyncio.gather(*(kit.store.submit(kit.new(), key=key) for _ in range(8)))
        assert len({result.workflow.id for result in results}) == 1
        assert [result.replayed for result in results] == [False] + [True] * 7

    async def test_a_refused_request_does_not_use_up_its_key(self, kit: Kit) -> None:
        key = IdempotencyKey("alice", "k", "hash")
        with pytest.raises(QueueFull):
            await kit.store.submit(kit.new(), key=key, max_waiting=0)
        assert not (await kit.store.submit(kit.new(), key=key)).replayed
