"""The whole service as a process that finds the stub driver: gauges, frames, and the cost of a run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse
from websockets.sync.client import ClientConnection, connect

from tests.comfy_kit import PLAIN, Graph, picture, sleeper
from tests.gpu.driver import MIB, Driver, card
from tests.gpu.stand_in import GIB, device, stand_in
from tests.program import KEY, SECONDS, served
from tests.scraping import Sample, sample, values
from tests.simulator_process import simulator

HEADERS = {"X-API-Key": KEY}
WATTS = 250


def busy_card(**fields: object) -> dict[str, object]:
    """Its counter grows by the clock; power says something else, to see which of them is believed."""
    return card(0, energy=10**6, energy_milliwatts=WATTS * 1000, power=1000, **fields)


def scrape(url: str) -> dict[Sample, float]:
    return values(parse(httpx.get(f"{url}/metrics", timeout=SECONDS, **PLAIN).text))


def submit(url: str, graph: Graph) -> None:
    body = {"workflow": graph}
    reply = httpx.post(f"{url}/v1/comfyui/workflow", json=body, headers=HEADERS, timeout=SECONDS, **PLAIN)
    assert reply.status_code == 202


def scrape_until(url: str, wanted: Sample) -> dict[Sample, float]:
    """The first samples come when the driver, or ComfyUI, has been asked."""
    for _ in range(SECONDS * 50):
        found = scrape(url)
        if wanted in found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"{wanted} is not told")


def of_card(gpu_id: str, found: dict[Sample, float]) -> dict[Sample, float]:
    return {key: value for key, value in found.items() if ("gpu_id", gpu_id) in key[1]}


def frames(socket: ClientConnection, last: str) -> Iterator[dict[str, Any]]:
    """What comes, up to a frame of this type. Samples come all the time, so each wait is bounded as a whole."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        frame: dict[str, Any] = json.loads(socket.recv(timeout=SECONDS))
        yield frame
        if frame["type"] == last:
            return
    raise AssertionError(f"no {last} in {SECONDS} s")


@pytest.fixture
def comfyui(tmp_path: Path) -> Iterator[tuple[str, int]]:
    with simulator(tmp_path / "comfyui") as (url, process):
        yield url, process.pid


def test_cards_are_told_and_a_run_is_paid_for(driver: Driver, comfyui: tuple[str, int], tmp_path: Path) -> None:
    url, pid = comfyui
    other = card(1, processes="1:99", energy=0, energy_milliwatts=10**6)
    driver.says(busy_card(), other, count=2)
    settings = {"COMFYUI_URL": url, "GPU_SAMPLE_SECONDS": "30", "GPU_RUNNING_SAMPLE_SECONDS": "0.05"}
    with served(tmp_path, **settings, **driver.environ) as (service, process):
        address = service.replace("http", "ws") + "/v1/comfyui/stream?since=0"
        with connect(address, additional_headers=HEADERS) as socket:
            socket.send(json.dumps({"type": "subscribe", "channels": ["gpu", "workflow", "backend"]}))
            list(frames(socket, "backend:connected"))
            found = of_card("0", scrape_until(service, sample("comfyui_gpu_utilization", gpu_id="0")))
            energy = found.pop(sample("comfyui_gpu_energy_joules_total", gpu_id="0"))
            assert energy > 1000
            assert found == {
                sample("comfyui_gpu_utilization", gpu_id="0"): 40,
                sample("comfyui_vram_usage_bytes", gpu_id="0"): 4 * GIB,
                sample("comfyui_gpu_memory_total_bytes", gpu_id="0"): 24 * GIB,
                sample("comfyui_gpu_temperature_celsius", gpu_id="0"): 60,
                sample("comfyui_gpu_power_watts", gpu_id="0"): 1,
                sample("comfyui_gpu_info", gpu_id="0", uuid="GPU-00000000", name="NVIDIA Stub 0"): 1,
            }
            assert of_card("1", scrape(service))[sample("comfyui_gpu_power_watts", gpu_id="1")] == 200.5

            # It says that it uses no card, and is on none: what the cards do has nothing to do with it.
            submit(service, picture())
            list(frames(socket, "workflow:completed"))
            assert scrape(service)[sample("comfyui_workflow_energy_joules_count")] == 0

            # Now it is on the first card; somebody else is on the second.
            driver.says(busy_card(processes=f"{pid}:{700 * MIB}"), other, count=2)
            submit(service, sleeper(steps=20, seconds=0.05))
            list(frames(socket, "workflow:started"))
            driver.says(busy_card(processes=f"{pid}:{900 * MIB}"), other, count=2)
            seen = list(frames(socket, "workflow:completed"))
            samples = [frame for frame in seen if frame["type"] == "gpu:sample"]
            # A second long; at rest there is one in 30 s.
            assert len(samples) >= 5
            assert [gpu["gpuId"] for gpu in samples[-1]["gpus"]] == ["0", "1"]
            duration = seen[-1]["duration"]
            assert duration >= 1

        costs = scrape(service)
        assert costs[sample("comfyui_workflow_vram_peak_bytes_count")] == 1
        assert costs[sample("comfyui_workflow_vram_peak_bytes_sum")] == 900 * MIB
        joules = costs[sample("comfyui_workflow_energy_joules_sum")]
        # What happened after the last sample goes by power, which says 1 W: at most one sample's worth is missing.
        assert WATTS * (duration - 0.5) < joules < WATTS * (duration + 0.1)
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
    assert driver.calls_file.read_text().split()[-1] == "shutdown"


def test_a_driver_that_hangs_holds_up_neither_requests_nor_the_end(driver: Driver, tmp_path: Path) -> None:
    driver.says(hang=1)
    with served(tmp_path, **driver.environ) as (service, process):
        assert httpx.get(f"{service}/health", timeout=SECONDS, **PLAIN).status_code == 200
        driver.until_called("init")
        text = httpx.get(f"{service}/metrics", timeout=SECONDS, **PLAIN).text
        assert "# TYPE comfyui_gpu_utilization gauge\n" in text
        assert "comfyui_gpu_utilization{" not in text
        begun = time.monotonic()
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
        assert time.monotonic() - begun < 10


async def test_without_a_driver_comfyui_is_asked(driver: Driver, tmp_path: Path) -> None:
    driver.break_library()
    async with stand_in() as comfy, contextlib.AsyncExitStack() as stack:
        comfy.devices = [device()]
        service = served(tmp_path, COMFYUI_URL=comfy.url, **driver.environ)
        url, _ = await asyncio.to_thread(service.__enter__)
        stack.callback(service.__exit__, None, None, None)
        found = await asyncio.to_thread(scrape_until, url, sample("comfyui_vram_usage_bytes", gpu_id="local:0"))
        assert of_card("local:0", found) == {
            sample("comfyui_vram_usage_bytes", gpu_id="local:0"): 5 * GIB,
            sample("comfyui_gpu_memory_total_bytes", gpu_id="local:0"): 24 * GIB,
            sample("comfyui_gpu_info", gpu_id="local:0", uuid="", name="NVIDIA GeForce RTX 4090"): 1,
        }
