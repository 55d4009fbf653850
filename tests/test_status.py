"""GET /v1/status (CONTRACT 3): the whole service at a glance."""

from __future__ import annotations

import asyncio
import os
import re
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import psutil

from managers.system import SystemMonitor
from routes.status import StatusReport, status
from tests.serving import Service, StartService

ISO = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}\.\d{3}Z")


async def look(service: Service) -> dict[str, Any]:
    reply = await service.client.get("/v1/status")
    assert reply.status_code == 200
    msgspec.convert(reply.json(), StatusReport)
    return dict(reply.json())


async def test_the_parts_are_those_of_the_contract(service: Service) -> None:
    found = await look(service)
    assert set(found) == {"timestamp", "api", "tasks", "gpu", "providers", "system", "comfyui", "uptime"}
    assert ISO.fullmatch(found["timestamp"])
    assert found["api"] == {
        "uptime": int(found["uptime"]),
        "version": service.app.running[0].service.version,
        "pid": os.getpid(),
    }
    assert isinstance(found["api"]["uptime"], int)
    assert 0 <= found["uptime"] < 60
    assert found["tasks"] == {"active": 0}
    assert set(found["providers"]) == {"claude-flow", "agentic-flow", "gemini", "openai"}


async def test_the_machine_in_mib_and_percent(service: Service) -> None:
    system = (await look(service))["system"]
    assert set(system) == {"cpu", "memory", "disk"}
    assert system["cpu"]["count"] == psutil.cpu_count()
    assert set(system["cpu"]["loadAverage"]) == {"load1", "load5", "load15"}
    assert all(isinstance(value, float) and value >= 0 for value in system["cpu"]["loadAverage"].values())

    memory, disk = system["memory"], system["disk"]
    assert memory["total"] == psutil.virtual_memory().total // 2**20
    assert abs(memory["used"] + memory["free"] - memory["total"]) <= 1
    assert abs(memory["percentUsed"] - 100 * memory["used"] / memory["total"]) < 0.2
    usage = psutil.disk_usage(str(service.app.base.settings.api.data_dir))
    assert disk["size"] == usage.total // 2**20
    assert set(disk) == {"size", "used", "available", "percentUsed"}
    assert all(isinstance(disk[key], int) for key in ("size", "used", "available"))
    assert 0 <= disk["percentUsed"] <= 100


async def test_backends_and_the_queue(start_service: StartService) -> None:
    service = await start_service(COMFYUI_BACKENDS="one=http://user:secret-4Tz@127.0.0.1:9,two=http://127.0.0.1:9")
    graph = {"1": {"class_type": "SaveImage", "inputs": {"filename_prefix": "x"}}}
    before = (await look(service))["comfyui"]["queue"]
    assert before == {"length": 0, "running": 0, "oldestAgeSeconds": None, "paused": False}
    assert (await service.client.post("/v1/comfyui/workflow", json={"workflow": graph})).status_code == 202
    await service.client.post("/v1/comfyui/queue/pause")

    found = (await look(service))["comfyui"]
    one, two = found["backends"]
    assert one == {
        "name": "one",
        "url": "http://127.0.0.1:9",
        "state": "disconnected",
        "version": None,
        "queueRemaining": None,
        "currentWorkflow": None,
    }
    assert two["name"] == "two"
    assert found["queue"]["length"] == 1
    assert found["queue"]["paused"] is True
    assert 0 <= found["queue"]["oldestAgeSeconds"] < 60


async def test_a_provider_is_configured_when_its_program_is_there(
    start_service: StartService, tmp_path: Path
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    service = await start_service(PATH=str(programs))
    assert set((await look(service))["providers"].values()) == {"not_configured"}
    program = programs / "agentic-flow"
    program.write_text("#!/bin/sh\n")
    assert (await look(service))["providers"]["gemini"] == "not_configured", "it cannot be executed"
    program.chmod(0o755)
    assert (await look(service))["providers"] == {
        "claude-flow": "not_configured",
        "agentic-flow": "configured",
        "gemini": "configured",
        "openai": "configured",
    }


async def test_no_gpu_is_told_with_the_reason(start_service: StartService) -> None:
    gpu = (await look(await start_service(GPU_SAMPLE_SECONDS="0")))["gpu"]
    assert (gpu["available"], gpu["gpus"]) == (False, [])
    assert gpu["error"]


async def test_a_disk_that_hangs_is_told_and_costs_one_thread(tmp_path: Path) -> None:
    """However often somebody asks; and when it is back it is seen."""
    back, asked = threading.Event(), []

    def hung(folder: str) -> Any:
        asked.append(folder)
        assert back.wait(30)
        return SimpleNamespace(total=2**30, used=2**29, free=2**29, percent=50.0)

    monitor = SystemMonitor(tmp_path, usage=hung, patience_seconds=0.05)
    loop_was_free = asyncio.create_task(asyncio.sleep(0))
    for _ in range(5):
        found = await monitor.look()
        assert found.disk is None
        assert found.memory.total > 0
    assert loop_was_free.done()
    assert asked == [str(tmp_path)]
    back.set()
    patient = SystemMonitor(tmp_path, usage=hung, patience_seconds=10)
    disk = (await patient.look()).disk
    assert disk is not None
    assert (disk.size, disk.used, disk.available, disk.percent_used) == (1024, 512, 512, 50.0)


async def test_a_folder_that_is_gone_is_told(tmp_path: Path) -> None:
    assert (await SystemMonitor(tmp_path / "none").look()).disk is None


def test_the_example_is_what_the_route_gives() -> None:
    msgspec.convert(status.opt["documented"]["reply"], StatusReport)
