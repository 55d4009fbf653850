"""Cards that only a ComfyUI tells of: by /system_stats, and by the frames of crystools."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from managers.clock import SystemClock
from managers.comfyui.backend import Backend, BackendConfig
from managers.events.hub import Hub
from managers.events.types import ComfyUIMessage, GpuSample, LiveEvent, StoredEvent
from managers.gpu import Cost, Gpu, GpuConfig, GpuManager, GpuView
from managers.gpu.remote import Pace
from tests.gpu.child import NoLog
from tests.gpu.stand_in import CPU, GIB, StandIn, device, stand_in
from tests.serving import DEADLINE

RESTING = Pace(running=60, idle=60)
WORKFLOW = "0c1d2e3f-0000-4000-8000-000000000001"
PROMPT = "0c1d2e3f-0000-4000-8000-000000000002"


class Far:
    """A manager, and its backend at a stand-in."""

    def __init__(self, comfy: StandIn, pace: Pace) -> None:
        self.comfy = comfy
        self.heard: list[LiveEvent | StoredEvent] = []
        self._came = asyncio.Event()
        hub = Hub(NoLog())
        hub.listen(self._hear)
        clock = SystemClock()
        self.backend = Backend(
            BackendConfig(name="far", url=comfy.url), "me", clock=clock, publish=hub.publish, on_event=hub.publish
        )
        config = GpuConfig(sample_seconds=60, here={}, pace=pace)
        self.gpus = GpuManager(config, backends=[self.backend], hub=hub, clock=clock)

    @property
    def cards(self) -> list[Gpu]:
        """Whatever this machine has itself."""
        return [gpu for gpu in self.gpus.gpus() if gpu.backend == "far"]

    async def until_sample(self, right: Callable[[list[GpuView]], object]) -> None:
        """Until a sample is told whose cards of the stand-in are right, or was told last."""

        def told() -> bool:
            samples = [event for event in self.heard if isinstance(event, GpuSample)]
            return bool(samples) and bool(right([gpu for gpu in samples[-1].gpus if gpu.backend == "far"]))

        await self._until(told)

    async def until_message(self, kind: str) -> None:
        """Until this message of ComfyUI has gone through everybody's hands."""
        await self._until(
            lambda: any(isinstance(event, ComfyUIMessage) and event.type == kind for event in self.heard)
        )

    async def _until(self, right: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE):
            while not right():
                self._came.clear()
                await self._came.wait()

    def _hear(self, event: LiveEvent | StoredEvent) -> None:
        self.heard.append(event)
        self._came.set()


@asynccontextmanager
async def far(*devices: Any, pace: Pace = RESTING) -> AsyncIterator[Far]:
    async with stand_in() as comfy:
        comfy.devices = list(devices)
        house = Far(comfy, pace)
        work = [asyncio.create_task(house.gpus.run()), asyncio.create_task(house.backend.run(tuple))]
        try:
            yield house
        finally:
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)
            await house.backend.client.aclose()


async def test_system_stats_tell_names_and_memory() -> None:
    two = [device(), device("cuda:1 NVIDIA A100", vram_free=22 * GIB, torch_vram_free=0)]
    async with far(*two) as house:
        await house.until_sample(lambda gpus: [gpu.gpu_id for gpu in gpus] == ["far:0", "far:1"])
        first, second = house.cards
        # What torch keeps in reserve is in use, as the driver counts.
        assert first == Gpu(
            gpu_id="far:0",
            index=0,
            name="NVIDIA GeForce RTX 4090",
            memory_used=5 * GIB,
            memory_total=24 * GIB,
            backend="far",
        )
        assert (second.name, second.memory_used) == ("NVIDIA A100", 2 * GIB)
        [shown, _] = [gpu for gpu in house.gpus.snapshot().gpus if gpu.backend == "far"]
        assert shown.memory is not None
        assert (shown.memory.used, shown.memory.total, shown.memory.percent_used) == (5120, 24576, 20.8)


@pytest.mark.parametrize(
    ("told", "used"),
    [
        # Apple: one memory for all, and torch has none of its own.
        ({"type": "mps", "torch_vram_total": 24 * GIB, "torch_vram_free": 20 * GIB}, 4 * GIB),
        ({"torch_vram_total": None, "torch_vram_free": None}, 4 * GIB),
        ({"vram_free": None}, None),
        ({"vram_total": "much"}, None),
    ],
)
async def test_system_stats_of_other_cards(told: dict[str, Any], used: int | None) -> None:
    async with far(device(**told)) as house:
        await house.until_sample(bool)
        assert [card.memory_used for card in house.cards] == [used]


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("cuda:0 AMD Radeon RX 7900 XTX : native", "AMD Radeon RX 7900 XTX"),
        ("xpu:0 Intel(R) Arc(TM) A770", "Intel(R) Arc(TM) A770"),
        ("mps", "mps"),
        ("", None),
    ],
)
async def test_names_are_those_of_the_card(told: str, name: str | None) -> None:
    async with far(device(told)) as house:
        await house.until_sample(bool)
        assert [card.name for card in house.cards] == [name]


async def test_a_comfyui_without_a_card_is_left_alone() -> None:
    async with far(CPU, pace=Pace(running=0.01, idle=0.01)) as house:
        await house.comfy.until_asked(2)  # the backend's greeting, and ours
        with suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                await house.comfy.until_asked(3)
        assert house.comfy.asked == 2
        assert house.cards == []
        # Another connection may be another ComfyUI.
        house.comfy.devices = [device()]
        await house.comfy.drop()
        await house.until_sample(bool)


