"""Running again what failed or was cancelled, one or many: each once and in order, however often it is asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from management_api.app import create_app
from management_api.settings import load
from tests.queue_kit import PATH, Comfy, House, Queue, Site, child, comfy, environment, house, picture, workflow

RETRY = f"{PATH}/retry"
BROKEN = {"1": {"class_type": "SaveImage", "inputs": {"images": ["1", 0]}}}
"""A circle: it fails at once, whatever ComfyUI there is."""


@pytest.fixture(scope="module")
def away(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """ComfyUI is away: what is taken waits."""
    return Site(tmp_path_factory.mktemp("away"), COMFYUI_MAX_QUEUE="12")


@pytest.fixture
async def queue(away: Site) -> AsyncIterator[House]:
    async with away.fresh() as service:
        yield service


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy]:
    with comfy(tmp_path_factory.mktemp("comfyui")) as found:
        yield found


async def replay(queue: Queue, **query: Any) -> dict[str, Any]:
    reply = await queue.client.post(RETRY, params=query)
    assert reply.status_code == 202, reply.text
    report: dict[str, Any] = reply.json()
    assert report["count"] == len(report["workflows"])
    return report


async def cancelled(queue: Queue, count: int, **body: Any) -> list[str]:
    ids = [await queue.submit(picture(), **body) for _ in range(count)]
    for workflow_id in ids:
        await queue.cancel(workflow_id)
    return ids


def sources(report: dict[str, Any]) -> list[str]:
    return [one["retryOf"] for one in report["workflows"]]


async def waiting(queue: Queue) -> list[str]:
    """What waits is the retry of which, first come first."""
    page = await queue.list(status="queued", limit=1000)
    return [one["retryOf"] for one in reversed(page["workflows"])]


def problem(reply: httpx.Response, status: int) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    found: dict[str, Any] = reply.json()
    return found


async def test_each_once_and_the_oldest_first(queue: House) -> None:
    ids = await cancelled(queue, 5, priority="high", metadata={"n": 1})
    report = await replay(queue, status="cancelled")
    assert sources(report) == ids == await waiting(queue)
    assert report == report | {"count": 5, "skipped": 0, "remaining": 0, "refused": [], "stopped": None}
    for one in report["workflows"]:
        assert one["status"] == "queued"
        view, old = await queue.get(one["workflowId"]), await queue.get(one["retryOf"])
        assert (view["retryOf"], old["status"]) == (one["retryOf"], "cancelled")
        assert all(view[name] == old[name] for name in ("priority", "metadata", "gpu", "maxAttempts"))
    again = await replay(queue, status="cancelled")
    assert (again["count"], again["skipped"]) == (0, 5)
    assert len(await waiting(queue)) == 5


async def test_it_goes_on_where_the_limit_was(queue: House) -> None:
    ids = await cancelled(queue, 5)
    first = await replay(queue, status="cancelled", limit=2)
    assert (sources(first), first["remaining"]) == (ids[:2], 3)
    second = await replay(queue, status="cancelled", limit=2)
    assert (sources(second), second["skipped"], second["remaining"]) == (ids[2:4], 2, 1)
    third = await replay(queue, status="cancelled", limit=2)
    assert (sources(third), third["remaining"]) == (ids[4:], 0)
    assert await waiting(queue) == ids


async def test_more_than_a_page_of_them(queue: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("managers.workflows.replay._PAGE", 3)
    ids = await cancelled(queue, 10)
    assert sources(await replay(queue, status="cancelled", limit=4)) == ids[:4]
    assert sources(await replay(queue, status="cancelled")) == ids[4:]


async def test_the_filter_is_that_of_the_list(tmp_path: Path) -> None:
    backends = "local=http://127.0.0.1:9,other=http://127.0.0.1:9"
    async with house(create_app(load(environment(tmp_path, COMFYUI_BACKENDS=backends), None))) as queue:
        (failed,) = [(await queue.post(BROKEN)).json()["workflowId"]]
        assert (await queue.get(failed))["errorType"] == "validation"
        here, there = await cancelled(queue, 2), await cancelled(queue, 2, gpu="other")
        assert sources(await replay(queue, errorType="oom")) == []
        assert sources(await replay(queue, status="cancelled", submittedBy="nobody")) == []
        assert sources(await replay(queue, status="cancelled", gpu="other")) == there
        times = [(await queue.get(one))["createdAt"] for one in here]
        assert sources(await replay(queue, status="cancelled", until=times[0] - 1)) == []
        assert sources(await replay(queue, status="cancelled", since=times[-1] + 1, gpu="local")) == []
        assert sources(await replay(queue, status="cancelled", since=times[0], until=times[-1], gpu="local")) == here
        report = await replay(queue, errorType="validation")
        assert sources(report) == [failed]
        assert report["workflows"][0]["status"] == "failed", "it can run nowhere today either"


async def test_what_fails_again_is_replayed_again_and_what_it_repeats_is_not(
    simulator: Comfy, tmp_path: Path
) -> None:
    async with house(create_app(load(environment(tmp_path, simulator), None))) as queue:
        first = (await queue.run(workflow("fail_value_error")))["workflowId"]
        line = [first]
        for n in range(2):
            report = await replay(queue, errorType="node")
            assert (sources(report), report["skipped"]) == ([line[-1]], n)
            line.append(report["workflows"][0]["workflowId"])
            assert (await queue.ended(line[-1]))["errorType"] == "node"
        assert await simulator.posts() == 3


async def test_a_retry_by_hand_counts_and_may_be_repeated(queue: House) -> None:
    (one, other) = await cancelled(queue, 2)
    by_hand = [problem(await queue.client.post(f"{PATH}/{one}/retry"), 202) for _ in range(2)]
    assert len({reply["workflowId"] for reply in by_hand} | {one}) == 3
    assert {reply["retryOf"] for reply in by_hand} == {one}
    assert sources(await replay(queue, status="cancelled")) == [other]
    assert sources(await replay(queue, status="cancelled", again="true")) == [one, other]
    assert sorted(await waiting(queue)) == sorted([one] * 3 + [other] * 2)


async def test_two_at_once_replay_each_of_them_once(queue: House) -> None:
    ids = await cancelled(queue, 8)
    reports = await asyncio.gather(*(replay(queue, status="cancelled") for _ in range(3)))
    assert sorted(one for report in reports for one in sources(report)) == sorted(ids)
    assert sorted(await waiting(queue)) == sorted(ids)


async def test_killed_in_the_middle_it_goes_on(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    environ = environment(tmp_path)
    async with child(environ) as queue:
        ids = await cancelled(queue, 30)
        async with queue.stream() as stream:
            await stream.until("subscribed")
            asking = asyncio.create_task(queue.client.post(RETRY, params={"status": "cancelled"}))
            await stream.until("workflow:queued")
            queue.kill()
        with pytest.raises(httpx.HTTPError):
            await asking
    async with child(environ) as queue:
        before = await waiting(queue)
        assert before == ids[: len(before)]
        assert before
        report = await replay(queue, status="cancelled")
        assert (sources(report), report["skipped"]) == (ids[len(before) :], len(before))
        assert await waiting(queue) == ids


async def test_a_queue_that_fills_up_in_the_middle(queue: House) -> None:
    ids = await cancelled(queue, 4)
    others = [await queue.submit(picture()) for _ in range(10)]
    report = await replay(queue, status="cancelled")
    assert (sources(report), report["remaining"]) == (ids[:2], 2)
    assert "12 workflows wait already" in report["stopped"]
    reply = await queue.client.post(RETRY, params={"status": "cancelled"})
    assert "12 workflows wait already" in problem(reply, 503)["detail"]
    assert int(reply.headers["retry-after"]) > 0
    for one in others[:2]:
        await queue.cancel(one)
    # What was cancelled to make room is now among those that match.
    assert sources(await replay(queue, status="cancelled")) == ids[2:]


async def test_what_nobody_can_take_stands_in_nobodys_way(tmp_path: Path) -> None:
    both = environment(tmp_path, COMFYUI_BACKENDS="local=http://127.0.0.1:9,gone=http://127.0.0.1:9")
    async with house(create_app(load(both, None))) as queue:
        lost, fine = await cancelled(queue, 2, gpu="gone"), await cancelled(queue, 2)
    async with house(create_app(load(environment(tmp_path), None))) as queue:
        report = await replay(queue, status="cancelled", limit=2)
        assert (report["workflows"], report["remaining"]) == ([], 2)
        assert report["stopped"] == "As many as the limit were refused: leave them out by gpu or since"
        report = await replay(queue, status="cancelled")
        assert (sources(report), report["remaining"], report["stopped"]) == (fine, 0, None)
        assert [one["workflowId"] for one in report["refused"]] == lost
        assert {one["message"] for one in report["refused"]} == {
            "There is no backend or pool named 'gone'; known: local"
        }


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ({"status": "completed"}, "status"),
        ({"status": "running"}, "status"),
        ({"errortype": "oom"}, "errortype"),
        ({"error_type": "oom"}, "error_type"),
        ({"errorType": "sad"}, "sad"),
        ({"limit": "1001"}, "limit"),
        ({"limit": "0"}, "limit"),
        ({"since": "monday"}, "since"),
        ({"until": "-1"}, "until"),
        ({"again": "perhaps"}, "again"),
    ],
)
async def test_a_filter_that_is_not_understood_replays_nothing(
    queue: House, query: dict[str, str], named: str
) -> None:
    await cancelled(queue, 1)
    assert named in problem(await queue.client.post(RETRY, params={"status": "cancelled"} | query), 400)["detail"]
    assert await waiting(queue) == []


async def test_a_body_is_no_filter(queue: House) -> None:
    await queue.post(BROKEN)
    reply = await queue.client.post(RETRY, json={"errorType": "oom"})
    assert "query" in problem(reply, 400)["detail"]
    assert (await replay(queue))["count"] == 1, "an empty body is none"


async def test_its_path_is_its_own(queue: House) -> None:
    assert problem(await queue.client.get(RETRY), 405)
    assert problem(await queue.client.post(f"{RETRY}/retry"), 404)
    assert problem(await queue.client.post(f"{PATH}/{'0' * 8}-0000-4000-8000-{'0' * 12}/retry"), 404)
