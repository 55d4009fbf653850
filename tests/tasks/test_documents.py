"""What docs/COMFYUI_API.md shows of tasks and of /v1/status, where it needs more than the service alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx

from managers.processes.providers import BUILTIN, Provider
from tests.tasks.kit import TASKS, Desk
from tests.test_docs import API, ROOT, Answer, Fence, compared, differences, fences

PAGE = (ROOT / "docs" / "tasks.md").read_text()
AGENT = """#!/bin/sh
echo "Reading the folder"
[ "$1 $2 $3" = "--agent coder --task" ] && echo "Writing ${4#Write }"
"""


def shown(request: str) -> Fence:
    """The reply to the example with this in it."""
    (found,) = [fence for fence in fences(API.read_text()) if fence.language == "sh" and request in fence.text]
    assert found.reply is not None
    return found.reply


def wrong(reply: Fence, real: httpx.Response) -> list[str]:
    return list(compared(reply, Answer(real.status_code, dict(real.headers), real.text)))


def body_of(reply: Fence) -> Any:
    return json.loads(reply.text.partition("\n\n")[2])


def elsewhere(reply: httpx.Response, folder: Path) -> Any:
    """The reply of a service with the data folder of the document."""
    return json.loads(reply.text.replace(str(folder / "data"), "/var/lib/comfyui-management-api"))


async def test_the_examples_of_tasks_are_what_a_client_gets(desk: Desk, service_folder: Path) -> None:
    program = service_folder / "bin" / "agentic-flow"
    program.write_text(AGENT)
    program.chmod(0o755)
    body = {"agent": "coder", "task": "Write hello.py", "provider": "agentic-flow"}
    assert json.dumps(body) in API.read_text()
    accepted = await desk.client.post(TASKS, json=body)
    assert accepted.status_code == 202
    assert not list(differences(body_of(shown('"provider": "agentic-flow"}')), elsewhere(accepted, service_folder)))

    task_id = accepted.json()["taskId"]
    async with desk.client.stream("GET", f"{TASKS}/{task_id}/logs/stream") as stream:
        lines = [line async for line in stream.aiter_lines()]
    same = re.compile(r'"timestamp":\d+|[0-9a-f]{8}-[0-9a-f-]{27}')
    stream_shown = shown("curl -sN").text
    assert same.sub("", stream_shown).strip() == same.sub("", "\n".join(lines)).strip()

    ended = await desk.client.get(f"{TASKS}/{task_id}")
    document = body_of(shown("curl -s $URL/v1/tasks/$TASK -H"))
    assert not list(differences(document, elsewhere(ended, service_folder)))
    program.unlink()

    running = await desk.start("import signal; signal.pause()")
    assert not wrong(shown("-X DELETE $URL/v1/tasks"), await desk.client.delete(f"{TASKS}/{running}"))
    await desk.ended(running)


async def test_the_example_of_the_status_is_what_a_client_gets(desk: Desk) -> None:
    document = body_of(shown("/v1/status"))
    real = (await desk.client.get("/v1/status")).json()
    for each in (document, real):  # these are another on each machine
        del each["gpu"]
        each["system"]["memory"].pop("total")
        each["comfyui"]["backends"][0] |= {"version": None, "queueRemaining": None, "state": "disconnected"}
        each["providers"] = set(each["providers"].values()) - {"…"}
    assert document.pop("providers") == real.pop("providers")
    assert not list(differences(document, real))


def test_the_table_of_providers_is_that_of_the_box() -> None:
    for name, provider in BUILTIN.items():
        (row,) = re.findall(rf"^\| `{name}` \| .*$", PAGE, re.MULTILINE)
        assert set(re.findall(r"`([A-Z_]+)`", row)) == set(provider.env)


def test_the_defaults_are_those_of_the_page() -> None:
    provider = Provider(argv=("x",))
    assert f"default {provider.max_concurrent};" in PAGE
    assert f"default {provider.timeout_seconds:.0f} (six hours)" in PAGE
    assert provider.max_log_bytes == 64 * 2**20
    assert "default 64 MiB" in PAGE
