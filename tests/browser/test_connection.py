"""Reloading, losing the line, keys that are wrong, lost or narrow: the page says what is, and nothing twice."""

from __future__ import annotations

import re

import pytest

from tests.browser.conftest import OpenPage
from tests.browser.kit import STORED, House, Watched, expect, line, steps
from tests.comfy_kit import picture
from tests.program import KEY, run

pytestmark = pytest.mark.slow

NET = re.compile(r"^(WebSocket connection to '.*' failed|Failed to load resource: net::ERR_)")
REFUSED = "Failed to load resource: the server responded with a status of 40"
"""What Chromium says by itself of each reply above 399."""


async def test_a_reload_in_the_middle_of_a_run(home: House, page: Watched) -> None:
    await home.finish(picture(), "earlier")
    await page.drop_graph("fox.json", steps(400, 0.05))
    await home.submit(picture(), "next")
    bar = page.running.get_by_role("progressbar", name="Steps of Denoise")
    await expect(bar).to_have_attribute("aria-valuetext", re.compile(r"^[2-9]\d/400 steps$"))
    await page.page.reload()
    await expect(page.running.get_by_role("article", name="Workflow fox.json")).to_be_visible()
    await expect(bar).to_have_attribute("aria-valuetext", re.compile(r"^\d{2,3}/400 steps$"))
    # What was done before this page was there, with its time.
    await expect(page.running.get_by_role("list", name="Nodes done")).to_have_text(
        re.compile(r"^Blank canvas ?\d+ ms$")
    )
    await expect(page.queue.get_by_role("listitem")).to_have_text([re.compile("^1next")])
    await expect(page.ended.get_by_role("button", name="earlier", exact=True)).to_be_visible()
    await page.has_drawn(page.outputs.locator("img").first)
    await page.has_drawn(page.running.get_by_alt_text("Preview of fox.json"))


async def test_the_service_dies_and_comes_back(home: House, page: Watched) -> None:
    page.excused = lambda text: bool(NET.match(text))
    await home.finish(picture(), "before")
    await page.drop_graph("fox.json", steps(400, 0.05))
    await home.submit(picture(), "next")
    await expect(page.queue.get_by_role("listitem")).to_have_text([re.compile("^1next")])
    home.kill()
    banner = page.page.get_by_role("status").filter(has_text="Connection lost")
    await expect(banner.first).to_be_visible()
    await expect(page.page.get_by_text("not connected")).to_be_visible()
    home.start()
    await page.page.get_by_role("button", name="Try now").click()
    await expect(page.page.get_by_text("live", exact=True)).to_be_visible()
    await expect(page.page.get_by_role("button", name="Try now")).to_have_count(0)
    await page.running.get_by_role("button", name="Cancel fox.json").click()
    names = page.ended.get_by_role("button", name=re.compile(r"^(before|fox\.json|next)$"))
    await expect(names).to_have_text(["next", "fox.json", "before"])
    await expect(page.page.get_by_text("Nothing waits.")).to_be_visible()


async def test_a_line_that_breaks_while_work_goes_on(home: House, open_page: OpenPage) -> None:
    async with line(home.url) as between:
        page = await open_page(between.url)
        page.excused = lambda text: bool(NET.match(text))
        await page.open()
        await home.finish(picture(), "one")
        await expect(page.ended.get_by_role("button", name="one", exact=True)).to_be_visible()
        between.cut()
        await expect(page.page.get_by_text("Connection lost. What you see is how it was.")).to_be_visible()
        await home.finish(picture(), "two")
        await home.submit(steps(400), "three")
        await home.submit(picture(), "four")
        between.mend()
        # By itself, after a while that grows with each attempt.
        await expect(page.page.get_by_text("live", exact=True)).to_be_visible()
        await expect(page.ended.get_by_role("button", name=re.compile("^(one|two)$"))).to_have_text(["two", "one"])
        await expect(page.running.get_by_role("article")).to_have_count(1)
        await expect(page.running.get_by_role("heading", level=3)).to_have_text("three")
        await expect(page.queue.get_by_role("listitem")).to_have_text([re.compile("^1four")])
        assert "since=" not in page.sockets[0]
        assert all(re.search(r"[?&]since=\d+$", url) for url in page.sockets[1:])
        await page.judge()


