"""What every store promises to those who read it, and about its house. Part of `store_contract`."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from managers.errors import (
    InvalidRequest,
    NotFound,
    StoreUnavailable,
)
from managers.events.types import BackendConnected, ImagesGenerated
from managers.workflows.model import (
    Filter,
    Priority,
    Status,
    rank,
)
from managers.workflows.store import OutputOwner
from tests.store_contract_submitting import SubmittingContract
from tests.store_kit import Kit, image


class ReadingContract(SubmittingContract):
    # ---- reading

    async def test_unknown_ids(self, kit: Kit) -> None:
        for call in (kit.store.get, kit.store.graph):
            with pytest.raises(NotFound):
                await call("unknown")
        assert await kit.store.attempts("unknown") == []
        assert await kit.store.output_paths("unknown") == []
        assert kit.store.position("unknown") is None

    async def test_lists_are_newest_first_and_stable_under_inserts(self, kit: Kit) -> None:
        ids = [(await kit.submit()).id for _ in range(5)]
        page = await kit.store.list(Filter(limit=2))
        seen = [one.id for one in page.workflows]
        await kit.submit()
        while page.next_cursor is not None:
            page = await kit.store.list(Filter(limit=2, cursor=page.next_cursor))
            seen += [one.id for one in page.workflows]
        assert seen == ids[::-1]
        assert (await kit.store.list(Filter(limit=6))).next_cursor is None

    async def test_lists_can_be_narrowed(self, kit: Kit) -> None:
        done, prompt = await kit.running()
        await kit.store.finish(prompt, kit.outcome(outputs=(image("x.png"),)))
        failed = await kit.submit(failure="no", gpu="b")
        waiting = await kit.submit(gpu="b", submitted_by="shop")

        async def ids(**wanted: Any) -> list[str]:
            return [one.id for one in (await kit.store.list(Filter(**wanted))).workflows]

        assert await ids(status=Status.COMPLETED) == [done.id]
        assert await ids(gpu="b") == [waiting.id, failed.id]
        assert await ids(error_type="validation") == [failed.id]
        assert await ids(submitted_by="shop") == [waiting.id]
        assert await ids(submitted_by="sho_") == []
        assert await ids(since=waiting.created_at) == [waiting.id]
        assert await ids(status=Status.QUEUED, gpu="local") == []
        (listed,) = (await kit.store.list(Filter(status=Status.COMPLETED))).workflows
        assert listed == await kit.store.get(done.id)

    @pytest.mark.parametrize("cursor", ["", "x", "ä", "bjE=", "bi0x", "MQ", "n1", "bjk5OTk5OTk5OTk5OTk5OTk5OTk5"])
    async def test_a_cursor_that_is_none(self, kit: Kit, cursor: str) -> None:
        with pytest.raises(InvalidRequest):
            await kit.store.list(Filter(cursor=cursor))

    async def test_a_snapshot_knows_the_last_event_it_holds(self, kit: Kit) -> None:
        running, _ = await kit.running()
        waiting = await kit.submit()
        snapshot = await kit.store.snapshot(None)
        assert (snapshot.seq, [one.id for one in snapshot.workflows]) == (3, [running.id])
        named = await kit.store.snapshot([waiting.id, "unknown", running.id])
        assert {one.id for one in named.workflows} == {running.id, waiting.id}
        assert kit.store.last_seq == 3

    async def test_the_oldest_that_waits(self, kit: Kit) -> None:
        assert kit.store.counts().oldest_created_at is None
        low, high = await kit.submit(Priority.LOW), await kit.submit(Priority.HIGH, gpu="b")
        assert kit.store.counts().oldest_created_at == low.created_at
        await kit.store.cancel(low.id, 1)
        assert kit.store.counts().oldest_created_at == high.created_at

    # ---- the log

    async def test_the_log_holds_what_was_announced(self, kit: Kit) -> None:
        assert (await kit.store.first_seq(), kit.store.last_seq) == (1, 0)
        workflow, prompt = await kit.running()
        await kit.store.append(BackendConnected(timestamp=5, backend="a"))
        await kit.store.append(
            ImagesGenerated(timestamp=6, workflow_id=workflow.id, node_id="2", outputs=(image("x.png"),))
        )
        await kit.store.finish(prompt, kit.outcome())
        frames = [frame for _, frame in kit.heard]
        assert await kit.store.events_after(0, 100) == frames
        assert await kit.store.events_after(1, 2) == frames[1:3]
        assert [frame.seq for frame in frames] == [1, 2, 3, 4, 5]
        assert (await kit.store.first_seq(), kit.store.last_seq) == (1, 5)
        assert frames[2].workflow_id is None
        assert await kit.store.events_of(workflow.id) == [frame for frame in frames if frame.workflow_id]
        assert await kit.store.events_of(workflow.id, after=3) == frames[3:]
        assert all(msgspec.json.decode(frame.data)["seq"] == frame.seq for frame in frames)
        with pytest.raises(NotFound):
            await kit.store.append(ImagesGenerated(timestamp=6, workflow_id="unknown", node_id="2", outputs=()))

    async def test_the_listener_hears_before_the_caller(self, kit: Kit) -> None:
        heard_by_then = []

        async def submit() -> None:
            workflow = await kit.submit()
            heard_by_then.append(workflow.id in {frame.workflow_id for _, frame in kit.heard})
            heard_by_then.append(kit.store.position(workflow.id) is not None)

        await asyncio.gather(*(submit() for _ in range(50)))
        assert heard_by_then == [True] * 100
        assert [event.seq for event, _ in kit.heard] == list(range(1, 51))

    # ---- outputs

    async def test_the_last_run_owns_a_file(self, kit: Kit) -> None:
        runs = []
        for backend in ("a", "b", "a"):
            workflow = await kit.submit()
            prompt = kit.ids()
            await kit.claim(prompt, backend=backend)
            outputs = (
                image("x.png", subfolder="sub"),
                image("t.png", type="temp"),
                image(f"{backend}.png", node_id="7"),
            )
            await kit.store.finish(prompt, kit.outcome(outputs=outputs))
            runs.append(workflow.id)
        wanted = ["sub/x.png", "t.png", "b.png", "x.png"]
        assert await kit.store.owners(None, wanted) == {
            "sub/x.png": OutputOwner(runs[2], "2"),
            "b.png": OutputOwner(runs[1], "7"),
        }
        assert await kit.store.owners("b", wanted) == {
            "sub/x.png": OutputOwner(runs[1], "2"),
            "b.png": OutputOwner(runs[1], "7"),
        }
        assert await kit.store.owners(None, []) == {}
        assert await kit.store.output_paths(runs[0]) == ["sub/x.png", "a.png"]

    # ---- the house

    async def test_everything_is_there_after_a_restart(self, kit: Kit) -> None:
        running, prompt = await kit.running()
        waiting = [await kit.submit(priority) for priority in (Priority.LOW, Priority.HIGH, Priority.NORMAL)]
        held = await kit.claim("held")
        before = (
            await kit.store.list(Filter()),
            kit.store.counts(),
            [kit.store.position(one.id) for one in waiting],
            kit.store.next_in_line(["local"], "local"),
            await kit.store.open_attempts(),
            await kit.store.events_after(0, 100),
            kit.store.last_seq,
        )
        await kit.reopen()
        assert before == (
            await kit.store.list(Filter()),
            kit.store.counts(),
            [kit.store.position(one.id) for one in waiting],
            kit.store.next_in_line(["local"], "local"),
            await kit.store.open_attempts(),
            await kit.store.events_after(0, 100),
            kit.store.last_seq,
        )
        assert [one.attempt.prompt_id for one in await kit.store.open_attempts()] == [prompt, "held"]
        assert (await kit.claim()).workflow.id != held.workflow.id
        assert (await kit.submit()).number == running.number + 4
        assert kit.store.last_seq == before[-1] + 1

    async def test_another_aging_after_a_restart_moves_what_is_alive(self, kit: Kit) -> None:
        running, prompt = await kit.running()
        normal = await kit.submit()
        kit.clock.now += 1_000_000
        high = await kit.submit(Priority.HIGH)
        assert kit.store.position(high.id) == 1
        await kit.reopen(aging_seconds=0)
        assert [kit.store.position(one.id) for one in (high, normal)] == [0, 1]
        assert (await kit.store.get(normal.id)).rank == rank(Priority.NORMAL, normal.created_at, 0)
        await kit.store.lose(prompt, error="gone", error_type="lost", now=1, retry=True)
        assert [kit.store.position(one.id) for one in (high, running, normal)] == [0, 1, 2]
        await kit.store.set_priority(high.id, Priority.LOW)
        assert kit.store.position(high.id) == 2

    async def test_drained_backends_are_remembered(self, kit: Kit) -> None:
        assert await kit.store.drained() == frozenset()
        await kit.store.set_drained("a b", True)
        await kit.store.set_drained("a b", True)
        await kit.store.set_drained("c", True)
        await kit.store.set_drained("c", False)
        await kit.reopen()
        assert await kit.store.drained() == {"a b"}
        await kit.store.set_drained("a b", False)
        assert await kit.store.drained() == frozenset()

    async def test_a_client_id_is_made_once_for_each_backend(self, kit: Kit) -> None:
        first, other = await kit.store.client_id("a"), await kit.store.client_id("b")
        assert first != other
        await kit.reopen()
        assert await kit.store.client_id("a") == first

    async def test_a_closed_store_says_so(self, kit: Kit) -> None:
        workflow = await kit.submit()
        await kit.store.close()
        await kit.store.close()
        with pytest.raises(StoreUnavailable):
            await kit.submit()
        with pytest.raises(StoreUnavailable):
            await kit.store.get(workflow.id)

    async def test_closing_writes_what_waits(self, kit: Kit) -> None:
        tasks = [asyncio.create_task(kit.submit()) for _ in range(100)]
        await asyncio.sleep(0)  # lets each task hand in its work
        await kit.store.close()
        ids = {(await task).id for task in tasks}
        await kit.reopen()
        assert {one.id for one in (await kit.store.list(Filter(limit=1000))).workflows} == ids

    async def test_a_caller_who_goes_away_takes_nothing_back(self, kit: Kit) -> None:
        new = kit.new()
        task = asyncio.create_task(kit.store.submit(new))
        await asyncio.sleep(0)  # lets the task hand in its work
        task.cancel()
        await kit.submit()
        assert (await kit.store.get(new.id)).status is Status.QUEUED
        assert kit.store.counts().length == 2
