"""What the wire contract says of workflows (CONTRACT 4), point by point, over a real ComfyUI process."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from management_api.app import create_app
from management_api.settings import load
from tests.queue_kit import (
    PATH,
    Comfy,
    Queue,
    Site,
    comfy,
    environment,
    house,
    picture,
    sleeper,
    workflow,
)
from tests.serving import Log

VIEW = {
    "workflowId", "status", "progress", "currentNode", "startTime", "completionTime", "outputs", "error", "priority",
    "gpu", "backend", "createdAt", "queuePosition", "attempt", "errors", "errorType", "nodes", "currentNodeId",
    "currentNodeType", "step", "steps", "message", "etaSeconds", "etaP90Seconds", "outputsReused", "metadata",
    "promptId", "maxAttempts", "timeoutSeconds", "retryOf", "submittedBy", "cost",
}  # fmt: skip
SECRET = "extra-secret-9fK2"
UNKNOWN = "5b6f0c1e-93a7-4d52-8e0f-2a9c4b7d1e68"


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy]:
    """One ComfyUI for the whole file: nothing here breaks it."""
    with comfy(tmp_path_factory.mktemp("comfyui")) as process:
        yield process


@pytest.fixture(scope="module")
def site(simulator: Comfy, tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("site"), simulator)


@pytest.fixture(scope="module")
def lonely_site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("lonely"))


@pytest.fixture
async def queue(site: Site, simulator: Comfy) -> AsyncIterator[Queue]:
    """A fresh service, connected. What is left in ComfyUI at the end is cancelled."""
    async with site.fresh() as service:
        await service.connected()
        yield service
        for left in (await service.list())["workflows"]:
            if left["status"] in ("queued", "running"):
                await service.cancel(left["workflowId"])
        await simulator.until_queue(lambda running, pending: not running and not pending)


@pytest.fixture
async def away(lonely_site: Site) -> AsyncIterator[Queue]:
    """A fresh service whose ComfyUI is not there: everything waits."""
    async with lonely_site.fresh() as service:
        yield service


def problem(reply: httpx.Response, status: int) -> dict[str, Any]:
    """The problem details, with the members that old clients read."""
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/problem+json"
    found: dict[str, Any] = reply.json()
    assert found["status"] == found["statusCode"] == status
    assert found["message"] == found["detail"]
    assert found["error"] == found["title"]
    return found


async def stored(queue: Queue) -> int:
    return len((await queue.list(limit=1000))["workflows"])


# ---- in


async def test_accepted(away: Queue) -> None:
    reply = await away.post(picture())
    assert reply.status_code == 202
    body = reply.json()
    assert set(body) == {"workflowId", "status", "queuePosition", "createdAt"}
    assert (body["status"], body["queuePosition"]) == ("queued", 0)
    assert str(uuid.UUID(body["workflowId"])) == body["workflowId"]
    assert reply.headers["location"] == f"{PATH}/{body['workflowId']}"
    found = (await away.client.get(reply.headers["location"])).json()
    assert set(found) == VIEW
    assert found == found | {
        "workflowId": body["workflowId"], "createdAt": body["createdAt"], "status": "queued", "queuePosition": 0,
        "progress": 0, "currentNode": None, "startTime": None, "completionTime": None, "outputs": [], "error": None,
        "priority": "normal", "gpu": "local", "backend": None, "attempt": 0, "errors": [], "errorType": None,
        "nodes": {"total": 2, "done": 0, "cached": 0}, "metadata": None, "promptId": None, "outputsReused": False,
        "retryOf": None,
        "submittedBy": "admin",
    }  # fmt: skip


async def test_position_follows_priority(away: Queue) -> None:
    ids: dict[str, str] = {}
    positions = {}
    for priority in ("normal", "low", "high"):
        body = (await away.post(picture(), priority=priority)).json()
        ids[priority], positions[priority] = body["workflowId"], body["queuePosition"]
    assert positions == {"normal": 0, "low": 1, "high": 0}
    assert [(await away.get(ids[name]))["queuePosition"] for name in ("high", "normal", "low")] == [0, 1, 2]


async def test_the_client_may_choose_the_id(away: Queue) -> None:
    chosen = str(uuid.uuid4())
    reply = await away.post(picture(), id=chosen)
    assert reply.json()["workflowId"] == chosen
    assert problem(await away.post(picture(), id=chosen), 409)["currentStatus"] == "queued"
    await away.cancel(chosen)
    assert problem(await away.post(picture(), id=chosen), 409)["currentStatus"] == "cancelled"
    assert await stored(away) == 1


@pytest.mark.parametrize("chosen", ["7", UNKNOWN.upper(), UNKNOWN.replace("-", ""), 7, "../x"])
async def test_an_id_is_a_canonical_uuid(away: Queue, chosen: object) -> None:
    assert problem(await away.post(picture(), id=chosen), 400)["errors"][0]["pointer"] == "/id"
    assert await stored(away) == 0


async def test_metadata_is_echoed_up_to_4_kib(away: Queue) -> None:
    fits: dict[str, Any] = {"user": {"name": "Ä", "tags": [1, None, 2.5]}, "fill": ""}
    fits["fill"] = "x" * (4096 - len(json.dumps(fits, separators=(",", ":"), ensure_ascii=False).encode()))
    workflow_id = await away.submit(picture(), metadata=fits)
    assert (await away.get(workflow_id))["metadata"] == fits
    assert (await away.list())["workflows"][0]["metadata"] == fits
    reply = await away.post(picture(), metadata=fits | {"fill": fits["fill"] + "x"})
    assert problem(reply, 400)["errors"][0]["pointer"] == "/metadata"
    assert await stored(away) == 1


async def test_extra_data_reaches_comfyui_and_nobody_else(simulator: Comfy, tmp_path: Path, log: Log) -> None:
    # A save node is handed extra_pnginfo, and ComfyUI's report of its failure shows its inputs.
    (simulator.outputs / "in-the-way").write_text("a file where a folder should be")
    failing = picture()
    failing["2"]["inputs"]["filename_prefix"] = "in-the-way/x"
    extra = {"extra_pnginfo": {"workflow": {"note": SECRET}}, "api_key_comfy_org": SECRET}
    shown: list[str] = []
    channels = ("workflow", "node", "comfyui", "queue", "backend")
    app = create_app(load(environment(tmp_path, simulator), None), logs=log.logs)
    async with house(app) as queue, queue.stream(*channels) as stream:
        await queue.connected()
        for graph in (picture(), failing):
            reply = await queue.post(graph, extraData=extra, headers={"prefer": "wait=20"})
            shown.append(reply.text)
            workflow_id = reply.json()["workflowId"]
            view = await queue.get(workflow_id, include="workflow,attempts")
            shown += [json.dumps(view), json.dumps(await queue.events(workflow_id)), json.dumps(await queue.list())]
            entry = (await simulator.history())[view["promptId"]]
            assert entry["prompt"][3] == entry["prompt"][3] | extra
        assert view["status"] == "failed"
        assert view["errorType"] == "node"
        error = await stream.until("comfyui:execution_error")
        assert error["data"]["node_id"] == "2"
        shown += [json.dumps(await stream.settled())]
    shown += [json.dumps(log.lines())]
    assert len(log.lines()) > 4
    assert [text for text in shown if SECRET in text] == []


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("priority", "urgent", ["high", "normal", "low"]),
        ("priority", 3, []),
        ("gpu", "salad", ["local"]),
        ("gpu", 0, []),
    ],
)
async def test_unknown_priority_or_gpu(away: Queue, field: str, value: object, named: list[str]) -> None:
    fields: dict[str, Any] = {field: value}
    found = problem(await away.post(picture(), **fields), 400)
    (finding,) = found["errors"]
    assert finding["pointer"] == f"/{field}"
    assert all(name in found["detail"] for name in named)
    assert set(named) <= set(finding.get("allowed", named))
    assert await stored(away) == 0


async def test_keys_we_do_not_know_are_ignored(away: Queue) -> None:
    assert (await away.post(picture(), client="old", gpuType="h100")).status_code == 202


async def test_a_ui_graph_is_refused_with_advice(away: Queue) -> None:
    found = problem(await away.post({"nodes": [], "links": [], "version": 0.4}), 400)
    assert found["errors"][0]["code"] == "workflow_format_ui"
    assert "Export (API)" in found["detail"]
    assert await stored(away) == 0


# ---- checked


async def test_lenient_strict_and_dry(queue: Queue, simulator: Comfy) -> None:
    doubtful = workflow("invalid_out_of_range")
    posts = await simulator.posts()

    strict = problem(await queue.post(doubtful, headers={"prefer": "handling=strict"}), 422)
    (finding,) = strict["errors"]
    assert finding == finding | {"nodeId": "1", "classType": "EmptyImage", "input": "width"}
    assert finding["pointer"] == "/workflow/1/inputs/width"
    assert await stored(queue) == 0

    dry = await queue.client.post(PATH, params={"dryRun": "true"}, json={"workflow": doubtful})
    assert dry.status_code == 200
    assert dry.json() == dry.json() | {"valid": True, "status": "queued", "eligibleBackends": ["local"]}
    assert dry.json()["errors"][0]["severity"] == "warning"
    assert dry.json()["queuePosition"] == 0
    never = await queue.client.post(PATH, params={"dryRun": "true"}, json={"workflow": workflow("invalid_cycle")})
    assert (never.json()["valid"], never.json()["status"]) == (False, "failed")
    assert await stored(queue) == 0
    assert await simulator.posts() == posts

    # Lenient: the doubt is told, and ComfyUI's own answer at its turn is the verdict.
    reply = await queue.post(doubtful)
    assert reply.status_code == 202
    assert reply.json()["status"] == "queued"
    assert reply.json()["errors"][0]["severity"] == "warning"
    view = await queue.ended(reply.json()["workflowId"])
    assert (view["status"], view["errorType"], view["startTime"]) == ("failed", "validation", None)
    assert view["errors"][-1] == view["errors"][-1] | {"nodeId": "1", "input": "width"}
    assert await simulator.posts() == posts + 1


async def test_strict_takes_what_is_right(queue: Queue) -> None:
    reply = await queue.post(picture(), headers={"prefer": "handling=strict, wait=20"})
    assert reply.status_code == 200
    assert reply.json()["status"] == "completed"
    assert reply.headers["preference-applied"] == "wait=20, handling=strict"


async def test_what_no_comfyui_could_run_fails_at_once(queue: Queue, simulator: Comfy) -> None:
    posts = await simulator.posts()
    load_image = {"1": {"class_type": "LoadImage", "inputs": {"image": "example.png"}}}
    reply = await queue.post(load_image)
    assert reply.status_code == 202
    body = reply.json()
    assert body["status"] == "failed"
    assert body["errors"][0]["severity"] == "error" if "severity" in body["errors"][0] else True
    view = await queue.get(body["workflowId"])
    assert (view["status"], view["errorType"], view["attempt"]) == ("failed", "validation", 0)
    assert view["error"]
    assert await queue.cancel(body["workflowId"]) == "failed"
    assert await queue.kinds(body["workflowId"]) == ["error"]
    assert await simulator.posts() == posts


async def test_prefer_wait(queue: Queue) -> None:
    reply = await queue.post(picture(), headers={"prefer": "wait=20"})
    assert reply.status_code == 200
    assert reply.headers["preference-applied"] == "wait=20"
    assert set(reply.json()) == VIEW
    assert (reply.json()["status"], reply.json()["progress"]) == ("completed", 100)
    blocker = await queue.submit(sleeper())
    waiting = await queue.post(picture(), headers={"prefer": "wait=0"})
    assert waiting.status_code == 202
    assert waiting.json()["status"] == "queued"
    await queue.cancel(blocker)


async def test_prefer_wait_is_woken_by_the_end(queue: Queue) -> None:
    held = asyncio.create_task(queue.post(sleeper(), id=(chosen := str(uuid.uuid4())), headers={"prefer": "wait=20"}))
    async with queue.stream(since=0) as stream:
        await stream.until("workflow:started", workflowId=chosen)
    assert not held.done()
    await queue.cancel(chosen)
    reply = await held
    assert (reply.status_code, reply.json()["status"]) == (200, "cancelled")


async def test_a_replay_is_the_first_reply_whatever_became_of_it(simulator: Comfy, tmp_path: Path) -> None:
    graph = picture() | {"3": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "none.safetensors"}}}
    graph |= {"4": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": 7, "x": ["3", 0]}}}
    async with house(create_app(load(environment(tmp_path, COMFYUI_URL=simulator.url), None))) as queue:
        await queue.connected()
        first = await queue.post(graph, headers={"idempotency-key": "told"})
        assert [one["severity"] for one in first.json()["errors"]] == ["warning"]
        await queue.ended(first.json()["workflowId"])
        queue.app.running[0].workflows.drain(leaving=False)  # no new work: this is none
        again = await queue.post(graph, headers={"idempotency-key": "told"})
        assert again.headers["idempotency-replayed"] == "true"
        assert (again.status_code, again.json()) == (202, first.json())
        problem(await queue.post(graph, headers={"idempotency-key": "other"}), 503)


async def test_an_idempotency_key_replays(simulator: Comfy, tmp_path: Path) -> None:
    settings = load(environment(tmp_path, simulator), None)
    body = {"workflow": picture(), "metadata": {"a": 1}}
    key = {"idempotency-key": "order-7"}
    async with house(create_app(settings)) as queue:
        await queue.connected()
        first = await queue.client.post(PATH, json=body, headers=key)
        assert first.status_code == 202
        assert "idempotency-replayed" not in first.headers
        await queue.ended(first.json()["workflowId"])
        again = await queue.client.post(PATH, json=body, headers=key)
        assert (again.status_code, again.json()) == (202, first.json())
        assert again.headers["idempotency-replayed"] == "true"
        assert again.headers["location"] == first.headers["location"]
        problem(await queue.client.post(PATH, json=body | {"priority": "high"}, headers=key), 422)
        problem(await queue.client.post(PATH, json=body, headers={"idempotency-key": "x" * 256}), 400)
        both = await asyncio.gather(
            *(queue.client.post(PATH, json=body, headers={"idempotency-key": "at once"}) for _ in range(5))
        )
        assert len({reply.json()["workflowId"] for reply in both}) == 1
        assert (
            sorted(reply.headers.get("idempotency-replayed", "false") for reply in both) == ["false"] + ["true"] * 4
        )
    async with house(create_app(settings)) as queue:
        again = await queue.client.post(PATH, json=body, headers=key)
        assert (again.status_code, again.json()) == (202, first.json())
        assert again.headers["idempotency-replayed"] == "true"
        assert await stored(queue) == 2


async def test_a_full_queue_refuses(tmp_path: Path) -> None:
    async with house(create_app(load(environment(tmp_path, COMFYUI_MAX_QUEUE="2"), None))) as queue:
        first = await queue.submit(picture())
        await queue.submit(picture())
        reply = await queue.post(picture())
        assert problem(reply, 503)["retryAfter"] == int(reply.headers["retry-after"]) > 0
        assert await stored(queue) == 2
        await queue.cancel(first)
        assert (await queue.post(picture())).status_code == 202


# ---- looked at


async def test_a_completed_one(queue: Queue, simulator: Comfy) -> None:
    graph = picture()
    view = await queue.run(graph, priority="high", metadata={"n": 1})
    assert set(view) == VIEW
    entry = (await simulator.history())[view["promptId"]]
    messages = dict(entry["status"]["messages"])
    assert view["startTime"] == messages["execution_start"]["timestamp"]
    assert view["completionTime"] == messages["execution_success"]["timestamp"]
    assert view == view | {
        "status": "completed", "progress": 100, "currentNode": None, "error": None, "priority": "high",
        "backend": "local", "queuePosition": None, "attempt": 1, "errors": [], "errorType": None,
        "nodes": {"total": 2, "done": 2, "cached": 0}, "outputsReused": False, "metadata": {"n": 1},
    }  # fmt: skip
    (output,) = view["outputs"]
    assert output == output | {"kind": "image", "subfolder": "", "type": "output", "nodeId": "2"}
    assert output["contentType"] == "image/png"
    content = (simulator.outputs / output["filename"]).read_bytes()
    assert output["size"] == len(content)
    picture_reply = await queue.client.get(output["url"])
    assert (picture_reply.status_code, picture_reply.content) == (200, content)

    assert "workflow" not in view
    assert "attempts" not in view
    more = await queue.get(view["workflowId"], include="workflow,attempts")
    assert more["workflow"] == graph
    (attempt,) = more["attempts"]
    assert attempt == attempt | {
        "attempt": 1, "backend": "local", "promptId": view["promptId"], "state": "ended",
        "startTime": view["startTime"], "endTime": view["completionTime"], "error": None, "errorType": None,
    }  # fmt: skip


async def test_events_and_their_stream(queue: Queue) -> None:
    workflow_id = await queue.submit(sleeper(), priority="low")
    live = queue.follow(workflow_id)
    heard = [await anext(live), await anext(live)]
    assert [event["type"] for event in heard] == ["workflow:queued", "workflow:started"]
    assert heard[0] == heard[0] | {"queuePosition": 0, "priority": "low", "gpu": "local"}
    assert heard[1] == heard[1] | {"backend": "local", "attempt": 1}
    assert heard[1]["startTime"] == (await queue.get(workflow_id))["startTime"]
    assert [event["seq"] for event in heard] == sorted(event["seq"] for event in heard)
    await queue.cancel(workflow_id)
    heard += [event async for event in live]  # ends by itself
    assert heard[-1]["type"] == "workflow:cancelled"
    assert await queue.events(workflow_id) == heard
    assert [event async for event in queue.follow(workflow_id, last=heard[1]["seq"])] == heard[2:]
    assert [event async for event in queue.follow(workflow_id, last=heard[-1]["seq"])] == []


async def test_list_filters(queue: Queue) -> None:
    done = (await queue.run(picture()))["workflowId"]
    failed = (await queue.run(workflow("invalid_cycle")))["workflowId"]
    await queue.switch("pause")
    waiting = await queue.submit(picture())

    async def ids(**query: Any) -> list[str]:
        return [found["workflowId"] for found in (await queue.list(**query))["workflows"]]

    assert await ids() == [waiting, failed, done]
    assert await ids(status="failed") == [failed]
    assert await ids(status="queued") == [waiting]
    assert await ids(errorType="validation") == [failed]
    assert await ids(errorType="oom") == []
    assert await ids(gpu="local") == [waiting, failed, done]
    assert await ids(since=(await queue.get(waiting))["createdAt"] + 1) == []
    assert await ids(since=(await queue.get(failed))["createdAt"]) == [waiting, failed]
    assert set((await queue.list())["workflows"][0]) == VIEW
    for query in ({"status": "lost"}, {"limit": 0}, {"limit": 1001}, {"cursor": "nonsense"}, {"since": "monday"}):
        problem(await queue.client.get(PATH, params=query), 400)


async def test_the_cursor_is_stable_under_inserts(away: Queue) -> None:
    ids = [await away.submit(picture()) for _ in range(5)]
    page = await away.list(limit=2)
    seen = [found["workflowId"] for found in page["workflows"]]
    while page["nextCursor"] is not None:
        await away.submit(picture())
        page = await away.list(limit=2, cursor=page["nextCursor"])
        seen += [found["workflowId"] for found in page["workflows"]]
    assert seen == ids[::-1]


@pytest.mark.parametrize("bad", ["7", "..", "%2e%2e%2fx", UNKNOWN, UNKNOWN.upper(), "a%00b"])
async def test_unknown_ids(away: Queue, bad: str) -> None:
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/events"), ("POST", "/retry"), ("PATCH", "")):
        body = {"priority": "low"} if method == "PATCH" else None
        reply = await away.client.request(method, f"{PATH}/{bad}{path}", json=body)
        if not (reply.status_code == 405 and bad in ("..", "%2e%2e%2fx")):  # the client resolves those itself
            problem(reply, 404)


# ---- ended by somebody


async def test_cancel_what_waits(away: Queue) -> None:
    workflow_id = await away.submit(picture())
    reply = await away.client.delete(f"{PATH}/{workflow_id}")
    assert (reply.status_code, reply.json()) == (200, {"workflowId": workflow_id, "status": "cancelled"})
    view = await away.get(workflow_id)
    assert (view["status"], view["queuePosition"], view["startTime"]) == ("cancelled", None, None)
    assert view["completionTime"] >= view["createdAt"]
    assert await away.cancel(workflow_id) == "cancelled"
    assert await away.kinds(workflow_id) == ["queued", "cancelled"]
    assert await away.get(workflow_id) == view


async def test_cancel_what_runs(queue: Queue, simulator: Comfy) -> None:
    workflow_id = await queue.submit(sleeper())
    await queue.started(workflow_id)
    assert await queue.cancel(workflow_id) == "cancelled"
    # Stored before the reply, whatever ComfyUI still does; and it stays so when ComfyUI has let go.
    view = await queue.get(workflow_id)
    assert view["status"] == "cancelled"
    await simulator.until_queue(lambda running, pending: not running and not pending)
    assert (await queue.run(picture()))["status"] == "completed"
    assert await queue.get(workflow_id) == view
    assert await queue.kinds(workflow_id) == ["queued", "started", "cancelled"]
    assert await queue.attempts(workflow_id) == [(1, "ended")]
    entry = (await simulator.history())[view["promptId"]]
    assert entry["status"]["messages"][-1][0] == "execution_interrupted"


async def test_cancel_what_has_ended(queue: Queue) -> None:
    done = await queue.run(picture())
    reply = await queue.client.delete(f"{PATH}/{done['workflowId']}")
    assert problem(reply, 409)["currentStatus"] == "completed"
    failed = await queue.run(workflow("fail_value_error"))
    assert (failed["status"], failed["errorType"]) == ("failed", "node")
    reply = await queue.client.delete(f"{PATH}/{failed['workflowId']}")
    assert problem(reply, 409)["currentStatus"] == "failed"
    assert await queue.get(done["workflowId"]) == done


async def test_retry(queue: Queue, simulator: Comfy) -> None:
    extra = {"extra_pnginfo": {"workflow": {"n": 1}}}
    failed = await queue.run(workflow("fail_value_error"), extraData=extra, priority="high", metadata={"n": 1})
    reply = await queue.client.post(f"{PATH}/{failed['workflowId']}/retry")
    assert reply.status_code == 202
    body = reply.json()
    assert body["workflowId"] != failed["workflowId"]
    assert (body["retryOf"], body["status"]) == (failed["workflowId"], "queued")
    assert reply.headers["location"] == f"{PATH}/{body['workflowId']}"
    again = await queue.ended(body["workflowId"])
    for same in ("priority", "metadata", "gpu", "error", "errorType", "maxAttempts", "timeoutSeconds"):
        assert again[same] == failed[same]
    assert again["retryOf"] == failed["workflowId"]
    assert (await simulator.history())[again["promptId"]]["prompt"][3]["extra_pnginfo"] == extra["extra_pnginfo"]
    assert await queue.get(failed["workflowId"]) == failed

    await queue.switch("pause")
    waiting = await queue.submit(picture())
    reply = await queue.client.post(f"{PATH}/{waiting}/retry")
    assert problem(reply, 409)["currentStatus"] == "queued"
    await queue.cancel(waiting)
    assert (await queue.client.post(f"{PATH}/{waiting}/retry")).status_code == 202
    await queue.switch("resume")
    done = await queue.run(picture())
    reply = await queue.client.post(f"{PATH}/{done['workflowId']}/retry")
    assert problem(reply, 409)["currentStatus"] == "completed"


async def test_priority_while_it_waits(away: Queue) -> None:
    ids = [await away.submit(picture()) for _ in range(3)]
    reply = await away.set_priority(ids[2], "high")
    assert reply.status_code == 200
    assert reply.json() == reply.json() | {"workflowId": ids[2], "priority": "high", "queuePosition": 0}
    assert [(await away.get(one))["queuePosition"] for one in ids] == [1, 2, 0]
    (finding,) = problem(await away.set_priority(ids[0], "urgent"), 400)["errors"]
    assert finding["pointer"] == "/priority"
    await away.cancel(ids[0])
    assert problem(await away.set_priority(ids[0], "low"), 409)["currentStatus"] == "cancelled"


async def test_pause_and_resume(queue: Queue) -> None:
    assert await queue.switch("pause") == {"length": 0, "running": 0, "paused": True}
    workflow_id = await queue.submit(picture())
    assert await queue.switch("pause") == {"length": 1, "running": 0, "paused": True}
    assert (await queue.get(workflow_id))["attempt"] == 0
    await queue.switch("resume")
    assert (await queue.ended(workflow_id))["status"] == "completed"
    problem(await queue.client.post("/v1/comfyui/queue/stop"), 404)


# ---- progress and ends that ComfyUI tells


async def test_progress_never_goes_back(queue: Queue) -> None:
    async with queue.stream("workflow", "node") as stream:
        workflow_id = await queue.submit(workflow("slow_multi_node"))
        await stream.until("workflow:completed", workflowId=workflow_id)
        heard = stream.of(workflow_id)
    kinds = [frame["type"] for frame in heard]
    told = [kind for kind in kinds if kind.startswith("workflow:")]
    assert told[:2] == ["workflow:queued", "workflow:started"]
    assert kinds[-1] == "workflow:completed"
    progress = [frame for frame in heard if frame["type"] == "workflow:progress"]
    numbers = [frame["progress"] for frame in progress]
    assert numbers == sorted(numbers)
    assert len(set(numbers)) >= 5
    assert all(0 <= number < 100 for number in numbers)
    assert any(frame["step"] == 2 and frame["steps"] == 4 and "2/4" in frame["message"] for frame in progress)
    assert {"node:executing", "node:progress", "node:executed"} <= set(kinds)
    assert all(
        ("seq" in frame) == (not frame["type"].endswith("progress"))
        for frame in heard
        if "node:" not in frame["type"]
    )
    assert heard[-1]["duration"] >= 1.0


async def test_how_far_it_came_stays_with_a_failure(queue: Queue) -> None:
    graph = sleeper(steps=4, seconds=0.05, fail="value_error", fail_at_step=3)
    async with queue.stream() as stream:
        workflow_id = await queue.submit(graph)
        await stream.until("workflow:error", workflowId=workflow_id)
        reached = max(frame["progress"] for frame in stream.of(workflow_id, "workflow:progress"))
    assert reached > 0
    assert (await queue.get(workflow_id))["progress"] == reached


async def test_interrupted_in_comfyui_by_somebody_else(queue: Queue, simulator: Comfy) -> None:
    workflow_id = await queue.submit(sleeper())
    await queue.started(workflow_id)
    await simulator.post("/interrupt", {})
    view = await queue.ended(workflow_id)
    assert (view["status"], view["errorType"]) == ("cancelled", None)
    assert "somebody else" in view["error"]
    assert await queue.kinds(workflow_id) == ["queued", "started", "cancelled"]


async def test_time_limit(queue: Queue, simulator: Comfy) -> None:
    workflow_id = await queue.submit(sleeper(), timeoutSeconds=0.3)
    follower = await queue.submit(picture())
    view = await queue.ended(workflow_id)
    assert (view["status"], view["errorType"], view["attempt"]) == ("failed", "timeout", 1)
    assert "0.3 s" in view["error"]
    assert view["completionTime"] - view["startTime"] >= 300
    assert (await queue.ended(follower))["status"] == "completed"
    entry = (await simulator.history())[view["promptId"]]
    assert entry["status"]["messages"][-1][0] == "execution_interrupted"
    await simulator.until_queue(lambda running, pending: not running and not pending)


async def test_a_second_run_finds_everything_cached(queue: Queue) -> None:
    graph = picture()
    first = await queue.run(graph)
    second = await queue.run(graph)
    assert (second["status"], second["outputsReused"], second["progress"]) == ("completed", True, 100)
    assert second["nodes"] == {"total": 2, "done": 2, "cached": 2}
    assert [output["filename"] for output in second["outputs"]] == [output["filename"] for output in first["outputs"]]
    assert second["errors"] == []
    (event,) = [event for event in await queue.events(second["workflowId"]) if event["type"] == "workflow:completed"]
    assert event["outputsReused"] is True


async def test_cached_file_that_was_deleted_is_told(queue: Queue, simulator: Comfy) -> None:
    graph = picture()
    first = await queue.run(graph)
    (simulator.outputs / first["outputs"][0]["filename"]).unlink()
    second = await queue.run(graph)
    assert (second["status"], second["outputsReused"]) == ("completed", True)
    assert [finding["code"] for finding in second["errors"]] == ["output_missing"]
    problem(await queue.client.get(second["outputs"][0]["url"]), 404)
