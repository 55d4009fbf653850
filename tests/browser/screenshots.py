"""Pictures of the live page for the documentation, in the middle of a run:

    python -m tests.browser.screenshots docs/images

It needs what the tests need: chromium, playwright, and a C compiler for the stub of NVIDIA's library.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import tempfile
from importlib import resources
from pathlib import Path
from typing import Literal

from PIL import Image

from tests.browser.kit import Browser, House, Watched, chromium, expect, house, steps
from tests.browser.scene import NAMES, QUEUE, tell
from tests.comfy_kit import Graph
from tests.gpu.driver import Driver, build

SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
SIZES = {390: 2520, 1440: 1150}
"""Width and height of the window, in pixels: all of the page is in it."""
STEP_SECONDS = 5
SHOWN_STEP = 14
SETTINGS = {"GPU_SAMPLE_SECONDS": "1", "GPU_RUNNING_SAMPLE_SECONDS": "1"}


def hills(seed: int, count: int) -> Graph:
    """What the demo draws."""
    text = resources.files("management_api.commands").joinpath("txt2img.json").read_bytes()
    graph: Graph = json.loads(text)
    graph["5"]["inputs"] |= {"seed": seed, "steps": count}
    return graph


async def shoot(browser: Browser, home: House, driver: Driver, folder: Path) -> None:
    """One of each scheme and width."""
    context = await browser.new_context(viewport={"width": 1440, "height": 1000})
    page = Watched(await context.new_page(), home.url)
    await page.open()
    charts = asyncio.create_task(_move(driver))
    for seed, name in enumerate(NAMES[:6]):
        await home.finish(hills(seed + 1, 1), name)
    await home.finish(steps(1, 0.01, fail="value_error", fail_at_step=1), "broken")
    await home.submit(hills(42, 20), "fox in the snow")
    for name, priority in QUEUE:
        await home.submit(hills(7, 20), name, priority=priority)
    await expect(page.running.get_by_text(f"{SHOWN_STEP}/20 steps")).to_be_visible(timeout=20_000 * STEP_SECONDS)
    charts.cancel()
    for scheme in SCHEMES:
        await page.page.emulate_media(color_scheme=scheme)
        for width, height in SIZES.items():
            await page.page.set_viewport_size({"width": width, "height": height})
            for image in await page.outputs.locator("img").all():
                await page.has_drawn(image)
            target = folder / f"dashboard-{scheme}-{width}.png"
            await page.page.screenshot(path=target, animations="disabled")
            # Few colours: a third of the bytes.
            with Image.open(target) as picture:
                picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(target, optimize=True)
    await context.close()


async def _move(driver: Driver) -> None:
    for second in itertools.count():
        tell(driver, second)
        await asyncio.sleep(1)


async def main(folder: Path) -> None:
    """A house for the occasion."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        driver_folder = place / "driver"
        driver_folder.mkdir()
        driver = Driver(driver_folder, build(place))
        tell(driver, 0)
        slow = ("--preview", "--step-seconds", str(STEP_SECONDS))
        async with chromium() as browser:
            with house(place, *slow, **SETTINGS, **driver.environ) as home:
                await shoot(browser, home, driver, folder)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