async def test_another_queue_at_the_same_address(home: House, page: Watched) -> None:
    """Numbers begin anew: nothing of the old one is shown."""
    page.excused = lambda text: bool(NET.match(text))
    await home.finish(picture(), "old")
    await expect(page.ended.get_by_role("button", name="old", exact=True)).to_be_visible()
    home.kill()
    home.start(MANAGEMENT_API_DATA_DIR=str(home.folder / "other"))
    await expect(page.page.get_by_text("live", exact=True)).to_be_visible()
    await expect(page.page.get_by_text("Nothing has ended yet.")).to_be_visible()
    await home.finish(picture(), "new")
    await expect(page.ended.get_by_role("button", name="new", exact=True)).to_be_visible()


async def test_a_wrong_key_then_the_right_one_then_none(home: House, open_page: OpenPage) -> None:
    page = await open_page()
    page.excused = lambda text: text.startswith(REFUSED)
    await page.open(key=None)
    await expect(page.page.get_by_role("heading", level=1)).to_have_text("ComfyUI queue")
    await page.enter("not-the-key")
    await expect(page.page.get_by_role("alert")).to_have_text(
        "The service does not know this key, or it has expired."
    )
    assert await page.page.evaluate("sessionStorage.length") == 0
    await page.enter(KEY)
    await expect(page.page.get_by_text("live", exact=True)).to_be_visible()
    assert await page.page.evaluate("Object.entries(sessionStorage)") == [[STORED, KEY]]
    await page.page.get_by_role("button", name="Forget key").click()
    await expect(page.page.get_by_label("Key")).to_be_visible()
    assert await page.page.evaluate("sessionStorage.length") == 0
    await page.page.reload()
    await expect(page.page.get_by_label("Key")).to_be_visible()


async def test_a_key_that_is_no_longer_good(home: House, page: Watched) -> None:
    page.excused = lambda text: bool(NET.match(text)) or text.startswith(REFUSED)
    home.kill()
    home.start(MANAGEMENT_API_KEY="another-key-8sK2mQ5v")
    await expect(page.page.get_by_role("alert")).to_contain_text("does not know this key")
    await expect(page.page.get_by_label("Key")).to_be_visible()


async def test_a_key_that_may_only_read(home: House, open_page: OpenPage) -> None:
    file = home.folder / "keys.toml"
    made = run(home.folder, "keys", "add", "watcher", "--scope", "read", MANAGEMENT_API_KEYS_FILE=str(file))
    assert made.status == 0, made.err
    found = re.search(r"cma_[A-Za-z0-9_-]+", made.out)
    assert found is not None
    home.kill()
    home.start(MANAGEMENT_API_KEYS_FILE=str(file))
    page = await open_page()
    page.excused = lambda text: text.startswith(REFUSED)
    await home.submit(steps(400), "fox")
    await home.submit(picture(), "next")
    await page.open(found.group())
    for press, scope in (
        (page.running.get_by_role("button", name="Cancel fox"), "submit"),
        (page.page.get_by_role("button", name="Pause queue"), "admin"),
        (page.page.get_by_role("button", name="Drain local"), "admin"),
    ):
        await press.click()
        words = f"The key watcher has not the scope {scope}, which this needs"
        toast = page.page.get_by_role("listitem").filter(has_text=words).last
        await expect(toast).to_be_visible()
        await toast.get_by_role("button", name="Dismiss").click()
        await expect(page.page.get_by_role("listitem").filter(has_text=words)).to_have_count(0)
    select = page.queue.get_by_label("Priority of next")
    await select.select_option("high")
    await expect(page.page.get_by_text("has not the scope submit")).to_be_visible()
    await expect(select).to_have_value("normal")
    await page.drop("more.json", b'{"1": {"class_type": "SaveImage", "inputs": {}}}')
    await page.dialog.get_by_role("button", name="Submit", exact=True).click()
    await expect(page.dialog.get_by_role("alert")).to_contain_text("has not the scope submit")
    assert (await home.look((await home.ask("GET", "/v1/comfyui/workflow"))["workflows"][1]["workflowId"]))[
        "status"
    ] == "running"
