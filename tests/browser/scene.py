"""A page in the middle of things: something runs, something waits, something has failed, cards are at work."""

from __future__ import annotations

from tests.browser.kit import House, Watched, expect, steps
from tests.comfy_kit import Graph, picture
from tests.gpu.driver import MIB, Driver, card

NAMES = (
    "harbour at dusk",
    "study in ochre",
    "tin robot",
    "paper lanterns",
    "glass forest",
    "old town",
    "kites",
    "moss",
)
QUEUE = (
    ("portrait series 1", "high"),
    ("portrait series 2", "high"),
    ("poster, second draft", "normal"),
    ("product shots", "normal"),
    ("wallpaper", "normal"),
    ("upscale the archive", "low"),
)


def tell(driver: Driver, second: int) -> None:
    """What the cards say now: one at work, one at rest."""
    busy = 88 + second % 7
    driver.says(
        card(0, name="NVIDIA GeForce RTX 4090", utilization=busy, power=(300 + busy) * 1000, temperature=67,
             memory=f"{(14_000 + 120 * (second % 9)) * MIB} {24_564 * MIB}"),
        card(1, name="NVIDIA GeForce RTX 4090", utilization=2, power=31_000, temperature=38,
             memory=f"{900 * MIB} {24_564 * MIB}"),
        count=2,
    )  # fmt: skip


def gradient(n: int) -> Graph:
    """A plain picture of a colour of its own."""
    colours = (0x2A5B8F, 0xC98B2B, 0x8F9AA6, 0xD9573B, 0x2F7D5B, 0x7A4E7E, 0x3FA7C4, 0x5E7F3A)
    return picture(width=512, height=512, color=colours[n % len(colours)])


class Scene:
    """`make` it, then `show` it."""

    def __init__(self, home: House) -> None:
        self.home = home

    async def make(self) -> None:
        """Until it runs."""
        for n, name in enumerate(NAMES):
            await self.home.finish(gradient(n), name)
        await self.home.finish(steps(1, 0.01, fail="value_error", fail_at_step=1), "broken")
        await self.home.submit(steps(400, 0.25), "fox in the snow")
        for name, priority in QUEUE:
            await self.home.submit(steps(20, 0.1), name, priority=priority)

    async def show(self, page: Watched) -> None:
        """Until everything is there to be seen."""
        await expect(page.queue.get_by_role("listitem")).to_have_count(len(QUEUE))
        await expect(page.ended.get_by_role("listitem")).to_have_count(len(NAMES) + 1)
        await page.has_drawn(page.running.get_by_alt_text("Preview of fox in the snow"))
        for image in await page.outputs.locator("img").all():
            await page.has_drawn(image)
        await expect(page.page.get_by_role("region", name="GPUs").get_by_role("img")).to_have_count(6)
