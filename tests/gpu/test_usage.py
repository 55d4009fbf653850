"""What workflows cost, through the whole service: a process that finds the stub driver, in front of a ComfyUI."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from tests.comfy_kit import PATIENCE, Comfy, comfy, sleeper
from tests.gpu.driver import MIB, Driver, card
from tests.gpu.stand_in import GIB
from tests.queue_kit import Child, View, child, environment
from tests.scraping import sample, values
from tests.test_docs import API, Answer, compared, differences, fences

WATTS = 250
SECONDS = 0.4
"""That a run takes at least."""


@pytest.fixture
def comfyui(tmp_path: Path) -> Iterator[Comfy]:
    with comfy(tmp_path / "comfyui") as process:
        yield process


@asynccontextmanager
async def started(tmp_path: Path, comfyui: Comfy, driver: Driver, **environ: str) -> AsyncIterator[Child]:
    """A service whose backend is configured to be on card 0; its ComfyUI says that it uses none."""
    (tmp_path / "data").mkdir(exist_ok=True)
    settings = {"GPU_BACKENDS": "local=0", "GPU_RUNNING_SAMPLE_SECONDS": "0.05"} | driver.environ | environ
    async with child(environment(tmp_path, comfyui, **settings)) as service:
        await service.connected()
        await sampled(service)
        yield service


async def sampled(service: Child) -> None:
    """Until the driver has told of the card: what runs before that is not known from its beginning."""
    for _ in range(PATIENCE * 50):
        if (await service.client.get("/v1/status")).json()["gpu"]["available"]:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("the card is not told")


def run(**inputs: Any) -> Any:
    return sleeper(steps=8, seconds=SECONDS / 8, **inputs)


async def usage(service: Child, by: str = "key", **query: str) -> dict[str, Any]:
    reply = await service.client.get("/v1/usage", params={"by": by, **query})
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def paid(view: View, seconds: float) -> dict[str, float]:
    """Its cost, which is that of so many seconds at least and not of many more."""
    cost: dict[str, float] = view["cost"]
    assert set(cost) == {"gpuSeconds", "vramPeakBytes", "energyJoules"}
    assert seconds <= cost["gpuSeconds"] < seconds + 5
    assert cost["energyJoules"] == pytest.approx(cost["gpuSeconds"] * WATTS, rel=0.3)
    return cost


def busy_card(**fields: Any) -> dict[str, object]:
    """Its counter grows by the clock."""
    return card(0, energy=10**6, energy_milliwatts=WATTS * 1000, power=WATTS * 1000, **fields)


async def test_the_cost_of_a_run_from_its_first_second_to_after_a_restart(
    driver: Driver, comfyui: Comfy, tmp_path: Path
) -> None:
    driver.says(busy_card(), count=1)
    async with started(tmp_path, comfyui, driver) as service:
        async with service.stream() as stream:
            waits = await service.submit(sleeper(steps=20, seconds=0.05))
            await service.started(waits)
            for _ in range(PATIENCE * 50):
                so_far = await service.get(waits)
                if so_far["cost"]:
                    break
                await asyncio.sleep(0.02)
            assert so_far["status"] == "running"
            ended = await service.ended(waits)
            completed = await stream.until("workflow:completed")
        cost = paid(ended, 1.0)
        assert cost["vramPeakBytes"] == 4 * GIB
        assert 0 <= so_far["cost"]["gpuSeconds"] < cost["gpuSeconds"]
        assert completed["cost"] == cost
        assert (await service.events(waits))[-1]["cost"] == cost
        assert (await service.list())["workflows"][0]["cost"] == cost

        metrics = values(parse((await service.client.get("/metrics")).text))
        assert metrics[sample("comfyui_workflow_energy_joules_sum")] == pytest.approx(cost["energyJoules"], abs=0.01)
        assert metrics[sample("comfyui_workflow_vram_peak_bytes_sum")] == cost["vramPeakBytes"]
        before = [await usage(service, by) for by in ("key", "gpu", "day")]
        service.process.terminate()
        await asyncio.to_thread(service.process.wait, PATIENCE)

    async with started(tmp_path, comfyui, driver) as service:
        assert (await service.get(waits))["cost"] == cost
        assert [await usage(service, by) for by in ("key", "gpu", "day")] == before
        assert before[0]["usage"] == [{"key": "admin", **before[0]["total"]}]
        assert before[1]["usage"] == [{"gpu": "local", **before[1]["total"]}]
        total = before[2]["total"]
        assert before[2]["usage"] == [{"day": before[2]["to"], **total}]
        assert {name: total[name] for name in cost} == cost
        assert total["runSeconds"] == pytest.approx(completed["duration"], abs=0.001)
        assert [total[name] for name in ("workflows", "completed", "failed", "cancelled")] == [1, 1, 0, 0]


async def test_all_attempts_cost_and_a_cancelled_run_does(driver: Driver, comfyui: Comfy, tmp_path: Path) -> None:
    driver.says(busy_card(), count=1)
    async with started(tmp_path, comfyui, driver) as service:
        failed = await service.run(run(fail="torch_oom", fail_at_step=8))
        assert (failed["status"], failed["attempt"]) == ("failed", 2)
        attempts = (await service.get(failed["workflowId"], include="attempts"))["attempts"]
        ran = sum(attempt["endTime"] - attempt["startTime"] for attempt in attempts) / 1000
        assert ran >= 2 * SECONDS
        twice = paid(failed, 2 * SECONDS)
        by_backend = await usage(service, "gpu")
        assert by_backend["total"] == {
            "workflows": 1,
            "completed": 0,
            "failed": 1,
            "cancelled": 0,
            "runSeconds": pytest.approx(ran, abs=0.01),
            **{name: pytest.approx(value, abs=0.002) for name, value in twice.items()},
        }

        running = await service.submit(sleeper())
        await service.started(running)
        for _ in range(PATIENCE * 50):
            cost = (await service.get(running))["cost"]
            if cost and cost["gpuSeconds"] > SECONDS:
                break
            await asyncio.sleep(0.02)
        assert await service.cancel(running) == "cancelled"
        once = paid(await service.get(running), SECONDS)
        await comfyui.until_queue(lambda running, pending: not running and not pending)
        assert (await service.get(running))["cost"] == once, "what a verdict cost does not change"
        total = (await usage(service, "gpu"))["total"]
        assert (total["workflows"], total["failed"], total["cancelled"]) == (2, 1, 1)
        assert total["gpuSeconds"] == pytest.approx(twice["gpuSeconds"] + once["gpuSeconds"], abs=0.01)


async def test_a_run_that_began_before_a_kill_has_no_cost_that_is_known(
    driver: Driver, comfyui: Comfy, tmp_path: Path
) -> None:
    driver.says(busy_card(), count=1)
    async with started(tmp_path, comfyui, driver) as service:
        workflow_id = await service.submit(sleeper(steps=40, seconds=0.05))
        await service.started(workflow_id)
        service.kill()
    async with started(tmp_path, comfyui, driver) as service:
        ended = await service.ended(workflow_id)
        assert (ended["status"], ended["cost"]) == ("completed", None)
        total = (await usage(service))["total"]
        assert total["completed"] == 1
        assert total["runSeconds"] >= 2
        assert (total["gpuSeconds"], total["energyJoules"], total["vramPeakBytes"]) == (None, None, None)


async def test_what_a_card_does_not_tell_is_missing_alone(driver: Driver, comfyui: Comfy, tmp_path: Path) -> None:
    driver.says(card(0, energy=None, power=None), count=1)
    async with started(tmp_path, comfyui, driver) as service:
        cost = (await service.run(run()))["cost"]
        assert set(cost) == {"gpuSeconds", "vramPeakBytes"}
        (row,) = (await usage(service, "gpu"))["usage"]
        assert row["energyJoules"] is None
        assert row["gpuSeconds"] == cost["gpuSeconds"]


async def test_the_page_shows_what_a_client_gets(driver: Driver, comfyui: Comfy, tmp_path: Path) -> None:
    driver.says(busy_card(memory=f"{9 * 1024 * MIB} {24 * 1024 * MIB}"), count=1)
    page = fences(API.read_text())
    asked = [fence for fence in page if fence.language == "sh" and "/v1/usage" in fence.text]
    assert len(asked) == 2
    (cost,) = [fence for fence in page if fence.language == "json" and '"vramPeakBytes"' in fence.text]
    async with started(tmp_path, comfyui, driver) as service:
        ended = await service.run(run())
        assert not list(differences(json.loads(cost.text), ended))
        as_json = await service.client.get("/v1/usage?by=key")
        assert "by=key" in asked[0].text
        assert not list(compared(asked[0].reply, Answer(200, dict(as_json.headers), as_json.text)))
        sheet = await service.client.get("/v1/usage?by=day", headers={"accept": "text/csv"})
        assert "by=day" in asked[1].text
        reply = asked[1].reply
        assert reply is not None
        shown, real = (list(csv.DictReader(io.StringIO(text))) for text in (reply.text, sheet.text))
        assert len(real) == 1
        assert all(list(row) == list(real[0]) for row in shown)
