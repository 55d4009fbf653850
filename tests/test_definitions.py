"""The definitions for other languages say what the stream really sends."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import jsonschema_rs
import pytest

from management_api import definitions
from routes.definitions import events_schema
from tests.queue_kit import ROOT, Queue, Site, comfy, picture

CHANNELS = ["workflow", "node", "comfyui", "preview", "queue", "gpu", "backend"]


@pytest.fixture
async def queue(tmp_path: Path) -> AsyncIterator[Queue]:
    with comfy(tmp_path / "comfyui") as simulator:
        async with Site(tmp_path / "site", simulator).fresh() as service:
            await service.connected()
            yield service


async def test_what_the_stream_sends_is_in_the_schema(queue: Queue) -> None:
    schema = (await queue.client.get("/v1/comfyui/events/schema.json")).json()
    assert schema == json.loads(json.dumps(events_schema()))
    frame = jsonschema_rs.validator_for(schema)
    async with queue.stream(*CHANNELS) as stream:
        await stream.until("subscribed")
        await stream.send('{"type": "nonsense"}')
        workflow = await queue.submit(picture())
        await stream.until("workflow:completed", workflowId=workflow)
        await stream.send(json.dumps({"type": "subscribe", "workflowId": workflow, "since": 0}))
        await stream.until("subscribed", workflowIds=[workflow])
        await stream.send(json.dumps({"type": "unsubscribe"}))
        await stream.until("unsubscribed")
        heard = await stream.settled()
    kinds = {one["type"] for one in heard}
    assert kinds >= {"subscribed", "unsubscribed", "error", "pong", "workflow:completed", "node:executed"}
    for one in heard:
        assert not [str(error) for error in frame.iter_errors(one)], one
    broken = {**stream.of(workflow, "workflow:completed")[0], "duration": "long"}
    assert not frame.is_valid(broken)


def test_every_field_of_an_event_is_told() -> None:
    stalled = events_schema()["$defs"]["BackendStalled"]
    assert stalled["required"] == ["type", "timestamp", "backend", "reason", "proven"]


@pytest.mark.parametrize("name", ["events.d.ts", "asyncapi.yaml"])
def test_the_files_in_docs_are_of_today(name: str, tmp_path: Path) -> None:
    definitions.write(tmp_path)
    assert (ROOT / "docs" / name).read_text() == (tmp_path / name).read_text(), "run `make definitions`"
