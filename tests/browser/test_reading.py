"""For every eye and ear: axe-core finds nothing serious, in both schemes, narrow and wide; keys reach everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import OpenPage
from tests.browser.kit import House, Watched, expect, steps
from tests.browser.scene import Scene, tell
from tests.comfy_kit import picture
from tests.gpu.driver import Driver, build
from tests.program import KEY

pytestmark = pytest.mark.slow

AXE = (Path(__file__).parent / "vendor" / "axe.min.js").read_text()
WIDTHS = (390, 1440)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def environ(tmp_path: Path, library: Path) -> dict[str, str]:
    """Two cards."""
    folder = tmp_path / "driver"
    folder.mkdir()
    driver = Driver(folder, library)
    tell(driver, 0)
    return {"GPU_SAMPLE_SECONDS": "0.5", **driver.environ}


@pytest.fixture
async def scene(home: House) -> Scene:
    made = Scene(home)
    await made.make()
    return made


async def findings(page: Watched) -> list[str]:
    """Those that are serious or critical."""
    await page.page.evaluate(AXE)
    result: dict[str, Any] = await page.page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{one['id']}: {node['target']} {node['failureSummary']}"
        for one in result["violations"]
        if one["impact"] in {"serious", "critical"}
        for node in one["nodes"]
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_axe_finds_nothing_serious(scene: Scene, open_page: OpenPage, scheme: str) -> None:
    page = await open_page(color_scheme=scheme, reduced_motion="reduce")
    await page.open(key=None)
    assert await findings(page) == []
    await page.open()
    await scene.show(page)
    for width in WIDTHS:
        await page.page.set_viewport_size({"width": width, "height": 900})
        assert await findings(page) == [], width
        wide = await page.page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, "the page scrolls sideways"
    for opener in (
        page.page.get_by_role("button", name="Submit", exact=True),
        page.ended.get_by_role("button", name="broken", exact=True),
        page.outputs.get_by_role("button").first,
    ):
        await opener.click()
        await expect(page.dialog).to_be_visible()
        assert await findings(page) == []
        await page.page.keyboard.press("Escape")
        await expect(page.dialog).to_be_hidden()
        await expect(opener).to_be_focused()


async def test_the_scheme_can_be_chosen_and_stays(page: Watched) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    light = await page.page.evaluate(ground)
    await page.page.get_by_role("button", name="Use dark colours").click()
    await expect(page.page.get_by_role("button", name="Use light colours")).to_be_visible()
    dark = await page.page.evaluate(ground)
    assert dark != light
    await page.page.reload()
    await expect(page.page.get_by_role("button", name="Use light colours")).to_be_visible()
    assert await page.page.evaluate(ground) == dark


async def test_keys_alone_are_enough(home: House, open_page: OpenPage) -> None:
    page = await open_page()
    await page.open(key=None)
    keys = page.page.keyboard
    await expect(page.page.get_by_label("Key")).to_be_focused()
    await keys.type(KEY)
    await keys.press("Enter")
    await expect(page.page.get_by_role("button", name="Submit", exact=True)).to_be_visible()
    await home.submit(steps(400), "fox")
    await home.submit(picture(), "next")
    await expect(page.queue.get_by_role("button", name="next", exact=True)).to_be_visible()
    reached = []
    for _ in range(20):
        await keys.press("Tab")
        reached.append(
            await page.page.evaluate(
                """() => {
              const at = document.activeElement;
              const shown = getComputedStyle(at);
              if (at !== document.body && !(parseFloat(shown.outlineWidth) > 0)) return "unseen";
              return at.getAttribute("aria-label") ?? at.textContent.trim();
            }"""
            )
        )
    for name in (
        "Submit",
        "Forget key",
        "Details of fox",
        "Cancel fox",
        "Pause queue",
        "next",
        "Priority of next",
        "Cancel next",
        "Drain local",
    ):
        assert name in reached, name
    assert "unseen" not in reached
    await page.page.get_by_role("button", name="Submit", exact=True).focus()
    await keys.press("Enter")
    await expect(page.dialog).to_be_visible()
    for _ in range(6):
        await keys.press("Tab")
        outside = "document.activeElement !== document.body && !document.activeElement.closest('dialog')"
        assert not await page.page.evaluate(outside)
