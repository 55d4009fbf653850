"""How the service closes its doors: what is refused, what is still answered, and how long that may take."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from tests.comfy_kit import PATIENCE
from tests.doors import AUTHORIZED, SECONDS, STREAM, read_reply
from tests.program import KEY, Process, run, served, started
from tests.queue_kit import PATH, picture, sleeper
from tests.simulator_process import simulator

HEADERS = {"X-API-Key": KEY}


@pytest.fixture
def comfyui(tmp_path: Path) -> Iterator[str]:
    with simulator(tmp_path / "comfyui") as (url, _):
        yield url


class Running:
    """A service with one workflow that executes, one posted ahead, and somebody on the stream."""

    def __init__(self, client: httpx.Client, stream: ClientConnection, graph: dict[str, Any]) -> None:
        self.client = client
        self.stream = stream
        self.running = self.submit(graph)
        self.heard("workflow:started")
        self.ahead = self.submit(picture())
        until = time.monotonic() + PATIENCE
        while self.get(self.ahead)["backend"] is None:
            assert time.monotonic() < until, "nothing is posted ahead"

    def submit(self, graph: dict[str, Any]) -> str:
        reply = self.client.post(PATH, json={"workflow": graph})
        assert reply.status_code == 202, reply.text
        found: str = reply.json()["workflowId"]
        return found

    def get(self, workflow_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.client.get(f"{PATH}/{workflow_id}").raise_for_status().json()
        return found

    def heard(self, kind: str) -> dict[str, Any]:
        while True:
            frame: dict[str, Any] = json.loads(self.stream.recv(SECONDS))
            if frame["type"] == kind:
                return frame

    def last_words(self) -> list[str]:
        """What still comes on the stream until it is closed."""
        kinds = []
        try:
            while True:
                kinds.append(json.loads(self.stream.recv(SECONDS))["type"])
        except ConnectionClosed:
            return [kind for kind in kinds if kind not in ("workflow:queued", "workflow:progress")]


@contextmanager
def running(url: str, graph: dict[str, Any]) -> Iterator[Running]:
    with httpx.Client(base_url=url, headers=HEADERS, timeout=PATIENCE) as client, listen(url) as stream:
        yield Running(client, stream, graph)


def listen(url: str) -> ClientConnection:
    return connect(url.replace("http", "ws") + STREAM, additional_headers=HEADERS)


def refused(client: httpx.Client) -> None:
    reply = client.post(PATH, json={"workflow": picture()})
    assert (reply.status_code, reply.json()["detail"]) == (503, "The service is about to stop and takes no new work")
    assert int(reply.headers["retry-after"]) == reply.json()["retryAfter"] > 0


def events(process: Process) -> list[str]:
    told = [json.loads(line) for line in process.seen if line.startswith("{")]
    return [entry["event"] for entry in told if entry["event"] in {"draining", "stopping", "stopped"}]


def test_work_that_comes_while_it_stops_is_refused(tmp_path: Path) -> None:
    body = json.dumps({"workflow": picture()}).encode()
    with served(tmp_path, MANAGEMENT_API_SHUTDOWN_SECONDS="20") as (url, process):
        host, _, port = url.removeprefix("http://").partition(":")
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nExpect: 100-continue\r\n".encode()
        with socket.create_connection((host, int(port)), SECONDS) as connection:
            connection.sendall(head + AUTHORIZED + b"\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
            process.signal(signal.SIGTERM)
            process.event("stopping")
            connection.sendall(body)
            reply, problem = read_reply(connection)
            assert reply.status == 503, problem
            assert int(reply.headers["retry-after"]) > 0
        assert process.wait() == 0
    with served(tmp_path) as (url, _):
        assert httpx.get(url + PATH, headers=HEADERS).json()["workflows"] == []


def test_draining_waits_for_what_runs_and_tells_its_end(comfyui: str, tmp_path: Path) -> None:
    environ = {"COMFYUI_URL": comfyui, "MANAGEMENT_API_SHUTDOWN_SECONDS": "25", "LOG_FORMAT": "json"}
    with started(tmp_path, "serve", "--drain", **environ) as process:
        url = process.event("ready")["url"]
        with running(url, sleeper(steps=30)) as house:
            followed: list[str] = []

            def follow() -> None:
                address, headers = f"{PATH}/{house.running}/events", {"accept": "text/event-stream"}
                with house.client.stream("GET", address, headers=headers) as reply:
                    followed.extend(line for line in reply.iter_lines() if line.startswith("data:"))

            follower = threading.Thread(target=follow)
            follower.start()
            process.signal(signal.SIGTERM)
            draining = process.event("draining")
            assert (draining["busy_backends"], draining["seconds"]) == (1, 25)
            refused(house.client)
            ready = house.client.get("/ready")
            assert (ready.status_code, ready.json()["checks"]["draining"]) == (503, True)
            assert house.client.get("/health").status_code == 200
            assert house.get(house.running)["status"] == "running"
            with listen(url) as late:
                late.send('{"type":"ping"}')
                assert json.loads(late.recv(SECONDS))["type"] == "pong"
            assert house.heard("workflow:completed")["workflowId"] == house.running
            assert house.last_words() == []
            assert house.stream.protocol.close_code == 1001
            follower.join(SECONDS)
        assert process.wait() == 0
        assert json.loads(followed[-1].removeprefix("data:"))["type"] == "workflow:completed"
        assert events(process) == ["draining", "stopping", "stopped"]
    with served(tmp_path, COMFYUI_URL=comfyui) as (url, _), httpx.Client(base_url=url, headers=HEADERS) as client:
        done = client.get(f"{PATH}/{house.running}").json()
        assert (done["status"], done["attempt"], len(done["outputs"])) == ("completed", 1, 1)
        reply = client.get(f"{PATH}/{house.ahead}/events", headers={"accept": "text/event-stream"}, timeout=PATIENCE)
        assert "workflow:completed" in reply.text
        view = client.get(f"{PATH}/{house.ahead}", params={"include": "attempts"}).json()
        assert [one["state"] for one in view["attempts"]] == ["withdrawn", "ended"], "it waited for the next service"


def test_a_cancelled_one_is_not_waited_for(comfyui: str, tmp_path: Path) -> None:
    with (
        served(tmp_path, COMFYUI_URL=comfyui, MANAGEMENT_API_DRAIN="true") as (url, process),
        running(url, sleeper()) as house,
    ):
        process.signal(signal.SIGTERM)
        process.event("draining")
        assert house.client.delete(f"{PATH}/{house.running}").status_code == 200
        assert house.heard("workflow:cancelled")["workflowId"] == house.running
        assert process.wait() == 0
        assert events(process) == ["draining", "stopping", "stopped"]
    assert httpx.get(f"{comfyui}/queue").json() == {"queue_running": [], "queue_pending": []}, (
        "it was gone from ComfyUI"
    )


def test_draining_ends_when_its_time_is_over(comfyui: str, tmp_path: Path) -> None:
    environ = {"COMFYUI_URL": comfyui, "MANAGEMENT_API_DRAIN": "true", "MANAGEMENT_API_SHUTDOWN_SECONDS": "2"}
    with served(tmp_path, **environ) as (url, process), running(url, sleeper()) as house:
        prompt_id = house.get(house.running)["promptId"]
        began = time.monotonic()
        process.signal(signal.SIGTERM)
        assert process.event("the time for draining is over")["busy_backends"] == 1
        assert time.monotonic() - began > 0.9
        assert house.last_words() == []
        assert house.stream.protocol.close_code == 1001
        assert process.wait() == 0
        assert time.monotonic() - began < 4  # 2, and what a busy machine takes
        assert events(process) == ["draining", "stopping", "stopped"]
    there = httpx.get(f"{comfyui}/queue").json()["queue_running"]
    assert [item[1] for item in there] == [prompt_id], "it is left to ComfyUI, for the next start"


def test_a_second_signal_ends_draining_at_once(comfyui: str, tmp_path: Path) -> None:
    environ = {"COMFYUI_URL": comfyui, "MANAGEMENT_API_DRAIN": "true", "MANAGEMENT_API_SHUTDOWN_SECONDS": "600"}
    with served(tmp_path, **environ) as (url, process), running(url, sleeper()):
        process.signal(signal.SIGTERM)
        process.event("draining")
        began = time.monotonic()
        process.signal(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM
        assert time.monotonic() - began < 2


def test_nothing_to_wait_for(tmp_path: Path) -> None:
    with served(tmp_path, MANAGEMENT_API_DRAIN="true", MANAGEMENT_API_SHUTDOWN_SECONDS="600") as (url, process):
        assert httpx.post(url + PATH, json={"workflow": picture()}, headers=HEADERS).status_code == 202, "it waits"
        began = time.monotonic()
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
        assert time.monotonic() - began < 5
        assert events(process) == ["draining", "stopping", "stopped"]


def test_the_option_says_that_it_wants_more_time(tmp_path: Path) -> None:
    told = " ".join(run(tmp_path, "serve", "--help").out.split())
    assert "--drain" in told
    assert "its default, 30 s, is short for that" in told
