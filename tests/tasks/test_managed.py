"""ComfyUI as a program of the service; the simulator stands in for it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from management_api.app import create_app
from management_api.programs import managed_config
from managers.processes.comfyui import CannotManage
from tests.queue_kit import PATH, picture, sleeper
from tests.serving import KEY, SettingsMaker, lifespan, serve
from tests.simulator_process import simulator
from tests.tasks.kit import SECONDS, Told, Watched, followed

BACKEND = "/v1/comfyui/backends/local"
MAIN = f"""
import os, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent.parent.parent)!r})
from management_api.simulator.__main__ import main
print("begun as", os.getpid(), sys.argv[1:], sorted(os.environ))
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
sys.exit(main(["--port", arguments["--port"], "--directory", str(Path(__file__).parent)]))
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class House:
    """A service that starts its ComfyUI."""

    def __init__(self, folder: Path, make_settings: SettingsMaker) -> None:
        self.path = folder / "managed"
        self.path.mkdir()
        (self.path / "main.py").write_text(MAIN)
        self.port = free_port()
        self._make_settings = make_settings

    @asynccontextmanager
    async def open(self, **environ: str) -> AsyncIterator[httpx.AsyncClient]:
        given: Any = {
            "COMFY_PATH": str(self.path),
            "COMFY_AUTOSTART": "true",
            "COMFY_AUTOSTOP": "true",
            "COMFY_ENV": "MINE_*",
            "COMFYUI_URL": f"http://127.0.0.1:{self.port}",
            "PATH": os.environ["PATH"],
            "MINE_1": "x",
            "CUDA_VISIBLE_DEVICES": "",
            "OTHER": "not for it",
        } | environ
        async with (
            serve(create_app(self._make_settings(**given))) as port,
            httpx.AsyncClient(
                base_url=f"http://127.0.0.1:{port}", headers={"X-API-Key": KEY}, timeout=SECONDS
            ) as client,
        ):
            yield client


async def completes(client: httpx.AsyncClient) -> dict[str, Any]:
    """A workflow, whenever ComfyUI is there."""
    reply = await client.post(PATH, json={"workflow": picture()}, headers={"Prefer": f"wait={SECONDS}"})
    assert (reply.status_code, reply.json()["status"]) == (200, "completed"), reply.text
    return dict(reply.json())


async def begun(stream: AsyncIterator[Told]) -> int:
    """The pid of the next ComfyUI that begins, by its log."""
    async for told in stream:
        line = str(told.data["line"])
        if line.startswith("begun as"):
            return int(line.split()[2])
    raise AssertionError("the log has ended")


async def test_it_is_started_watched_and_restarted(tmp_path: Path, make_settings: SettingsMaker) -> None:
    house = House(tmp_path, make_settings)
    async with house.open() as client, asyncio.timeout(3 * SECONDS):
        await completes(client)
        async with followed(client, f"{BACKEND}/logs/stream") as stream:
            first = await begun(stream)
            log = (tmp_path / "data" / "comfyui" / "local" / "output.log").read_text()
            assert f"--port', '{house.port}'" in log
            seen = set(log.partition("] [")[2].partition("]")[0].replace("'", "").split(", "))
            assert {"PATH", "MINE_1", "CUDA_VISIBLE_DEVICES"} <= seen
            assert not {"OTHER", "MANAGEMENT_API_KEY"} & seen

            watched = Watched(first)
            os.kill(first, signal.SIGKILL)
            assert await watched.gone()
            second = await begun(stream)
            await completes(client)

            pids = [first, second]
            for _ in range(2):
                watched = Watched(pids[-1])
                reply = await client.post(f"{BACKEND}/restart")
                assert (reply.status_code, reply.json()["state"]) == (202, "restarting")
                assert reply.json()["deaths"] == 1, "only the one that nobody had asked for"
                assert await watched.gone()
                pids.append(await begun(stream))
            await completes(client)
            assert len(set(pids)) == 4
            last = Watched(pids[-1])
    assert await last.gone(), "COMFY_AUTOSTOP"