async def test_it_is_asked_again_and_again_and_more_often_while_a_workflow_runs() -> None:
    async with far(device(), pace=Pace(running=0.02, idle=60)) as house:
        await house.until_sample(bool)
        asked = house.comfy.asked
        house.comfy.devices = [device(vram_free=10 * GIB)]
        with house.backend.inbox(PROMPT, WORKFLOW):
            await house.comfy.say("execution_start", prompt_id=PROMPT, timestamp=1)
            await house.comfy.until_asked(asked + 5)
            house.comfy.devices = [device(vram_free=18 * GIB)]
            await house.until_sample(lambda gpus: any(gpu.memory and gpu.memory.used == 7 * 1024 for gpu in gpus))
            await house.comfy.say("execution_success", prompt_id=PROMPT, timestamp=2)
            await house.until_message("comfyui:execution_success")
        cost = house.gpus.cost_of(WORKFLOW)
        assert isinstance(cost, Cost)
        # 24 - 10 free, and 1 in reserve; nobody tells of energy.
        assert cost == Cost(gpu_seconds=cost.gpu_seconds, vram_peak_bytes=15 * GIB)
        assert isinstance(cost.gpu_seconds, float)
        assert 0.05 < cost.gpu_seconds < DEADLINE


async def test_a_comfyui_that_does_not_answer_is_asked_again() -> None:
    async with far(device(), pace=Pace(running=60, idle=0.02)) as house:
        house.comfy.failing = True
        await house.comfy.until_asked(5)
        house.comfy.failing = False
        await house.until_sample(bool)


async def test_cards_of_a_comfyui_that_is_away_are_not_known() -> None:
    async with far(device()) as house:
        await house.until_sample(bool)
        house.comfy.failing = True
        asked = house.comfy.asked
        await house.comfy.drop()
        await house.until_sample(lambda gpus: not gpus)
        # Connected again, it has not told of them yet, and may be another one.
        await house.comfy.until_asked(asked + 2)
        assert house.backend.up
        assert house.cards == []


def monitored(**fields: float) -> dict[str, float]:
    return {
        "gpu_utilization": 97,
        "gpu_temperature": 71,
        "vram_total": 24 * GIB,
        "vram_used": 6 * GIB,
        "vram_used_percent": 25,
    } | fields


async def crystools(house: Far, *gpus: dict[str, float], device_type: str = "cuda") -> None:
    await house.comfy.say(
        "crystools.monitor",
        cpu_utilization=3.1,
        ram_total=1,
        ram_used=1,
        ram_used_percent=1,
        device_type=device_type,
        gpus=list(gpus),
    )


async def test_frames_of_crystools_tell_more_and_spare_the_questions() -> None:
    async with far(device(), pace=Pace(running=0.05, idle=0.05)) as house:
        await house.until_sample(bool)
        await crystools(house, monitored())
        await house.until_sample(lambda gpus: any(gpu.utilization == 97 for gpu in gpus))
        [card] = house.cards
        assert card == Gpu(
            gpu_id="far:0",
            index=0,
            name="NVIDIA GeForce RTX 4090",
            utilization=97,
            memory_used=6 * GIB,
            memory_total=24 * GIB,
            temperature=71,
            backend="far",
        )


async def test_while_frames_come_nobody_asks() -> None:
    async with far(device(), pace=Pace(running=0.5, idle=0.5)) as house:
        await house.until_sample(bool)
        asked = house.comfy.asked
        for _ in range(14):
            await crystools(house, monitored())
            with suppress(TimeoutError):
                async with asyncio.timeout(0.05):
                    await house.comfy.until_asked(asked + 1)
        assert house.comfy.asked == asked
        await house.comfy.until_asked(asked + 1)


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        (monitored(gpu_utilization=-1), (None, 71, 6 * GIB)),
        (monitored(gpu_temperature=-1), (97, None, 6 * GIB)),
        (monitored(vram_used=-1, vram_total=-1), (97, 71, None)),
        (monitored(vram_used=6.0 * GIB), (97, 71, 6 * GIB)),
    ],
)
async def test_what_crystools_does_not_know_is_not_known(frame: dict[str, float], expected: Any) -> None:
    async with far(device()) as house:
        await house.until_sample(bool)
        await crystools(house, frame, monitored())
        await house.until_sample(lambda gpus: len(gpus) == 2)
        first, second = house.cards
        assert (first.utilization, first.temperature, first.memory_used) == expected
        # ComfyUI uses one card, crystools sees two: which is whose is not known.
        assert (first.name, second.name, second.gpu_id) == (None, None, "far:1")


async def test_frames_without_cards_say_nothing() -> None:
    async with far(device()) as house:
        await house.until_sample(bool)
        before = house.cards
        await crystools(house, monitored(vram_used=1), device_type="cpu")
        await crystools(house)
        await house.comfy.say("crystools.monitor", gpus="none")
        await house.comfy.say("last")
        await house.until_message("comfyui:last")
        assert house.cards == before


async def test_a_run_that_began_before_we_listened_has_no_cost() -> None:
    async with far(device(), pace=Pace(running=0.02, idle=60)) as house:
        await house.until_sample(bool)
        asked = house.comfy.asked
        with house.backend.inbox(PROMPT, WORKFLOW):
            await house.comfy.say("progress_state", prompt_id=PROMPT, nodes={})
            await house.comfy.until_asked(asked + 3)
            assert house.gpus.cost_of(WORKFLOW) is None
            await house.comfy.say("execution_success", prompt_id=PROMPT, timestamp=2)
            await house.until_message("comfyui:execution_success")
        assert house.gpus.cost_of(WORKFLOW) is None
