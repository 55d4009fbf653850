"""Webhooks through the real service: a ComfyUI process behind it, a real receiver before it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import WebhookVerificationError

from managers.delivery.endpoints import MAX_ENDPOINTS, OVERLAP_MS, PATTERNS
from tests.delivery.kit import Clock, calls, served, settled, tick
from tests.delivery.receiver import Answer, Call, Receiver, receiving
from tests.queue_kit import Comfy, comfy, picture, sleeper
from tests.serving import Log

ENDS = ["workflow:completed", "workflow:error", "workflow:cancelled"]


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy]:
    with comfy(tmp_path_factory.mktemp("comfyui")) as process:
        yield process


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as found:
        yield found


def now() -> Clock:
    """A clock that stands still, at the time that receivers have too."""
    return Clock(round(time.time() * 1000))


# ---- the way it goes


async def test_runs_are_told_signed_and_in_order(tmp_path: Path, comfyui: Comfy, receiver: Receiver) -> None:
    async with served(tmp_path, comfyui) as (service, post):
        made = await post.webhook(receiver.url)
        ids = [await service.submit(picture()) for _ in range(4)]
        ends = [await service.ended(workflow_id) for workflow_id in ids]
        heard = await calls(receiver, lambda calls: len(calls) == 12)
        for workflow_id in ids:
            kinds = [call.type for call in heard if call.workflow_id == workflow_id]
            assert kinds == ["workflow:queued", "workflow:started", "workflow:completed"]
        for call in heard:
            assert call.verify(made["secret"]) == call.body
            assert call.headers["content-type"] == "application/json"
            assert call.headers["user-agent"].startswith("comfyui-management-api/")
        (told,) = [call.body for call in heard if call.workflow_id == ids[0] and call.type == "workflow:completed"]
        assert told["data"]["outputs"][0]["filename"] == ends[0]["outputs"][0]["filename"]
        assert told["timestamp"].endswith("Z")
        log = await post.until(lambda found: len(found) == 12 and settled(found))
        assert sorted(one["id"] for one in log) == sorted(call.id for call in heard)
        assert {(one["state"], one["lastStatus"], one["attempts"]) for one in log} == {("delivered", 204, 1)}
        found = (await service.client.get(f"/v1/deliveries/{log[0]['id']}")).json()
        event = (await service.events(log[0]["workflowId"]))[-1]
        assert found == log[0] | {"body": event}
        metrics = (await service.client.get("/metrics")).text
        assert 'comfyui_deliveries_total{kind="webhook",result="delivered"} 12.0' in metrics
        assert 'comfyui_delivery_age_seconds{kind="webhook"} 0.0' in metrics


async def test_down_for_the_whole_run_and_back_later(tmp_path: Path, comfyui: Comfy, receiver: Receiver) -> None:
    clock = now()
    async with served(tmp_path, comfyui, clock) as (service, post):
        made = await post.webhook(receiver.url)
        receiver.stop()
        done = await service.run(picture())
        (first, *_) = await post.until(lambda log: len(log) == 3 and log[-1]["attempts"] == 1)
        assert (first["state"], first["nextAttemptAt"], first["lastError"]) == ("pending", None, None), "it waits"
        log = await post.deliveries()
        assert log[-1]["lastError"] == "No connection"
        assert 4400 <= log[-1]["nextAttemptAt"] - clock.now <= 5600
        tick(service, clock, 6)
        await post.until(lambda log: log[-1]["attempts"] == 2)
        metrics = (await service.client.get("/metrics")).text
        assert 'comfyui_deliveries_total{kind="webhook",result="failed"} 2.0' in metrics
        assert 'comfyui_delivery_age_seconds{kind="webhook"} 6.' in metrics
        receiver.start()
        tick(service, clock, 331)
        heard = await calls(receiver, lambda calls: len(calls) == 3)
        assert [call.type for call in heard] == ["workflow:queued", "workflow:started", "workflow:completed"]
        assert {call.workflow_id for call in heard} == {done["workflowId"]}
        assert int(heard[0].headers["webhook-timestamp"]) == clock.now // 1000, "that of the try"
        log = await post.until(settled)
        assert [one["attempts"] for one in log] == [1, 1, 3]
        assert log[-1]["id"] == heard[0].id
        assert made["id"] in log[0]["destination"]


async def test_a_receiver_that_fails_hears_the_same_id_again(
    tmp_path: Path, comfyui: Comfy, receiver: Receiver
) -> None:
    clock = now()
    statuses = iter((500, 404, 302, 503, 429, 200))
    asked = {503: {"retry-after": "7300"}, 429: {"retry-after": "1"}, 302: {"location": "http://127.0.0.1:1/"}}

    def answer(_: Call) -> Answer:
        status = next(statuses)
        return Answer(status, asked.get(status, {}))

    receiver.answer = answer
    async with served(tmp_path, comfyui, clock) as (service, post):
        await post.webhook(receiver.url, "workflow:completed")
        await service.run(picture())
        waits = []
        for attempts, status in enumerate((500, 404, 302, 503, 429), 1):
            (one,) = await post.until(lambda log, n=attempts: bool(log) and log[0]["attempts"] == n)  # type: ignore[misc]
            assert (one["state"], one["lastStatus"]) == ("pending", status)
            waits.append((one["nextAttemptAt"] - clock.now) / 1000)
            tick(service, clock, waits[-1] + 1)
        await post.until(settled)
        assert len(receiver.calls) == 6
        assert len({call.id for call in receiver.calls}) == 1
        assert waits[3] == 7300, "what Retry-After asks for"
        assert waits[4] == 18000, "it makes nothing sooner"
        for wait, planned in zip(waits[:3], (5, 300, 1800), strict=True):
            assert wait == pytest.approx(planned, rel=0.1)


async def test_one_that_hangs_disturbs_nobody(tmp_path: Path, comfyui: Comfy, receiver: Receiver) -> None:
    release = threading.Event()
    with receiving() as stuck:
        stuck.answer = lambda _: Answer(204, hold=release)
        async with served(tmp_path, comfyui) as (service, post):
            slow = await post.webhook(stuck.url)
            await post.webhook(receiver.url)
            ids = [await service.submit(picture()) for _ in range(12)]
            for workflow_id in ids:
                assert (await service.ended(workflow_id))["status"] == "completed"
            await calls(receiver, lambda calls: len(calls) == 36)
            assert len(stuck.calls) == 8, "as many at once, and no more"
            only_slow = {f"webhook:{slow['id']}"}
            await post.until(lambda log: {one["destination"] for one in log} == only_slow, state="pending")
            release.set()
            await post.until(lambda log: settled(log) and len(log) == 72)
            assert len({call.id for call in stuck.calls}) == 36


async def test_gone_disables(tmp_path: Path, comfyui: Comfy, receiver: Receiver) -> None:
    async with served(tmp_path, comfyui) as (service, post):
        receiver.answer = lambda _: Answer(410)
        made = await post.webhook(receiver.url)
        await service.run(picture())
        log = await post.until(lambda log: len(log) > 0 and settled(log))
        assert {one["state"] for one in log} == {"dead"}
        assert len(receiver.calls) == 1
        found = (await service.client.get(f"/v1/webhooks/{made['id']}")).json()
        assert found["enabled"] is False
        assert "410" in found["disabledReason"]
        receiver.answer = lambda _: Answer()
        before = len(await post.deliveries())
        await service.run(picture())
        assert len(await post.deliveries()) == before
        again = await service.client.patch(f"/v1/webhooks/{made['id']}", json={"enabled": True})
        assert (again.json()["enabled"], again.json()["disabledReason"]) == (True, None)
        await service.run(picture())
        await calls(receiver, lambda calls: len(calls) == 4)
        reply = await service.client.post("/v1/deliveries/retry", params={"state": "dead"})
        assert (reply.status_code, reply.json()) == (202, {"retried": before})
        await calls(receiver, lambda calls: len(calls) == 4 + before)


# ---- dead, and replay


async def test_dead_after_the_schedule_and_replayed(tmp_path: Path, comfyui: Comfy, receiver: Receiver) -> None:
    clock = now()
    receiver.answer = lambda _: Answer(500)
    async with served(tmp_path, comfyui, clock) as (service, post):
        made = await post.webhook(receiver.url, "workflow:completed")
        for _ in range(2):
            await service.run(picture())
        for attempts in range(1, 10):
            await post.until(lambda log, n=attempts: [one["attempts"] for one in log] == [n, n])  # type: ignore[misc]
            tick(service, clock, 100_000)
        log = await post.until(settled)
        assert [(one["state"], one["attempts"], one["deliveredAt"]) for one in log] == [("dead", 10, None)] * 2
        receiver.answer = lambda _: Answer()
        reply = await post.retry(log[0]["id"])
        assert (reply.status_code, reply.json()["state"]) == (202, "pending")
        await post.until(lambda log: log[0]["state"] == "delivered")
        assert receiver.calls[-1].id == log[0]["id"]
        nobody = await service.client.post("/v1/deliveries/retry", params={"destination": "webhook:other"})
        assert nobody.json() == {"retried": 0}
        query = {"state": "dead", "destination": f"webhook:{made['id']}"}
        assert (await service.client.post("/v1/deliveries/retry", params=query)).json() == {"retried": 1}
        await post.until(lambda log: {one["state"] for one in log} == {"delivered"})
        assert {one["workflowId"] for one in await post.deliveries(workflowId=log[0]["workflowId"])} == {
            log[0]["workflowId"]
        }
        for path, query in (("retry", {"sate": "dead"}), ("retry", {"state": "pending"}), ("retry", {"limit": "3"})):
            assert (await service.client.post(f"/v1/deliveries/{path}", params=query)).status_code == 400
        assert (await service.client.post("/v1/deliveries/retry", json={"state": "dead"})).status_code == 400
        for path in ("x", "3f0c6f1e-4d3b-4d55-9f6a-0d6f2a3c9b11"):
            assert (await service.client.get(f"/v1/deliveries/{path}")).status_code == 404
            assert (await post.retry(path)).status_code == 404
        await service.client.delete(f"/v1/webhooks/{made['id']}")
        assert (await post.retry(log[0]["id"])).status_code == 409


# ---- endpoints


async def test_endpoints_are_made_seen_changed_and_deleted(
    tmp_path: Path, comfyui: Comfy, receiver: Receiver
) -> None:
    async with served(tmp_path, comfyui) as (service, post):
        made = await post.webhook(receiver.url, "workflow:completed", "backend:*", description="orders")
        assert made.pop("secret").startswith("whsec_")
        assert made == {
            "id": made["id"],
            "url": receiver.url,
            "events": ["workflow:completed", "backend:*"],
            "description": "orders",
            "enabled": True,
            "disabledReason": None,
            "createdAt": made["createdAt"],
        }
        path = f"/v1/webhooks/{made['id']}"
        assert (await service.client.get("/v1/webhooks")).json() == {"webhooks": [made]}
        assert (await service.client.get(path)).json() == made
        await service.run(picture())
        (call,) = await calls(receiver, lambda calls: len(calls) == 1)
        assert call.type == "workflow:completed"
        changed = await service.client.patch(path, json={"events": ["workflow:started"], "description": None})
        assert changed.json() == made | {"events": ["workflow:started"], "description": None}
        await service.run(picture())
        await calls(receiver, lambda calls: [call.type for call in calls[1:]] == ["workflow:started"])
        await service.client.patch(path, json={"enabled": False})
        await service.run(picture())
        deleted = await service.client.delete(path)
        assert (deleted.status_code, deleted.content) == (204, b"")
        assert (await service.client.get(path)).status_code == 404
        await service.run(picture())
        log = await post.until(settled)
        assert len(log) == 2, "the log stays"
        assert len(receiver.calls) == 2
        for method in ("GET", "PATCH", "DELETE"):
            assert (await service.client.request(method, path, json={})).status_code == 404


async def test_what_happens_while_it_is_not_enabled_is_not_told_later(tmp_path: Path, receiver: Receiver) -> None:
    async with served(tmp_path) as (service, post):
        made = await post.webhook(receiver.url)
        path = f"/v1/webhooks/{made['id']}"
        told = []
        for _ in range(5):
            await service.client.patch(path, json={"enabled": False})
            await service.submit(picture())
            await service.client.patch(path, json={"enabled": True})  # before anybody has read that event
            told.append(await service.submit(picture()))
            heard = await calls(receiver, lambda calls: len(calls) >= len(told))
        assert [call.workflow_id for call in heard] == told


async def test_endpoints_and_what_is_pending_survive_a_restart(
    tmp_path: Path, comfyui: Comfy, receiver: Receiver
) -> None:
    async with served(tmp_path, comfyui) as (service, post):
        made = await post.webhook(receiver.url)
        receiver.stop()
        await service.run(picture())
        await post.until(lambda log: len(log) == 3 and log[-1]["attempts"] == 1)
    receiver.start()
    clock = Clock(now().now + 10_000)
    async with served(tmp_path, comfyui, clock) as (service, post):
        heard = await calls(receiver, lambda calls: len(calls) == 3)
        assert [call.type for call in heard] == ["workflow:queued", "workflow:started", "workflow:completed"]
        heard[0].verify(made["secret"])
        await post.until(settled)


async def test_a_test_call(tmp_path: Path, receiver: Receiver) -> None:
    async with served(tmp_path) as (service, post):
        made = await post.webhook(receiver.url, "workflow:completed")
        path = f"/v1/webhooks/{made['id']}/test"
        assert (await service.client.post(path)).json() == {"delivered": True, "status": 204, "error": None}
        (call,) = receiver.calls
        assert call.verify(made["secret"])["type"] == "webhook:test"
        receiver.answer = lambda _: Answer(500)
        assert (await service.client.post(path)).json() == {
            "delivered": False, "status": 500, "error": "It answered 500",
        }  # fmt: skip
        assert await post.deliveries() == []


async def test_rotation(tmp_path: Path, comfyui: Comfy, receiver: Receiver) -> None:
    clock = now()
    async with served(tmp_path, comfyui, clock) as (service, post):
        made = await post.webhook(receiver.url, "workflow:queued")
        old = made["secret"]
        new = (await service.client.post(f"/v1/webhooks/{made['id']}/rotate")).json()["secret"]
        assert new != old
        await service.submit(picture())
        (call,) = await calls(receiver, lambda calls: len(calls) == 1)
        for secret in (old, new):
            call.verify(secret)
        assert call.headers["webhook-signature"].count("v1,") == 2
        tick(service, clock, OVERLAP_MS / 1000)
        receiver.calls.clear()
        await service.client.post(f"/v1/webhooks/{made['id']}/test")
        assert receiver.calls[0].headers["webhook-signature"].count("v1,") == 1


REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({}, "/url"),
    ({"url": "ftp://shop.example"}, "/url"),
    ({"url": "https://user:pw@shop.example/"}, "/url"),
    ({"url": "http://127.0.0.1:8188/"}, "/url"),
    ({"url": "http://localhost/"}, "/url"),
    ({"url": "http://[::ffff:10.0.0.1]/"}, "/url"),
    ({"url": "http://169.254.169.254/latest/meta-data/"}, "/url"),
    ({"url": "https://shop.example/", "events": []}, "/events"),
    ({"url": "https://shop.example/", "events": ["workflow:done"]}, "/events/0"),
    ({"url": "https://shop.example/", "events": ["workflow:*", "node:progress"]}, "/events/1"),
    ({"url": "https://shop.example/", "events": "workflow:*"}, "/events"),
    ({"url": "https://shop.example/", "description": "x" * 501}, "/description"),
)


async def test_what_is_refused_says_where(tmp_path: Path) -> None:
    async with served(tmp_path, WEBHOOK_ALLOW_PRIVATE="false") as (service, post):
        for body, pointer in REFUSED:
            reply = await service.client.post("/v1/webhooks", json=body)
            assert reply.status_code == 400, body
            assert reply.json()["errors"][0]["pointer"] == pointer, reply.text
            assert "pw" not in reply.text
        unknown = (await service.client.post("/v1/webhooks", json=REFUSED[8][0])).json()
        assert unknown["errors"][0]["allowed"] == list(PATTERNS)
        reply = await service.post(picture(), webhookUrl="http://127.0.0.1/")
        assert reply.status_code == 400
        assert reply.json()["errors"][0]["pointer"] == "/webhookUrl"
        assert (await service.client.get("/v1/comfyui/workflow")).json()["workflows"] == []
        made = await post.webhook("https://shop.example.invalid/")
        changed = await service.client.patch(f"/v1/webhooks/{made['id']}", json={"url": "http://10.0.0.1/"})
        assert changed.status_code == 400
        assert (await service.client.get(f"/v1/webhooks/{made['id']}")).json()["url"] == made["url"]


async def test_there_may_be_so_many(tmp_path: Path) -> None:
    async with served(tmp_path, WEBHOOK_ALLOW_PRIVATE="false") as (service, _):
        body = {"url": "http://8.8.8.8/", "events": ["backend:stalled"]}
        replies = await asyncio.gather(
            *(service.client.post("/v1/webhooks", json=body) for _ in range(MAX_ENDPOINTS + 3))
        )
        assert sorted(reply.status_code for reply in replies) == [201] * MAX_ENDPOINTS + [409] * 3


# ---- the URL of a workflow


async def test_a_workflow_may_name_whom_to_call(tmp_path: Path, comfyui: Comfy, receiver: Receiver) -> None:
    async with served(tmp_path, comfyui) as (service, post):
        done = await service.run(picture(), webhookUrl=f"{receiver.url}?order=1")
        await service.run(picture())
        stopped = await service.submit(sleeper(), webhookUrl=receiver.url)
        await service.started(stopped)
        await service.cancel(stopped)
        failed = await service.run({"1": {"class_type": "NoSuchNode", "inputs": {}}}, webhookUrl=receiver.url)
        heard = await calls(receiver, lambda calls: len(calls) == 5)
        secret = (await service.client.get("/v1/webhooks/secret")).json()["secret"]

        def of(workflow_id: str) -> list[str]:
            return [call.type for call in heard if call.verify(secret)["data"]["workflowId"] == workflow_id]

        assert of(done["workflowId"]) == ["workflow:started", "workflow:completed"]
        assert of(stopped) == ["workflow:started", "workflow:cancelled"]
        assert of(failed["workflowId"]) == ["workflow:error"]
        assert {call.path for call in heard if call.workflow_id == done["workflowId"]} == {"/hook?order=1"}
        assert "webhook" not in str(done)
        assert "order=1" not in str(await post.deliveries()) + str(await service.events(done["workflowId"]))

        rotated = (await service.client.post("/v1/webhooks/secret/rotate")).json()
        assert rotated["previousUntil"] is not None
        reply = await service.client.post(f"/v1/comfyui/workflow/{stopped}/retry")
        again = reply.json()["workflowId"]
        await service.started(again)
        (last,) = (await calls(receiver, lambda calls: len(calls) == 6))[5:]
        assert last.workflow_id == again, "a retry is told to the same"
        last.verify(secret)
        last.verify(rotated["secret"])
        with pytest.raises(WebhookVerificationError):
            heard[0].verify(rotated["secret"])
        await service.cancel(again)
        await calls(receiver, lambda calls: len(calls) == 7)


async def test_a_lost_attempt_that_is_followed_by_another_is_no_end(tmp_path: Path, receiver: Receiver) -> None:
    with comfy(tmp_path / "comfyui") as process:
        async with served(tmp_path, process) as (service, _):
            await service.connected()
            workflow_id = await service.submit(sleeper(), webhookUrl=receiver.url)
            await service.started(workflow_id)
            process.kill()
            process.restart()
            await service.until(workflow_id, "error", willRetry=True)
            await service.cancel(workflow_id)
            heard = await calls(receiver, lambda calls: bool(calls) and calls[-1].type == "workflow:cancelled")
            assert "workflow:error" not in [call.type for call in heard]


# ---- secrets


async def test_secrets_are_told_once(tmp_path: Path, receiver: Receiver, comfyui: Comfy, log: Log) -> None:
    async with served(tmp_path, comfyui, LOG_LEVEL="debug") as (service, post):
        url = f"{receiver.url}?key=sEcReT-in-the-url"
        made = await post.webhook(url)
        rotated = (await service.client.post(f"/v1/webhooks/{made['id']}/rotate")).json()
        receiver.answer = lambda _: Answer(500)
        done = await service.run(picture(), webhookUrl=url)
        await post.until(lambda log: any(one["attempts"] for one in log))
        path = f"/v1/webhooks/{made['id']}"
        said = [await service.client.get(one) for one in ("/v1/webhooks", path, "/metrics", "/v1/deliveries")]
        said += [
            await service.client.post(f"{path}/test"),
            await service.client.patch(path, json={"description": "x"}),
            await service.client.get(f"/v1/comfyui/workflow/{done['workflowId']}?include=workflow,attempts"),
            *[await service.client.get(f"/v1/deliveries/{one['id']}") for one in await post.deliveries()],
            await service.client.delete(path),
        ]
        shared = (await service.client.get("/v1/webhooks/secret")).json()["secret"]
    told = "".join(reply.text for reply in said)
    logged = log.stream.getvalue()
    for secret in (made["secret"], rotated["secret"], shared):
        assert secret not in told + logged
        assert secret.removeprefix("whsec_") not in told + logged
    assert "sEcReT-in-the-url" not in logged
    assert logged
