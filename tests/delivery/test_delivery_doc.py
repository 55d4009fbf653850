"""docs/delivery.md says what is sent: its catalogue has every event, with the fields that receivers really get, and
its receiver works.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec

from managers.delivery.endpoints import TYPES
from managers.delivery.webhooks import body_of
from managers.events.types import AnyStoredEvent
from tests.delivery.kit import calls, served
from tests.delivery.receiver import PATIENCE, receiving
from tests.queue_kit import comfy, picture, sleeper

DOC = Path(__file__).parent.parent.parent / "docs" / "delivery.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOC.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def catalogue() -> dict[str, dict[str, Any]]:
    found = [json.loads(text) for text in blocks("json")]
    return {one["type"]: one for one in found if "type" in one}


def fields(value: Any) -> Any:
    """The names in it, however deep; of a list those of its first element."""
    if isinstance(value, dict):
        return {name: fields(inner) for name, inner in value.items()}
    return [fields(value[0])] if isinstance(value, list) and value else None


def test_it_has_every_event_and_they_can_be_read() -> None:
    shown = catalogue()
    assert set(shown) == {*TYPES, "webhook:test"}
    decoder = msgspec.json.Decoder(AnyStoredEvent)
    for kind in TYPES:
        event = shown[kind]["data"] | {"type": kind, "timestamp": 0}
        again = json.loads(body_of(kind, msgspec.json.encode(decoder.decode(json.dumps(event)))))
        assert fields(again) == fields(shown[kind]), kind


async def test_receivers_really_get_these(tmp_path: Path) -> None:
    with comfy(tmp_path / "comfyui") as process, receiving() as receiver:
        async with served(tmp_path, process) as (service, post):
            made = await post.webhook(receiver.url, "*")
            await service.client.post(f"/v1/webhooks/{made['id']}/test")
            await service.run(picture())
            stopped = await service.submit(sleeper())
            await service.started(stopped)
            await service.cancel(stopped)
            await service.run(sleeper(steps=2, fail="oom", fail_at_step=1), maxAttempts=1)
            process.kill()
            process.restart()
            await service.run(picture())
            wanted = set(TYPES) - {"upload:completed", "upload:failed", "backend:stalled"} | {"webhook:test"}
            found = await calls(receiver, lambda calls: wanted <= {call.type for call in calls})
            heard = {call.type: call.body for call in found}
    shown = catalogue()
    for kind, body in heard.items():
        if kind != "workflow:completed":  # what it cost is told where there is a GPU
            assert fields(body) == fields(shown[kind]), kind
        assert body["data"].keys() == shown[kind]["data"].keys(), kind


async def test_the_receiver_in_python_works(tmp_path: Path) -> None:
    (script,) = blocks("python")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    async with served(tmp_path) as (service, post):
        made = await post.webhook(f"http://127.0.0.1:{port}/")
        environ = {"WEBHOOK_SECRET": made["secret"], "PORT": str(port), "PYTHONUNBUFFERED": "1"}
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", script, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        try:
            assert process.stdout is not None
            for _ in range(200):  # it says nothing when it is up
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    await asyncio.sleep(0.05)
            workflow_id = await service.submit(picture())
            line = await asyncio.wait_for(process.stdout.readline(), PATIENCE)
            assert line.decode() == f"workflow:queued {workflow_id}\n"
            await post.until(lambda log: {one["state"] for one in log} == {"delivered"})
        finally:
            process.kill()
            await process.wait()


def test_the_ten_lines_are_ten_or_so() -> None:
    for language in ("python", "js"):
        (script,) = blocks(language)
        assert len([line for line in script.splitlines() if line.strip() and "import" not in line]) <= 10
