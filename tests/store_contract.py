"""What every store promises, whatever database is behind it: a suite against the port.

A kind of store runs it by a subclass of `StoreContract` that says how one is made. What only that kind can promise
(files, locks, commits) is tested beside the subclass.
"""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from managers.errors import (
    Conflict,
    NotFound,
)
from managers.events.types import Finding, NodeCounts, Output
from managers.workflows.model import (
    AttemptState,
    Priority,
    Status,
    rank,
)
from tests.store_contract_reading import ReadingContract
from tests.store_kit import AGING_SECONDS, GRAPH, Kit, image


class StoreContract(ReadingContract):
    # ---- through

    async def test_claims_follow_rank_then_acceptance(self, kit: Kit) -> None:
        at = kit.clock.now
        low = await kit.submit(Priority.LOW, created_at=at, rank=rank(Priority.LOW, at, AGING_SECONDS))
        first, second = [
            await kit.submit(created_at=at, rank=rank(Priority.NORMAL, at, AGING_SECONDS)) for _ in range(2)
        ]
        high = await kit.submit(Priority.HIGH)
        old = at - 2 * AGING_SECONDS * 1000 - 1
        aged = await kit.submit(Priority.LOW, created_at=old, rank=rank(Priority.LOW, old, AGING_SECONDS))
        order = [aged.id, high.id, first.id, second.id, low.id]
        assert [kit.store.position(one) for one in order] == [0, 1, 2, 3, 4]
        assert kit.store.next_in_line(["local"], "local") == (aged.rank, aged.number)
        assert [(await kit.claim()).workflow.id for _ in order] == order
        assert await kit.store.claim(backend="a", pools=["local"], prompt_id="p", now=0) is None

    async def test_a_claim_stores_the_attempt_and_leaves_it_queued(self, kit: Kit) -> None:
        submitted = await kit.submit(extra_data=b'{"k":1}')
        claimed = await kit.claim("prompt", backend="b")
        workflow = await kit.store.get(submitted.id)
        assert claimed.workflow == workflow
        assert (workflow.status, workflow.attempt, workflow.backend, workflow.prompt_id) == (
            "queued",
            1,
            "b",
            "prompt",
        )
        assert (claimed.graph, claimed.extra_data) == (GRAPH, b'{"k":1}')
        assert await kit.store.attempts(submitted.id) == [claimed.attempt]
        assert claimed.attempt.state is AttemptState.POSTED
        assert await kit.store.open_attempts() == [claimed]
        assert kit.store.position(submitted.id) == 0
        assert kit.store.next_in_line(["local"], "local") is None
        assert kit.told() == ["workflow:queued"]

    async def test_claims_at_once_never_share_a_workflow(self, kit: Kit) -> None:
        for _ in range(10):
            await kit.submit()
        claims = await asyncio.gather(
            *(kit.store.claim(backend="a", pools=["local"], prompt_id=f"p{n}", now=0) for n in range(15))
        )
        ids = [claim.workflow.id for claim in claims if claim is not None]
        assert len(ids) == len(set(ids)) == 10

    async def test_a_backend_takes_only_from_its_pools(self, kit: Kit) -> None:
        mine, others = await kit.submit(gpu="a"), await kit.submit(gpu="b")
        assert [kit.store.position(one.id) for one in (mine, others)] == [0, 0]
        assert (await kit.claim(pools=("local", "b"))).workflow.id == others.id
        assert await kit.store.claim(backend="b", pools=("local", "b"), prompt_id="p", now=0) is None

    async def test_paused_hands_out_nothing_also_after_a_restart(self, kit: Kit) -> None:
        await kit.submit()
        await kit.store.set_paused(True)
        assert kit.store.counts().paused
        await kit.reopen()
        assert kit.store.counts().paused
        assert kit.store.next_in_line(["local"], "local") is None
        assert await kit.store.claim(backend="a", pools=["local"], prompt_id="p", now=0) is None
        await kit.store.set_paused(False)
        await kit.reopen()
        await kit.claim()

    async def test_from_queued_to_completed(self, kit: Kit) -> None:
        workflow = await kit.submit()
        claimed = await kit.claim("p")
        started = await kit.store.start("p", 1_000)
        assert started is not None
        assert (started.status, started.start_time) == (Status.RUNNING, 1_000)
        assert kit.store.position(workflow.id) is None
        assert (kit.store.counts().running, kit.store.counts().length) == (1, 0)
        outputs = (image("b.png"), Output(kind="text", node_id="9", text="hello"), image("a.png"))
        outcome = kit.outcome(
            start_time=1_200, completion_time=3_500, outputs=outputs, nodes=NodeCounts(total=2, done=2)
        )
        finished = await kit.store.finish("p", outcome)
        assert finished == await kit.store.get(workflow.id)
        assert finished is not None
        # ComfyUI's own word for when it began, over what was known when it was found running.
        assert (finished.status, finished.start_time, finished.completion_time) == (Status.COMPLETED, 1_200, 3_500)
        assert (finished.outputs, finished.progress, finished.nodes.done) == (outputs, 100, 2)
        assert kit.told() == ["workflow:queued", "workflow:started", "workflow:completed"]
        assert msgspec.json.decode(kit.heard[-1][1].data)["duration"] == 2.3
        (attempt,) = await kit.store.attempts(workflow.id)
        assert (attempt.state, attempt.start_time, attempt.end_time) == (AttemptState.ENDED, 1_200, 3_500)
        assert attempt.prompt_id == claimed.attempt.prompt_id
        assert await kit.store.open_attempts() == []
        assert kit.store.counts().running == 0

    async def test_a_start_nobody_saw_is_written_first(self, kit: Kit) -> None:
        workflow = await kit.submit()
        await kit.claim("p")
        finished = await kit.store.finish("p", kit.outcome(start_time=1_000))
        assert finished is not None
        assert finished.start_time == 1_000
        assert kit.told(workflow.id) == ["workflow:queued", "workflow:started", "workflow:completed"]

    async def test_it_may_fail_without_a_start_but_not_complete(self, kit: Kit) -> None:
        warning = Finding(code="value_not_in_list", message="perhaps no such model", severity="warning")
        workflow = await kit.submit(errors=(warning,))
        await kit.claim("p")
        with pytest.raises(Conflict):
            await kit.store.finish("p", kit.outcome(start_time=None))
        assert await kit.states(workflow.id) == [(1, AttemptState.POSTED)]
        finding = Finding(code="value_not_in_list", message="no such model")
        failed = await kit.store.finish(
            "p",
            kit.outcome(
                Status.FAILED,
                start_time=None,
                error="Refused",
                error_type="validation",
                errors=(finding,),
                node_id="1",
                progress=40,
            ),
        )
        assert failed == await kit.store.get(workflow.id)
        assert failed is not None
        assert (failed.status, failed.error, failed.errors) == (Status.FAILED, "Refused", (warning, finding))
        assert (failed.start_time, failed.progress) == (None, 40)
        data = msgspec.json.decode(kit.heard[-1][1].data)
        assert (data["type"], data["nodeId"], data["willRetry"]) == ("workflow:error", "1", False)
        assert kit.told() == ["workflow:queued", "workflow:error"]

    async def test_an_outcome_that_cannot_be_stored_leaves_no_trace(self, kit: Kit) -> None:
        workflow = await kit.submit()
        await kit.claim("p")
        with pytest.raises(UnicodeEncodeError):
            await kit.store.finish("p", kit.outcome(outputs=(image("a lone surrogate \ud800.png"),)))
        assert (await kit.store.get(workflow.id)).status is Status.QUEUED
        assert (kit.store.position(workflow.id), kit.store.counts().running) == (0, 0)
        assert await kit.states(workflow.id) == [(1, AttemptState.POSTED)]
        assert kit.told() == ["workflow:queued"]
        await kit.store.finish("p", kit.outcome())
        assert [event.seq for event, _ in kit.heard] == [1, 2, 3]

    async def test_start_and_finish_are_heard_once(self, kit: Kit) -> None:
        _, prompt = await kit.running()
        assert await kit.store.start(prompt, 5) is None
        assert await kit.store.finish(prompt, kit.outcome()) is not None
        assert await kit.store.finish(prompt, kit.outcome(Status.FAILED)) is None
        assert await kit.store.start(prompt, 5) is None
        assert await kit.store.start("unknown", 5) is None
        assert await kit.store.finish("unknown", kit.outcome()) is None
        assert kit.told() == ["workflow:queued", "workflow:started", "workflow:completed"]

    async def test_a_lost_attempt_waits_again_at_its_old_place(self, kit: Kit) -> None:
        first, second = await kit.submit(), await kit.submit()
        await kit.claim("p")
        await kit.store.start("p", kit.clock.now)
        lost = await kit.store.lose("p", error="gone", error_type="lost", now=9_000, retry=True)
        assert lost == await kit.store.get(first.id)
        assert lost is not None
        assert (lost.status, lost.attempt, lost.prompt_id, lost.start_time) == (Status.QUEUED, 1, None, None)
        assert (kit.store.position(first.id), kit.store.position(second.id)) == (0, 1)
        assert kit.store.counts().running == 0
        assert kit.told(first.id)[-2:] == ["workflow:error", "workflow:queued"]
        error, queued = (msgspec.json.decode(frame.data) for _, frame in kit.heard[-2:])
        assert (error["willRetry"], queued["queuePosition"], queued["attempt"]) == (True, 0, 1)
        again = await kit.claim("q")
        assert (again.workflow.id, again.attempt.number) == (first.id, 2)
        assert await kit.states(first.id) == [(1, AttemptState.LOST), (2, AttemptState.POSTED)]

    async def test_lost_before_it_started(self, kit: Kit) -> None:
        workflow = await kit.submit()
        await kit.claim("p")
        lost = await kit.store.lose("p", error="gone", error_type="lost", now=1, retry=True)
        assert lost is not None
        assert (lost.status, lost.attempt) == (Status.QUEUED, 1)
        assert (await kit.claim("q")).attempt.number == 2
        assert kit.told(workflow.id) == ["workflow:queued", "workflow:error", "workflow:queued"]

    async def test_lost_for_good(self, kit: Kit) -> None:
        workflow, prompt = await kit.running()
        failed = await kit.store.lose(prompt, error="gone", error_type="poison", now=9_000, retry=False)
        assert failed is not None
        assert (failed.status, failed.error_type, failed.completion_time) == (Status.FAILED, "poison", 9_000)
        assert kit.told(workflow.id)[-1] == "workflow:error"
        assert await kit.store.lose(prompt, error="gone", error_type="lost", now=1, retry=True) is None
        assert kit.store.counts().running == 0

    async def test_an_unfit_backend_takes_what_stands_behind(self, kit: Kit) -> None:
        first, second = await kit.submit(unfit=("a",)), await kit.submit()
        assert kit.store.next_in_line(["local"], "a") == (second.rank, second.number)
        assert kit.store.next_in_line(["local"], "b") == (first.rank, first.number)
        await kit.reopen()
        taken = await kit.store.claim(backend="a", pools=["local"], prompt_id="p", now=1)
        assert taken is not None
        assert taken.workflow.id == second.id
        assert await kit.store.claim(backend="a", pools=["local"], prompt_id="q", now=1) is None
        other = await kit.store.claim(backend="b", pools=["local"], prompt_id="q", now=1)
        assert other is not None
        assert other.workflow.unfit == ("a",)

    async def test_the_second_death_is_poison_whatever_was_asked_for(self, kit: Kit) -> None:
        workflow = await kit.submit()
        for prompt, died in (("p1", False), ("p2", True), ("p3", False)):
            await kit.claim(prompt)
            await kit.store.start(prompt, kit.clock.now)
            lost = await kit.store.lose(prompt, error="gone", error_type="lost", now=1, retry=True, died=died)
            assert lost is not None
            assert lost.status is Status.QUEUED
        await kit.claim("p4")
        await kit.store.start("p4", kit.clock.now)
        failed = await kit.store.lose("p4", error="gone", error_type="lost", now=9_000, retry=True, died=True)
        assert failed is not None
        assert (failed.status, failed.error_type) == (Status.FAILED, "poison")
        assert "2 times" in (failed.error or "")
        assert [one.died for one in await kit.store.attempts(workflow.id)] == [False, True, False, True]
        assert kit.told(workflow.id)[-1] == "workflow:error"
        assert kit.store.position(workflow.id) is None

    async def test_withdrawn_charges_nothing(self, kit: Kit) -> None:
        workflow = await kit.submit()
        await kit.claim("p")
        back = await kit.store.withdraw("p", kit.clock.now)
        assert back is not None
        assert (back.attempt, back.backend, back.prompt_id, back.status) == (0, None, None, Status.QUEUED)
        assert await kit.store.withdraw("p", kit.clock.now) is None
        assert (await kit.claim("q")).attempt.number == 1
        assert await kit.states(workflow.id) == [(1, AttemptState.WITHDRAWN), (1, AttemptState.POSTED)]
        assert kit.told() == ["workflow:queued"]
        await kit.store.start("q", 1)
        assert await kit.store.withdraw("q", kit.clock.now) is None
        assert (await kit.store.get(workflow.id)).status is Status.RUNNING

    async def test_priority_can_change_while_it_waits(self, kit: Kit) -> None:
        first, second = await kit.submit(), await kit.submit()
        changed = await kit.store.set_priority(second.id, Priority.HIGH)
        assert changed == await kit.store.get(second.id)
        assert (changed.priority, changed.rank) == (Priority.HIGH, second.created_at)
        assert (kit.store.position(second.id), kit.store.position(first.id)) == (0, 1)
        assert kit.store.counts().waiting == {Priority.HIGH: 1, Priority.NORMAL: 1, Priority.LOW: 0}
        claimed = await kit.claim()
        assert claimed.workflow.id == second.id
        await kit.store.set_priority(second.id, Priority.LOW)
        assert kit.store.next_in_line(["local"], "local") == (first.rank, first.number)
        await kit.store.set_priority(second.id, Priority.HIGH)
        assert kit.store.next_in_line(["local"], "local") == (first.rank, first.number)
        await kit.store.start(claimed.attempt.prompt_id, 1)
        with pytest.raises(Conflict) as caught:
            await kit.store.set_priority(second.id, Priority.HIGH)
        assert caught.value.current_status == "running"
        with pytest.raises(NotFound):
            await kit.store.set_priority("unknown", Priority.HIGH)

    # ---- cancel, and the races

    async def test_cancel_is_the_verdict_and_the_attempt_stays_open(self, kit: Kit) -> None:
        workflow, prompt = await kit.running()
        cancelled = await kit.store.cancel(workflow.id, 9_000)
        assert (cancelled.status, cancelled.completion_time) == (Status.CANCELLED, 9_000)
        assert await kit.store.cancel(workflow.id, 10_000) == cancelled
        assert [one.attempt.prompt_id for one in await kit.store.open_attempts("a")] == [prompt]
        assert await kit.store.open_attempts("b") == []
        await kit.store.close_attempt(prompt, 9_500)
        assert await kit.states(workflow.id) == [(1, AttemptState.ENDED)]
        assert kit.told() == ["workflow:queued", "workflow:started", "workflow:cancelled"]
        assert kit.store.counts().running == 0

    async def test_cancel_of_what_waits_frees_its_place(self, kit: Kit) -> None:
        first, second = await kit.submit(), await kit.submit()
        await kit.claim("p")
        await kit.store.cancel(first.id, 1)
        assert (kit.store.position(first.id), kit.store.position(second.id)) == (None, 0)
        assert await kit.store.start("p", 1) is None
        assert await kit.states(first.id) == [(1, AttemptState.RUNNING)]
        assert await kit.store.finish("p", kit.outcome()) is None
        assert await kit.states(first.id) == [(1, AttemptState.ENDED)]
        assert (await kit.store.get(first.id)).status is Status.CANCELLED

    async def test_cancelled_stays_cancelled_whatever_becomes_of_the_attempt(self, kit: Kit) -> None:
        ends = []
        for n in range(3):
            workflow, prompt = await kit.submit(), f"p{n}"
            await kit.claim(prompt)
            await kit.store.cancel(workflow.id, 1)
            ends.append((workflow.id, prompt))
        assert await kit.store.withdraw("p0", 1) is None
        assert await kit.store.lose("p1", error="gone", error_type="lost", now=1, retry=True) is None
        await kit.store.close_attempt("p2", 1)
        states = [(await kit.states(workflow_id))[0][1] for workflow_id, _ in ends]
        assert states == [AttemptState.WITHDRAWN, AttemptState.LOST, AttemptState.ENDED]
        assert kit.store.counts().length == 0
        assert kit.told() == ["workflow:queued", "workflow:cancelled"] * 3

    async def test_cancel_of_what_ended_is_a_conflict(self, kit: Kit) -> None:
        workflow, prompt = await kit.running()
        await kit.store.finish(prompt, kit.outcome())
        with pytest.raises(Conflict) as caught:
            await kit.store.cancel(workflow.id, 1)
        assert caught.value.current_status == "completed"
        with pytest.raises(NotFound):
            await kit.store.cancel("unknown", 1)

    @pytest.mark.parametrize("cancel_first", [True, False])
    async def test_cancel_and_finish_at_once_have_one_winner(self, kit: Kit, cancel_first: bool) -> None:
        workflow, prompt = await kit.running()
        calls = [kit.store.cancel(workflow.id, 1), kit.store.finish(prompt, kit.outcome())]
        results = await asyncio.gather(*(calls if cancel_first else calls[::-1]), return_exceptions=True)
        status = (await kit.store.get(workflow.id)).status
        if cancel_first:
            assert status is Status.CANCELLED
            assert results[1] is None
        else:
            assert status is Status.COMPLETED
            assert isinstance(results[1], Conflict)
        assert kit.told()[2:] == [f"workflow:{status.value}"]
        assert await kit.states(workflow.id) == [(1, AttemptState.ENDED)]

    async def test_close_attempt_leaves_a_live_workflow_alone(self, kit: Kit) -> None:
        workflow, prompt = await kit.running()
        await kit.store.close_attempt(prompt, 1)
        await kit.store.close_attempt("unknown", 1)
        assert await kit.states(workflow.id) == [(1, AttemptState.RUNNING)]
