"""EventBridge hears of every workflow: through a real API (moto's server), read back behind a rule."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from pathlib import Path

import msgspec
import pytest

from management_api.app import create_app
from management_api.settings import load
from managers.delivery.eventbridge_bus import Bus, BusConfig
from managers.delivery.eventbridge_details import Entry, fitted
from managers.delivery.port import Again, Delivered, Refused
from tests.delivery.aws_kit import EventBus, Front, Moto, Told, needs_moto, started_moto
from tests.queue_kit import ROOT, Comfy, comfy, environment, house, picture, sleeper

LIFE = ["Job Started", "Images Generated", "Job Completed"]


def is_end(workflow_id: str, event: Told) -> bool:
    return event["detail"]["workflowId"] == workflow_id and event["detail-type"] in ("Job Completed", "Job Failed")


@pytest.fixture(scope="module")
def moto() -> Iterator[Moto]:
    with started_moto() as server:
        yield server


@pytest.fixture
def bus(moto: Moto) -> EventBus:
    return EventBus(moto)


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy]:
    with comfy(tmp_path_factory.mktemp("comfy")) as process:
        yield process


@needs_moto
@pytest.mark.slow
async def test_the_life_of_a_workflow_is_told_in_order(tmp_path: Path, bus: EventBus, backend: Comfy) -> None:
    app = create_app(load(environment(tmp_path, backend, **bus.environ()), None))
    async with house(app) as service:
        first = await service.submit(picture(), extraData={"queue_id": "order-17", "api_key_comfy_org": "secret"})
        second = await service.submit(picture())
        failing = await service.submit(sleeper(steps=2, fail="value_error", fail_at_step=1))
        for one in (first, second, failing):
            await service.ended(one)
            await bus.until_right(partial(is_end, one))
        slow = await service.submit(sleeper())
        await bus.until("Job Started", workflowId=slow)
        await service.cancel(slow)
        await bus.until("Job Cancelled", workflowId=slow)
        prompts = {one: (await service.get(one))["promptId"] for one in (first, second, failing, slow)}
        (dispatcher,) = app.running[0].workflows.dispatchers
        client_id = dispatcher.backend.client_id
    await bus.until("Monitor Stopped")

    assert bus.types(first) == bus.types(second) == LIFE
    assert bus.types(failing) == ["Job Started", "Job Failed"]
    assert bus.types(slow) == ["Job Started", "Job Cancelled"]
    for event in bus.told:
        detail = event["detail"]
        assert event["source"] == "comfyui.monitor"
        assert datetime.fromisoformat(detail["timestamp"]).tzinfo is not None
        assert detail["clientId"] == client_id
        assert detail["promptId"] == prompts.get(detail["workflowId"])
        assert detail["queueId"] == ("order-17" if detail["workflowId"] == first else detail["workflowId"])
        assert "secret" not in str(event)
    assert bus.types()[0] == "Monitor Initialized"
    assert bus.told[0]["detail"]["backends"] == [{"name": "local", "clientId": client_id}]
    assert set(bus.types(live=True)) >= {"Queue Status Updated", "Progress Update", "Node Executing", "Node Executed"}
    (completed,) = bus.details("Job Completed", workflowId=first)
    assert [output["filename"].startswith("kit") for output in completed["outputs"]] == [True]
    (failed,) = bus.details("Job Failed")
    assert failed["errorType"] == "node"
    assert failed["willRetry"] is False


@needs_moto
@pytest.mark.slow
async def test_an_attempt_that_is_made_again_is_no_end(tmp_path: Path, bus: EventBus, backend: Comfy) -> None:
    async with house(create_app(load(environment(tmp_path, backend, **bus.environ()), None))) as service:
        workflow_id = await service.submit(sleeper(steps=20))
        await bus.until("Job Started", workflowId=workflow_id)
        await asyncio.to_thread(backend.restart)
        await bus.until("Job Completed", workflowId=workflow_id)
        attempts = (await service.get(workflow_id, include="attempts"))["attempts"]
    assert bus.types(workflow_id) == ["Job Started", *LIFE]
    first, second = (attempt["promptId"] for attempt in attempts)
    told = [event["detail"] for event in bus.told if event["detail"]["workflowId"] == workflow_id]
    again = next(n for n, detail in enumerate(told) if detail.get("attempt") == 2)
    assert {detail["promptId"] for detail in told[:again]} == {first}
    assert {detail["promptId"] for detail in told[again:]} == {second}


@needs_moto
@pytest.mark.slow
async def test_progress_is_throttled_and_nodes_are_not(tmp_path: Path, bus: EventBus, backend: Comfy) -> None:
    environ = bus.environ(EVENT_PROGRESS_SECONDS="0.5")
    async with house(create_app(load(environment(tmp_path, backend, **environ), None))) as service:
        await bus.until("Monitor Initialized")
        workflow_id = await service.submit(sleeper(steps=40, seconds=0.05))
        completed = await bus.until("Job Completed", workflowId=workflow_id)
    steps = bus.details("Node Progress Update", workflowId=workflow_id)
    assert 2 <= len(steps) <= completed["detail"]["duration"] / 0.5 + 1
    assert [step["nodeProgress"] for step in steps] == sorted({step["nodeProgress"] for step in steps})
    assert len(bus.details("Progress Update", workflowId=workflow_id)) <= completed["detail"]["duration"] / 0.5 + 2
    step = steps[0]
    assert (step["nodeId"], step["displayNodeId"], step["realNodeId"], step["parentNodeId"]) == ("3", "3", "3", None)
    assert (step["nodeType"], step["nodeState"], step["nodeMaxProgress"]) == ("SleepSteps", "running", 40)
    assert step["nodePercentage"] == round(100 * step["nodeProgress"] / 40)
    assert step["message"]
    assert step["nodeName"]
    executing = bus.details("Node Executing", workflowId=workflow_id)
    assert {node["nodeId"] for node in executing} == {"1", "2", "3"}
    kinds = bus.types(workflow_id, live=True)
    assert kinds[0] == "Job Started"
    assert kinds[-1] == "Job Completed"


@needs_moto
@pytest.mark.slow
async def test_of_a_call_only_what_failed_is_sent_again(tmp_path: Path, bus: EventBus, backend: Comfy) -> None:
    front = Front(bus.url)
    refused: set[str] = set()

    def refuse(entry: dict[str, str]) -> bool:
        """The first try of the first `Job Started` that comes."""
        if entry["DetailType"] != "Job Started" or refused:
            return False
        refused.add(entry["Detail"])
        return True

    front.refuses = refuse
    environ = bus.environ(EVENTBRIDGE_ENDPOINT_URL=front.url)
    async with front.up(), house(create_app(load(environment(tmp_path, backend, **environ), None))) as service:
        workflows = [await service.submit(picture()) for _ in range(3)]
        for one in workflows:
            await bus.until("Job Completed", workflowId=one)
        assert len(refused) == 1
        for one in workflows:
            assert bus.types(one) == LIFE
        sent = [entry["Detail"] for call in front.calls for entry in call if entry["DetailType"] in LIFE]
        assert sorted(sent) == sorted([*set(sent), *refused]), "only what was refused is sent twice"
        log = (await service.client.get("/v1/deliveries", params={"destination": "eventbridge"})).json()["deliveries"]
        assert sorted(one["attempts"] for one in log) == [1] * (len(log) - 1) + [2]


@needs_moto
@pytest.mark.slow
async def test_each_entry_has_an_outcome_of_its_own(bus: EventBus) -> None:
    front = Front(bus.url)
    front.refuses = lambda entry: "refuse" in entry["Detail"]
    names = [*"abcdefghij", "refuse", "k"]
    entries = [fitted("Job Started", {"promptId": name}, 1_764_000_000_000) for name in names]
    config = BusConfig(name=bus.name, endpoint_url=front.url, region="eu-west-1", access_key_id="a")
    client = Bus(msgspec.structs.replace(config, secret_access_key="b"))
    async with front.up():
        outcomes = await client.put([*entries, Entry("Job Started", "{no JSON", 1_764_000_000_000, 8)])
    assert [len(call) for call in front.calls] == [10, 3]
    assert [type(outcome) for outcome in outcomes] == [Delivered] * 10 + [Again, Delivered, Refused]
    gone = await client.put(entries)
    assert [type(outcome) for outcome in gone] == [Again] * 12
    await client.aclose()
    lost = Bus(msgspec.structs.replace(config, name="nobus", endpoint_url=bus.url, secret_access_key="b"))
    (outcome,) = await lost.put(entries[:1])
    assert isinstance(outcome, Again)
    assert "nobus does not exist" in outcome.reason
    await lost.aclose()
    assert [event["detail"]["promptId"] for event in await bus.read()] == [*"abcdefghijk"]


@needs_moto
@pytest.mark.slow
async def test_a_bus_that_was_away_gets_everything_in_order(tmp_path: Path, bus: EventBus, backend: Comfy) -> None:
    front = Front(bus.url)
    environ = environment(tmp_path, backend, **bus.environ(EVENTBRIDGE_ENDPOINT_URL=front.url))
    async with house(create_app(load(environ, None))) as service:
        workflows = [await service.submit(picture()) for _ in range(4)]
        ended = [await service.ended(one) for one in workflows]
        assert [one["status"] for one in ended] == ["completed"] * 4
    # The service has stopped meanwhile too.
    async with house(create_app(load(environ, None))) as service, front.up():
        for one in workflows:
            await bus.until("Job Completed", workflowId=one)
        for one in workflows:
            assert bus.types(one) == LIFE
        assert bus.types()[0] == "Monitor Initialized"
        for one in workflows:
            (started,) = bus.details("Job Started", workflowId=one)
            assert started["promptId"] == (await service.get(one))["promptId"]


@needs_moto
@pytest.mark.slow
async def test_snake_names_for_older_consumers(tmp_path: Path, bus: EventBus, backend: Comfy) -> None:
    environ = bus.environ(EVENT_NAMING="snake")
    async with house(create_app(load(environment(tmp_path, backend, **environ), None))) as service:
        workflow_id = await service.submit(picture(), extraData={"queue_id": 17})
        detail = (await bus.until("Job Completed", workflow_id=workflow_id))["detail"]
    assert detail["queue_id"] == "17"
    assert {"prompt_id", "client_id", "timestamp", "outputs_reused"} <= detail.keys()
    assert {"node_id", "content_type"} <= detail["outputs"][0].keys()
    assert not any(letter.isupper() for event in bus.told for name in event["detail"] for letter in name)


@needs_moto
@pytest.mark.slow
async def test_a_hanging_bus_holds_up_nothing(tmp_path: Path, backend: Comfy) -> None:
    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    silent = await asyncio.start_server(hang, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{silent.sockets[0].getsockname()[1]}"
    environ = {"EVENTBRIDGE_BUS_NAME": "x", "EVENTBRIDGE_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "a"}
    environ["AWS_SECRET_ACCESS_KEY"] = "b"
    async with house(create_app(load(environment(tmp_path, backend, **environ), None))) as service:
        for _ in range(3):
            assert (await service.run(picture()))["status"] == "completed"
        pending = (await service.client.get("/v1/deliveries", params={"state": "pending"})).json()["deliveries"]
        assert {one["type"] for one in pending} == {"workflow:started", "images:generated", "workflow:completed"}
    silent.close()
    await silent.wait_closed()


def test_without_a_bus_nothing_of_aws_is_imported() -> None:
    code = (
        "import sys, management_api.app, management_api.eventbridge;"
        "sys.exit(any(name.startswith(('aiobotocore', 'botocore', 'aiohttp')) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=30, check=False).returncode == 0
