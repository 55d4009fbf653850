"""The last step with a stalled ComfyUI: the operator's command, or ComfyUI-Manager's reboot."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import structlog
from structlog.testing import LogCapture

from managers.clock import SystemClock, new_id
from managers.comfyui.backend import Backend, BackendConfig
from managers.comfyui.client import ComfyUIClient
from managers.comfyui.recovery import keep_trust
from managers.comfyui.restart import MANAGER, RestartConfig, restart
from managers.comfyui.watchdog import StallReason, WatchConfig
from managers.errors import BackendUnavailable
from managers.events.types import BackendConnected, ComfyUIMessage, StoredEvent
from tests.faults.proxy import proxied
from tests.faults.watch_kit import attempts, deaf, impatient, kill_worker, prompt_of, proven, trusted_again
from tests.queue_kit import Comfy, comfy, picture, sleeper

RESTARTER = """
import json, os, signal, sys
with open(sys.argv[1], "a") as file:
    print(json.dumps(dict(os.environ)), file=file)
os.kill(int(sys.argv[2]), signal.SIGKILL)
"""


@pytest.fixture
def simulator(tmp_path: Path) -> Iterator[Comfy]:
    with comfy(tmp_path / "comfyui") as process:
        yield process


@pytest.fixture
def said() -> Iterator[LogCapture]:
    """What is logged."""
    before = structlog.get_config()["processors"]
    capture = LogCapture()
    structlog.configure(processors=[capture])
    yield capture
    structlog.configure(processors=before)


def python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, *arguments)


async def test_the_command_runs_once_and_charges_nobody(simulator: Comfy, tmp_path: Path) -> None:
    script, told = tmp_path / "restart.py", tmp_path / "told"
    script.write_text(RESTARTER)
    command = shlex.join(python(str(script), str(told), str(simulator.process.pid)))
    secret = {"MANAGEMENT_API_KEYS_FILE": "", "PATH": "/usr/bin", "AWS_SECRET_ACCESS_KEY": "hidden", "TZ": "UTC"}
    secret |= {"AWS_ACCESS_KEY_ID": "hidden too"}
    async with impatient(tmp_path, simulator, COMFYUI_RESTART_COMMAND=command, **secret) as (queue, stream):
        stuck = await queue.submit(deaf(60), timeoutSeconds=0.3)
        await queue.started(stuck)
        ahead = await queue.submit(picture())
        await prompt_of(queue, ahead)
        await proven(stream)
        await asyncio.to_thread(simulator.process.wait, 10)  # the command has killed it
        simulator.restart()
        await trusted_again(stream)
        assert (await queue.ended(ahead))["status"] == "completed"
        assert await attempts(queue, stuck) == [("ended", "timeout", False)]
        assert await attempts(queue, ahead) == [("withdrawn", None, False), ("ended", None, False)]
    (environ,) = map(json.loads, told.read_text().splitlines())
    environ.pop("LC_CTYPE", None)  # Python's own
    assert environ == {
        "PATH": "/usr/bin",
        "TZ": "UTC",
        "COMFYUI_BACKEND": "local",
        "COMFYUI_URL": simulator.url,
    }


@pytest.mark.slow
async def test_no_restart_where_the_probe_runs_in_time(simulator: Comfy, tmp_path: Path) -> None:
    told = tmp_path / "told"
    command = shlex.join(python("-c", f"open({str(told)!r}, 'w')"))
    wanted = {"COMFYUI_RESTART_COMMAND": command, "COMFYUI_INTERRUPT_SECONDS": "0.9"}
    async with impatient(tmp_path, simulator, **wanted) as (queue, stream):
        cancelled = await queue.submit(deaf(1.7))
        await queue.started(cancelled)
        await queue.cancel(cancelled)
        await proven(stream)
        await trusted_again(stream)
        assert (await queue.run(picture()))["status"] == "completed"
    assert not told.exists()


async def test_no_restart_while_something_moves(simulator: Comfy, tmp_path: Path) -> None:
    """A worker that only was slow: it runs a workflow of ours by now, and the probe comes after that."""
    told = tmp_path / "told"
    config = RestartConfig(argv=python("-c", f"open({str(told)!r}, 'w')"))
    up, trusted, begun = asyncio.Event(), asyncio.Event(), asyncio.Event()

    def hear(event: StoredEvent) -> None:
        up.set()
        if isinstance(event, BackendConnected) and event.reason:
            trusted.set()

    watch = WatchConfig(interrupt=0.4)
    backend = Backend(
        BackendConfig(name="local", url=simulator.url, watch=watch),
        new_id(),
        clock=SystemClock(),
        publish=lambda event: begun.set() if isinstance(event, ComfyUIMessage) and event.workflow_id else None,
        on_event=hear,
    )
    tasks = [asyncio.create_task(backend.run(tuple)), asyncio.create_task(keep_trust(backend, config, new_id))]
    async with asyncio.timeout(10):
        await up.wait()
        prompt_id = new_id()
        with backend.inbox(prompt_id, "w"):
            graph = json.dumps(sleeper(steps=30)).encode()
            await backend.client.post_prompt(
                prompt_id=prompt_id, client_id=backend.client_id, graph=graph, extra_data=None
            )
            await begun.wait()
            backend.distrust(StallReason.NOTHING_RUNS, "It seemed so")
            await trusted.wait()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await backend.client.aclose()
    assert (await simulator.history())[prompt_id]["status"]["status_str"] == "success"
    assert not told.exists()


async def test_a_manager_that_is_not_there_is_told(simulator: Comfy, said: LogCapture) -> None:
    config = RestartConfig(argv=MANAGER)
    client = ComfyUIClient(simulator.url)
    assert not await restart(config, client)
    await client.aclose()
    (entry,) = (entry for entry in said.entries if entry["log_level"] == "error")
    assert entry["reason"] == "ComfyUI answered 404: it has no ComfyUI-Manager that could restart it"


async def test_a_stall_asks_the_manager(simulator: Comfy, tmp_path: Path) -> None:
    async with proxied(simulator.url) as proxy:
        reboot = proxy.hold("POST", "/v2/manager/reboot")
        wanted = {"COMFYUI_URL": proxy.url, "COMFYUI_RESTART_COMMAND": "manager"}
        async with impatient(tmp_path, simulator, **wanted) as (queue, stream):
            await kill_worker(simulator)
            waiting = await queue.submit(picture())
            asked = await reboot.caught()
            simulator.restart()
            asked.drop()
            await trusted_again(stream)
            assert (await queue.ended(waiting))["status"] == "completed"


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({"POST /v2/manager/reboot": b"200 OK"}, None),
        ({"POST /v2/manager/reboot": b""}, None),  # it ends before it answers
        ({"GET /manager/reboot": b"200 OK"}, None),
        ({"POST /v2/manager/reboot": b"405 Method Not Allowed", "GET /manager/reboot": b"200 OK"}, None),
        ({"POST /v2/manager/reboot": b"403 Forbidden"}, "ComfyUI answered 403 to POST /v2/manager/reboot"),
        ({}, "ComfyUI answered 404: it has no ComfyUI-Manager that could restart it"),
    ],
)
async def test_the_managers_routes(answers: dict[str, bytes], expected: str | None) -> None:
    async with manager(answers) as (url, asked):
        client = ComfyUIClient(url)
        error: str | None = None
        try:
            await client.reboot()
        except BackendUnavailable as said:
            error = str(said)
        await client.aclose()
        assert error == expected
        assert [asked.get_nowait() for _ in answers] == list(answers)


# ---- the command itself


@pytest.mark.parametrize(
    ("argv", "event"),
    [
        (python("-c", "import time; print('begun', flush=True); time.sleep(60)"), "takes too long"),
        (python("-c", "raise SystemExit(3)"), "has ended"),
        (("/nowhere/restart",), "cannot be run"),
    ],
)
async def test_a_command_that_does_not_do_it(argv: Sequence[str], event: str, said: LogCapture) -> None:
    client = ComfyUIClient("http://127.0.0.1:9")
    assert not await restart(RestartConfig(argv=tuple(argv), seconds=0.5), client)
    await client.aclose()
    assert event in said.entries[-1]["event"]


async def test_what_the_command_leaves_running_is_not_waited_for(tmp_path: Path, said: LogCapture) -> None:
    """It starts ComfyUI in the background, which keeps the output open, and has said more than is logged."""
    script = "echo restarted; head -c 9000 /dev/zero | tr '\\0' x; sleep 20 & echo $! > pid"
    client = ComfyUIClient("http://127.0.0.1:9")
    config = RestartConfig(argv=("/bin/sh", "-c", f"cd {shlex.quote(str(tmp_path))}; {script}"), seconds=10)
    assert await restart(config, client)
    await client.aclose()
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)  # it lives, else this would raise
    assert said.entries[-1]["status"] == 0
    assert said.entries[-1]["output"].startswith("restarted\nxxx")
    assert len(said.entries[-1]["output"]) <= 2000


@asynccontextmanager
async def manager(answers: dict[str, bytes]) -> AsyncIterator[tuple[str, asyncio.Queue[str]]]:
    """Gives these answers, else 404; an empty one is a broken connection. What was asked of those that it has."""
    asked: asyncio.Queue[str] = asyncio.Queue()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = (await reader.readuntil(b"\r\n\r\n")).decode().partition(" HTTP/1.1")[0]
        if request in answers:
            asked.put_nowait(request)
        if answer := answers.get(request, b"404 Not Found"):
            writer.write(b"HTTP/1.1 " + answer + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", asked
    server.close()
    await server.wait_closed()