async def test_it_runs_on_while_the_service_restarts(tmp_path: Path, make_settings: SettingsMaker) -> None:
    house = House(tmp_path, make_settings)
    pids = []
    for stop in ("false", "true"):
        async with house.open(COMFY_AUTOSTOP=stop) as client, asyncio.timeout(2 * SECONDS):
            await completes(client)
            async with followed(client, f"{BACKEND}/logs/stream", after=0) as stream:
                pids.append(await begun(stream))
            watched = Watched(pids[-1])
    assert await watched.gone()
    assert pids[0] == pids[1]
    log = (tmp_path / "data" / "comfyui" / "local" / "output.log").read_text()
    assert log.count("begun as") == 1


@pytest.mark.slow
async def test_a_restart_on_purpose_charges_no_workflow(tmp_path: Path, make_settings: SettingsMaker) -> None:
    """Two deaths of ComfyUI while it ran this would make it poison; two restarts only cost attempts."""
    house = House(tmp_path, make_settings)
    async with house.open() as client, asyncio.timeout(2 * SECONDS):
        await completes(client)
        graph = sleeper(steps=30)
        workflow_id = (await client.post(PATH, json={"workflow": graph})).json()["workflowId"]
        async with followed(client, f"{PATH}/{workflow_id}/events") as stream:
            async for told in stream:
                if told.data["type"] == "workflow:started" and told.data["attempt"] < 3:
                    assert (await client.post(f"{BACKEND}/restart")).status_code == 202
        after = (await client.get(f"{PATH}/{workflow_id}")).json()
    assert (after["status"], after["attempt"], after["errorType"]) == ("completed", 3, None)


async def test_somebody_elses_is_left_alone(tmp_path: Path, make_settings: SettingsMaker) -> None:
    house = House(tmp_path, make_settings)
    with simulator(tmp_path / "theirs", "--port", str(house.port)) as (_, process):
        async with house.open() as client, asyncio.timeout(SECONDS):
            await completes(client)
            reply = await client.post(f"{BACKEND}/restart")
            assert (reply.status_code, reply.json()["currentStatus"]) == (409, "foreign")
        assert process.poll() is None
    assert not (tmp_path / "data" / "comfyui" / "local" / "output.log").exists()


async def test_only_a_managed_one_can_be_restarted(make_settings: SettingsMaker) -> None:
    app = create_app(make_settings())
    async with lifespan(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x", headers={"X-API-Key": KEY}) as client:
            for method, path in (("POST", "restart"), ("GET", "logs/stream")):
                reply = await client.request(method, f"{BACKEND}/{path}")
                assert (reply.status_code, reply.json()["currentStatus"]) == (409, "unmanaged")
                assert "COMFY_AUTOSTART" in reply.json()["detail"]
                reply = await client.request(method, f"/v1/comfyui/backends/nobody/{path}")
                assert reply.status_code == 404


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"COMFY_PATH": "/nowhere"}, "there is no /nowhere/main.py"),
        ({"COMFYUI_URL": "http://10.1.2.3:8188"}, "needs a backend at an address of this machine"),
        ({"COMFYUI_URL": "https://127.0.0.1:8188"}, "plain http://"),
    ],
)
def test_what_cannot_be_started_stops_the_start(
    tmp_path: Path, make_settings: SettingsMaker, environ: dict[str, str], words: str
) -> None:
    (tmp_path / "comfyui").mkdir()
    (tmp_path / "comfyui" / "main.py").write_text("")
    assert managed_config(make_settings(**environ)) is None
    with pytest.raises(CannotManage, match=words):
        managed_config(make_settings(COMFY_AUTOSTART="true", **environ))


def test_how_it_is_started(tmp_path: Path, make_settings: SettingsMaker) -> None:
    """With the Python of its own environment, the port of its backend, and the arguments that were added."""
    comfyui = tmp_path / "comfyui"
    python = comfyui / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    (comfyui / "main.py").touch()
    given = {"COMFY_AUTOSTART": "true", "COMFYUI_BACKENDS": "far=http://10.0.0.1:1,near=http://127.0.0.1:8200"}
    config = managed_config(make_settings(**given, COMFY_ARGS="--lowvram --note 'a b'"))
    assert config is not None
    where = ("main.py", "--listen", "127.0.0.1", "--port", "8200")
    assert (config.name, config.argv) == ("near", (str(python), *where, "--lowvram", "--note", "a b"))
    chosen = managed_config(make_settings(**given, COMFY_PYTHON="/opt/python"))
    assert chosen is not None
    assert chosen.argv[0] == "/opt/python"
    python.unlink()
    ours = managed_config(make_settings(**given))
    assert ours is not None
    assert ours.argv[0] == sys.executable
