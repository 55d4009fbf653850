"""The service and a simulator as processes, the load, and a look at the service now and then."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx
from msgspec import Struct

from tests.chaos.processes import ComfyUI, Life, service
from tests.comfy_kit import PLAIN
from tests.soak.load import HEADERS, Load
from tests.soak.samples import Sample, look

START_SECONDS = 30
_STREAMS = re.compile(r"^comfyui_stream_clients (\d+)", re.MULTILINE)


class Soaked(Struct, frozen=True):
    """What was measured; `done` and `wrong` count requests."""

    samples: tuple[Sample, ...]
    done: Counter[str]
    wrong: Counter[str]
    status: int | None


async def soak(
    folder: Path, *, seconds: float, rounds_a_second: float, every: float, say: Callable[[str], None]
) -> Soaked:
    """Run the load for so long, with a sample each `every` seconds. Ends what it has started."""
    lives: list[Life] = []
    comfyui = ComfyUI("local", folder, lives)
    url, program = service([comfyui], folder, lives)
    samples: list[Sample] = []
    try:
        async with httpx.AsyncClient(base_url=url, headers=HEADERS, timeout=10, **PLAIN) as client:
            await _ready(client)
            load = Load(url, rounds_a_second)
            working = asyncio.create_task(load.run())
            began = time.monotonic()
            try:
                while (now := time.monotonic() - began) < seconds and not working.done():
                    found = _STREAMS.search((await client.get("/metrics")).text)
                    one = look(program.life.pid, now, int(found[1]) if found else 0)
                    samples.append(one)
                    say(f"{now:4.0f} s  {one.rss / 1024:.1f} MiB  {one.fds} fds  {load.done.total()} done")
                    await asyncio.sleep(every)
            finally:
                working.cancel()
                (ended,) = await asyncio.gather(working, return_exceptions=True)
            if not isinstance(ended, asyncio.CancelledError):
                raise AssertionError("the load ended by itself") from ended
        status = await asyncio.to_thread(program.stop)
    finally:
        for process in (program, comfyui):
            if process.life.until is None:
                process.kill()
    return Soaked(tuple(samples), load.done, load.wrong, status)


async def _ready(client: httpx.AsyncClient) -> None:
    """Until the service answers and has reached its ComfyUI."""
    async with asyncio.timeout(START_SECONDS):
        while True:
            try:
                if (await client.get("/ready")).json()["checks"]["comfyui"] == "ok":
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.1)
