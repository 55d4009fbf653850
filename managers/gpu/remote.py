"""What a ComfyUI tells of its own cards: for those of other machines, and where there is no NVML.

Must never load it: /system_stats is asked now and then, and not at all where the custom node crystools sends its
frames, or where there is no card. A card that nobody has spoken of for a while is not known any more.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import Raw, Struct
from msgspec.structs import replace

from managers.clock import Clock
from managers.comfyui.backend import Backend
from managers.errors import BackendUnavailable
from managers.gpu.values import Gpu

CRYSTOOLS = "comfyui:crystools.monitor"

_ASK_SECONDS = 5.0
_STALE_SECONDS = 45.0


class Pace(Struct, frozen=True, kw_only=True):
    """Seconds from one question to the next, while a workflow of ours runs there and while none does."""

    running: float = 2.0
    idle: float = 15.0


class _Device(Struct, frozen=True):
    """One of `devices` in /system_stats (PROTOCOL §2)."""

    name: str = ""
    type: str = ""
    vram_total: int | None = None
    vram_free: int | None = None
    torch_vram_total: int | None = None
    torch_vram_free: int | None = None


class _Monitored(Struct, frozen=True):
    """A card in a frame of crystools; -1 where it does not know, and for what is switched off there."""

    gpu_utilization: float = -1
    gpu_temperature: float = -1
    vram_total: int = -1
    vram_used: int = -1


class _Monitor(Struct, frozen=True):
    """A frame of crystools. There is one made-up card where `device_type` is cpu."""

    device_type: str = ""
    gpus: list[_Monitored] = []


class Remote:
    """The cards of one backend. `run` it as a task; `wake` it when something has changed."""

    def __init__(
        self,
        backend: Backend,
        clock: Clock,
        pace: Pace,
        *,
        wanted: Callable[[], bool],
        busy: Callable[[], bool],
        changed: Callable[[Remote], None],
    ) -> None:
        """`wanted`: nobody knows its cards better. `busy`: a workflow of ours runs there. `changed` hears of news."""
        self.name = backend.name
        self.cpu_only = False
        """Its ComfyUI says that it uses no card at all."""
        self.at = float("-inf")
        """When the cards were last told of (monotonic seconds)."""
        self._backend = backend
        self._clock = clock
        self._pace = pace
        self._wanted = wanted
        self._busy = busy
        self._changed = changed
        self._gpus: tuple[Gpu, ...] = ()
        self._names: tuple[str, ...] = ()
        self._framed_at = float("-inf")
        self._asked_connection = 0
        self._wake = asyncio.Event()

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """As they were last told of; none when that was too long ago, or when others know better."""
        fresh = self._backend.up and self._clock.monotonic() - self.at < _STALE_SECONDS
        return self._gpus if fresh and self._wanted() else ()

    def wake(self) -> None:
        """Look again whether to ask."""
        self._wake.set()

    def forget(self) -> None:
        """The connection is gone: the next one may be to another ComfyUI."""
        self._gpus, self._names, self.cpu_only, self.at = (), (), False, float("-inf")

    async def run(self) -> None:
        """Ask as long as it makes sense, until cancelled."""
        while True:
            await self._backend.wait_up()
            self._wake.clear()
            patience = self._patience() if self._not_needed() or await self._ask() else self._pace.idle
            try:
                async with asyncio.timeout(patience):
                    await self._wake.wait()
            except TimeoutError:
                pass

    def frame(self, data: Raw) -> None:
        """A frame of crystools came: it knows utilization and temperature too."""
        try:
            monitor = msgspec.json.decode(data, type=_Monitor, strict=False)
        except msgspec.DecodeError:
            return
        if monitor.device_type == "cpu" or not monitor.gpus:
            return
        self._framed_at = self._clock.monotonic()
        names = self._names if len(self._names) == len(monitor.gpus) else (None,) * len(monitor.gpus)
        self._take(
            tuple(
                Gpu(
                    gpu_id=f"{self.name}:{n}",
                    index=n,
                    name=name,
                    utilization=_known(card.gpu_utilization),
                    memory_used=_known(card.vram_used),
                    memory_total=_known(card.vram_total),
                    temperature=_known(card.gpu_temperature),
                    backend=self.name,
                )
                for n, (name, card) in enumerate(zip(names, monitor.gpus, strict=True))
            )
        )

    # ---- inside

    def _not_needed(self) -> bool:
        """Each connection is asked once: it may be another ComfyUI, and crystools knows no names."""
        if self._asked_connection != self._backend.connections:
            return False
        framed = self._clock.monotonic() - self._framed_at < self._pace.idle
        return not self._wanted() or self.cpu_only or framed

    def _patience(self) -> float | None:
        """Seconds until it is time to look again; None: not before somebody says so."""
        if not self._wanted() or self.cpu_only:
            return None
        return self._pace.running if self._busy() else self._pace.idle

    async def _ask(self) -> bool:
        connection = self._backend.connections
        try:
            async with asyncio.timeout(_ASK_SECONDS):
                stats = await self._backend.client.system_stats()
        except (TimeoutError, BackendUnavailable):
            return False
        self._asked_connection = connection
        devices = [device for device in map(_device, stats.devices) if device.type != "cpu"]
        self.cpu_only = bool(stats.devices) and not devices
        self._names = tuple(_short(device.name) for device in devices)
        self._take(tuple(_gpu(self.name, n, device) for n, device in enumerate(devices)))
        return True

    def _take(self, gpus: tuple[Gpu, ...]) -> None:
        news = gpus or self._gpus
        self._gpus, self.at = gpus, self._clock.monotonic()
        if news:
            self._changed(self)


def _device(found: dict[str, Any]) -> _Device:
    try:
        return msgspec.convert(found, _Device, strict=False)
    except msgspec.ValidationError:
        return _Device(name=str(found.get("name", "")), type=str(found.get("type", "")))


def _gpu(backend: str, n: int, device: _Device) -> Gpu:
    gpu = Gpu(gpu_id=f"{backend}:{n}", index=n, name=_short(device.name) or None, backend=backend)
    if device.vram_total is None or device.vram_free is None:
        return gpu
    # ComfyUI counts what torch keeps in reserve as free; the driver, crystools and nvidia-smi do not.
    reserve = 0
    if device.torch_vram_total is not None and device.torch_vram_total < device.vram_total:
        reserve = device.torch_vram_free or 0
    return replace(
        gpu, memory_used=max(device.vram_total - device.vram_free + reserve, 0), memory_total=device.vram_total
    )


def _short(name: str) -> str:
    """`cuda:0 NVIDIA GeForce RTX 4090 : cudaMallocAsync` is an NVIDIA GeForce RTX 4090."""
    return re.sub(r"^\w+:\d+ | : \w*$", "", name)


def _known(value: Any) -> Any:
    return None if value < 0 else value
