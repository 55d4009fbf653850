"""`management-api monitor`: what others submit to a ComfyUI is told, once, whoever was away meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import uuid
from collections.abc import AsyncIterator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import program
from tests.comfy_kit import PLAIN, Comfy, Graph, comfy, picture, sleeper
from tests.delivery.aws_kit import KEYS, EventBus, Moto, needs_moto, started_moto

LIFE = ["Job Started", "Images Generated", "Job Completed"]

pytestmark = [needs_moto, pytest.mark.slow]


@pytest.fixture(scope="module")
def moto() -> Iterator[Moto]:
    with started_moto() as server:
        yield server


@pytest.fixture
def bus(moto: Moto) -> EventBus:
    return EventBus(moto)


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[Comfy]:
    with comfy(tmp_path / "comfy") as process:
        yield process


@contextlib.asynccontextmanager
async def watching(tmp_path: Path, bus: EventBus, backend: Comfy, **environ: str) -> AsyncIterator[str]:
    """A monitor that is connected, as a process; its client id. It is told to stop at the end."""
    told = {"COMFYUI_URL": backend.url, "COMFY_PATH": str(backend.directory), "MANAGEMENT_API_KEY": ""}
    with program.started(tmp_path, "monitor", **bus.environ(LOG_FORMAT="json"), **told, **environ) as process:
        client_id = (await asyncio.to_thread(process.event, "monitor is ready"))["client_id"]
        await asyncio.to_thread(process.event, "backend is connected")
        yield client_id
        process.signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait) == 0, process.seen


async def submit(backend: Comfy, graph: Graph, client_id: str | None = None, **extra_data: Any) -> str:
    """A prompt of somebody who knows nothing of us."""
    prompt_id = str(uuid.uuid4())
    body: dict[str, Any] = {"prompt": graph, "prompt_id": prompt_id, "extra_data": extra_data}
    await backend.post("/prompt", body | ({} if client_id is None else {"client_id": client_id}))
    return prompt_id


async def test_all_of_it_under_our_client_id_and_the_outline_of_all_others(
    tmp_path: Path, bus: EventBus, backend: Comfy
) -> None:
    before = await submit(backend, picture())
    await backend.until_queue(lambda running, pending: not running and not pending)
    async with watching(tmp_path, bus, backend) as client_id:
        ours = await submit(backend, sleeper(steps=80), client_id, queue_id="order-17", api_key_comfy_org="secret")
        others = await submit(backend, picture(), "somebody else")
        nameless = await submit(backend, picture())
        failing = await submit(backend, sleeper(steps=2, fail="value_error", fail_at_step=1), "somebody else")
        for one in (ours, others, nameless):
            await bus.until("Job Completed", workflowId=one)
        await bus.until("Job Failed", workflowId=failing)
        quick = [await submit(backend, picture(), client_id) for _ in range(5)]
        for one in quick:
            await bus.until("Job Completed", workflowId=one)
    await bus.until("Monitor Stopped")

    for one in (ours, others, nameless, *quick):
        assert bus.types(one) == LIFE
    assert bus.types(failing) == ["Job Started", "Job Failed"]
    assert bus.types(before) == [], "what ended before there was a monitor is history"
    assert bus.told[0]["detail-type"] == "Monitor Initialized"
    assert bus.told[0]["detail"]["clientId"] == client_id
    for event in bus.told:
        detail = event["detail"]
        assert detail["promptId"] == detail["workflowId"]
        assert detail["queueId"] == ("order-17" if detail["workflowId"] == ours else detail["workflowId"])
        assert "secret" not in str(event)
    for one in (ours, *quick):
        executed = {node["nodeId"] for node in bus.details("Node Executed", workflowId=one)}
        assert executed == ({"1", "2", "3"} if one == ours else {"1", "2"})
    assert bus.details("Node Progress Update", workflowId=ours)
    for one in (others, failing):
        assert not [kind for kind in bus.types(one, live=True) if kind.startswith(("Node", "Progress"))]
    (completed,) = bus.details("Job Completed", workflowId=others)
    (output,) = completed["outputs"]
    assert (backend.outputs / output["filename"]).stat().st_size == output["size"]
    assert completed["duration"] > 0
    (failed,) = bus.details("Job Failed")
    assert (failed["errorType"], failed["nodeId"], failed["nodeType"]) == ("node", "3", "SleepSteps")
    assert bus.details("Queue Status Updated")


async def test_a_monitor_that_was_away_tells_each_end_once(tmp_path: Path, bus: EventBus, backend: Comfy) -> None:
    async with watching(tmp_path, bus, backend) as client_id:
        told = await submit(backend, picture(), "somebody else")
        await bus.until("Job Completed", workflowId=told)
        running = await submit(backend, sleeper(steps=30), "somebody else")
        waiting = await submit(backend, picture(), client_id)
        await bus.until("Job Started", workflowId=running)
    unseen = [await submit(backend, picture(), "somebody else") for _ in range(30)]
    await backend.until_queue(lambda running, pending: not running and not pending)
    for _ in range(2):  # the second finds nothing new
        async with watching(tmp_path, bus, backend) as again:
            assert again == client_id
            last = await submit(backend, picture(), "somebody else")
            for one in (running, waiting, *unseen, last):
                await bus.until("Job Completed", workflowId=one)
    for one in (told, running, waiting, *unseen, last):
        assert bus.types(one) == LIFE


async def test_a_monitor_that_is_killed_tells_each_end_all_the_same(
    tmp_path: Path, bus: EventBus, backend: Comfy
) -> None:
    with contextlib.suppress(Killed):
        async with watching(tmp_path, bus, backend):
            prompts = [await submit(backend, sleeper(steps=4), "somebody else") for _ in range(6)]
            await bus.until("Job Completed", workflowId=prompts[1])
            raise Killed
    async with watching(tmp_path, bus, backend):
        for one in prompts:
            await bus.until("Job Completed", workflowId=one)
    for one in prompts:
        # What was sent and not recorded is sent again: at least once, and in order.
        assert list(dict.fromkeys(bus.types(one))) == LIFE
        assert len(bus.types(one)) <= len(LIFE) + 1


class Killed(Exception):
    """`program.started` kills a process that is still there at the end of its block."""


async def test_what_disappears_is_told_as_what_it_was(tmp_path: Path, bus: EventBus, backend: Comfy) -> None:
    async with watching(tmp_path, bus, backend):
        running = await submit(backend, sleeper(), "somebody else")
        await bus.until("Job Started", workflowId=running)
        deleted = await submit(backend, picture(), "somebody else")
        await bus.until_right(lambda event: event["detail"].get("length") == 1)
        await backend.post("/queue", {"delete": [deleted]})
        await bus.until("Job Cancelled", workflowId=deleted)
        await backend.post("/interrupt", {"prompt_id": running})
        await bus.until("Job Cancelled", workflowId=running)
        lost = await submit(backend, sleeper(), "somebody else")
        await bus.until("Job Started", workflowId=lost)
        await asyncio.to_thread(backend.restart)
        failed = await bus.until("Job Failed", workflowId=lost)
        assert failed["detail"]["errorType"] == "lost"
    assert bus.types(deleted) == ["Job Cancelled"]
    assert bus.types(running) == ["Job Started", "Job Cancelled"]
    assert bus.types(lost) == ["Job Started", "Job Failed"]


@pytest.mark.skipif(find_spec("obstore") is None, reason="obstore not installed: pip install obstore")
async def test_outputs_are_uploaded_where_there_is_a_bucket(
    tmp_path: Path, moto: Moto, bus: EventBus, backend: Comfy
) -> None:
    place = {"LocationConstraint": KEYS["AWS_REGION"]}
    moto.client("s3").create_bucket(Bucket="pictures", CreateBucketConfiguration=place)
    async with watching(tmp_path, bus, backend, S3_BUCKET="pictures", S3_ENDPOINT_URL=moto.url):
        prompt_id = await submit(backend, picture(), "somebody else")
        detail = (await bus.until("Upload Complete", workflowId=prompt_id))["detail"]
        async with httpx.AsyncClient(**PLAIN) as client:
            picture_there = (await client.get(detail["url"])).raise_for_status().content
    assert picture_there == (backend.outputs / detail["output"]["filename"]).read_bytes()


async def test_its_doors_tell_how_it_is(tmp_path: Path, bus: EventBus, backend: Comfy) -> None:
    environ = bus.environ(LOG_FORMAT="json", COMFYUI_URL=backend.url, MANAGEMENT_API_KEY="")
    with program.started(tmp_path, "monitor", **environ) as process:
        url = (await asyncio.to_thread(process.event, "monitor is ready"))["url"]
        await asyncio.to_thread(process.event, "backend is connected")
        await bus.until("Job Completed", workflowId=await submit(backend, picture(), "somebody else"))
        async with httpx.AsyncClient(base_url=url, **PLAIN) as client:
            assert (await client.get("/health")).json()["status"] == "healthy"
            assert (await client.get("/ready")).json()["checks"] == {
                "store": "ok",
                "comfyui": "ok",
                "draining": False,
            }
            text = (await client.get("/metrics")).text
            assert (await client.get("/v1/comfyui/workflow")).status_code == 404
        assert 'comfyui_workflow_total{status="completed"} 1.0' in text
        assert 'comfyui_deliveries_total{kind="eventbridge",result="delivered"}' in text
        port = url.rpartition(":")[2]
        with program.started(tmp_path, "monitor", **environ, MANAGEMENT_API_PORT=port) as second:
            said = await asyncio.to_thread(second.line, "is in use by")
            assert str(tmp_path / "data" / "monitor") in said
        environ["MANAGEMENT_API_DATA_DIR"] = str(tmp_path / "other")
        with program.started(tmp_path, "monitor", **environ, MANAGEMENT_API_PORT=port) as third:
            assert (await asyncio.to_thread(third.event, "monitor is ready"))["url"] is None


def test_without_anybody_to_tell_it_does_not_start(tmp_path: Path) -> None:
    ended = program.run(tmp_path, "monitor", MANAGEMENT_API_KEY="")
    assert (ended.status, ended.lines) == (1, ["There is nobody to tell: set EVENTBRIDGE_BUS_NAME, or S3_BUCKET"])
