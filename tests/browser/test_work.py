"""Handing in, watching, cancelling, retrying, reordering: by the page alone."""

from __future__ import annotations

import io
import json
import re
import struct
import zlib

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.browser.conftest import OpenPage
from tests.browser.kit import House, Watched, expect, steps
from tests.comfy_kit import Graph, picture

pytestmark = pytest.mark.slow


async def test_drop_a_workflow_watch_it_and_look_at_the_picture(home: House, page: Watched) -> None:
    await page.drop_graph("fox.json", steps(20, 0.15))
    run = page.running.get_by_role("article", name="Workflow fox.json")
    await expect(run.get_by_role("button", name="Cancel fox.json")).to_be_visible()

    node = run.locator(".node.main")
    await expect(node.get_by_text("Denoise", exact=True)).to_be_visible()
    await expect(node.locator("svg.icon")).to_be_visible()
    bar = node.get_by_role("progressbar", name="Steps of Denoise")
    await expect(bar).to_have_attribute("aria-valuetext", re.compile(r"^[1-9]\d?/20 steps$"))
    before = int(await bar.get_attribute("aria-valuenow") or 0)
    await expect(bar).not_to_have_attribute("aria-valuenow", str(before))
    assert int(await bar.get_attribute("aria-valuenow") or 0) > before
    inner = bar.locator(".bar")
    assert 0 < await inner.evaluate("(bar) => new DOMMatrix(getComputedStyle(bar).transform).a") < 1
    assert await inner.evaluate("(bar) => parseFloat(getComputedStyle(bar).transitionDuration)") > 0
    await page.has_drawn(run.get_by_alt_text("Preview of fox.json"))
    await expect(run.get_by_role("list", name="Nodes done")).to_contain_text("Blank canvas")

    await expect(page.ended.get_by_role("button", name="fox.json", exact=True)).to_be_visible()
    await expect(page.page.locator("#announcer")).to_contain_text("fox.json completed")
    thumbnail = page.outputs.get_by_role("button", name=re.compile(r"^Show .* of fox\.json$"))
    await page.has_drawn(thumbnail.locator("img"))
    await thumbnail.click()
    full = page.dialog.get_by_alt_text(re.compile("made by fox.json"))
    await page.has_drawn(full)
    assert await full.evaluate("(image) => [image.naturalWidth, image.src.split(':')[0]]") == [512, "blob"]
    await page.page.keyboard.press("Escape")
    await expect(page.dialog).to_be_hidden()
    await expect(thumbnail).to_be_focused()
    (found,) = (await home.ask("GET", "/v1/comfyui/workflow"))["workflows"]
    assert found["metadata"] == {"name": "fox.json"}


async def test_drop_a_picture_of_comfyui(home: House, page: Watched) -> None:
    graph = steps(2, 0.01)
    first = await home.finish(graph, "first")
    await page.drop("first_00001_.png", await home.ask("GET", first["outputs"][0]["url"]))
    await expect(page.dialog).to_contain_text("3 nodes")
    await page.dialog.get_by_label("Priority").select_option("high")
    await page.dialog.get_by_role("button", name="Submit", exact=True).click()
    await expect(page.ended.get_by_role("button", name="first_00001_.png", exact=True)).to_be_visible()
    second = (await home.ask("GET", "/v1/comfyui/workflow?limit=1"))["workflows"][0]
    assert second["workflowId"] != first["workflowId"]
    assert second["priority"] == "high"
    assert (await home.look(second["workflowId"], "workflow"))["workflow"] == graph


def png(**chunks: tuple[str, bool]) -> bytes:
    """A picture with international texts (iTXt), packed or not."""
    info = PngInfo()
    for name, (text, packed) in chunks.items():
        info.add_itxt(name, text, zip=packed)
    return drawn("PNG", info)


def drawn(kind: str, info: PngInfo | None = None) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, kind, pnginfo=info)
    return buffer.getvalue()


def ztxt(keyword: str, text: str) -> bytes:
    """A picture with a packed Latin text (zTXt), right before its end."""
    body = keyword.encode() + b"\0\0" + zlib.compress(text.encode("latin-1"))
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    whole = drawn("PNG")
    return whole[:-12] + chunk + whole[-12:]


async def test_what_is_understood_and_what_is_not(page: Watched) -> None:
    graph = picture(color=1)
    as_python_writes = json.dumps(graph | {"1": graph["1"] | {"is_changed": [float("nan")]}})
    assert "NaN" in as_python_writes
    editors = json.dumps({"nodes": [], "links": [], "version": 0.4})
    for name, data in {
        "plain.json": json.dumps(graph).encode(),
        "request.json": json.dumps({"workflow": graph, "priority": "low"}).encode(),
        "prompt.json": json.dumps({"prompt": graph, "client_id": "x"}).encode(),
        "nan.png": png(prompt=(as_python_writes, False)),
        "packed.png": png(workflow=(editors, False), prompt=(json.dumps(graph), True)),
        "latin.png": ztxt("prompt", json.dumps(graph)),
    }.items():
        await page.drop(name, data)
        await expect(page.dialog).to_contain_text(f"{name} 2 nodes")
        if name == "request.json":
            await expect(page.dialog.get_by_label("Priority")).to_have_value("low")
        await page.page.keyboard.press("Escape")
        await expect(page.dialog).to_be_hidden()
    how = "Workflow → Export (API)"
    for name, data, words in (
        ("editor.json", editors.encode(), how),
        ("editor.png", png(workflow=(editors, False)), how),
        ("list.json", b"[1]", "not a JSON object"),
        ("other.json", b'{"a": 1}', how),
        ("broken.json", b'{"1": ', "neither a workflow in JSON nor a PNG"),
        ("empty.png", drawn("PNG"), "carries no workflow"),
        ("cut.png", drawn("PNG")[:40], "cut short"),
        ("torn.png", png(prompt=("{", False)), "damaged"),
        ("photo.jpg", drawn("JPEG"), "Only PNG"),
    ):
        await page.drop(name, data)
        await expect(page.dialog.get_by_role("alert")).to_contain_text(words)
        await expect(page.dialog.get_by_role("button", name="Submit", exact=True)).to_have_count(0)
        await page.page.keyboard.press("Escape")
        await expect(page.dialog).to_be_hidden()


async def test_a_refusal_shows_the_services_words(page: Watched) -> None:
    graph: Graph = {"1": {"class_type": "SaveImag", "inputs": {}}}
    await page.drop_graph("typo.json", graph)
    await expect(page.page.get_by_role("status").filter(has_text="SaveImag")).to_contain_text("perhaps")
    await expect(page.ended.get_by_text("failed")).to_be_visible()


async def test_cancel_what_runs_and_what_waits_and_run_it_again(home: House, page: Watched) -> None:
    await page.drop_graph("one.json", steps(400))
    await page.drop_graph("two.json", steps(400))
    await expect(page.queue.get_by_role("listitem")).to_have_count(1)
    await page.queue.get_by_role("button", name="Cancel two.json").click()
    await expect(page.page.get_by_text("Nothing waits.")).to_be_visible()
    await page.running.get_by_role("button", name="Cancel one.json").click()
    await expect(page.ended.get_by_text("cancelled")).to_have_count(2)
    await expect(page.running.get_by_role("article")).to_have_count(0)

    await page.ended.get_by_role("button", name="Retry one.json").click()
    await expect(page.running.get_by_role("article", name="Workflow one.json")).to_be_visible()
    newest = (await home.ask("GET", "/v1/comfyui/workflow?limit=1"))["workflows"][0]
    assert newest["status"] == "running"
    assert newest["retryOf"] is not None


async def test_what_waits_is_reordered_held_back_and_let_go(home: House, page: Watched) -> None:
    tools = page.page.get_by_role("region", name="Queue")
    await tools.get_by_role("button", name="Pause queue").click()
    await expect(tools.get_by_text("paused")).to_be_visible()
    ids = {name: await home.submit(picture(), name) for name in ("a", "b", "c")}
    rows = page.queue.get_by_role("listitem")
    await expect(rows).to_have_text([re.compile(f"^{place}{name}") for place, name in ((1, "a"), (2, "b"), (3, "c"))])
    await page.queue.get_by_label("Priority of c").select_option("high")
    await expect(rows).to_have_text([re.compile(f"^{place}{name}") for place, name in ((1, "c"), (2, "a"), (3, "b"))])
    await page.queue.get_by_label("Priority of a").select_option("low")
    await expect(rows).to_have_text([re.compile(f"^{place}{name}") for place, name in ((1, "c"), (2, "b"), (3, "a"))])
    assert [(await home.look(ids[name]))["queuePosition"] for name in "cba"] == [0, 1, 2]

    machines = page.page.get_by_role("region", name="Backends")
    await machines.get_by_role("button", name="Drain local").click()
    await expect(machines).to_contain_text("gets no work")
    await tools.get_by_role("button", name="Resume queue").click()
    await expect(tools.get_by_text("paused")).to_have_count(0)
    await expect(rows).to_have_count(3)
    await machines.get_by_role("button", name="Resume local").click()
    await expect(page.ended.get_by_role("button", name=re.compile("^[abc]$"))).to_have_text(["a", "b", "c"])


async def test_details_of_a_failure(home: House, page: Watched) -> None:
    await home.finish(steps(1, 0.01, fail="value_error", fail_at_step=1), "broken")
    await page.ended.get_by_role("button", name="broken", exact=True).click()
    await expect(page.dialog).to_contain_text("deliberate failure at step 1")
    await expect(page.dialog).to_contain_text("failed (node)")
    await page.dialog.get_by_role("button", name="Retry").click()
    await expect(page.ended.get_by_role("button", name="broken", exact=True)).to_have_count(2)


async def test_nodes_that_run_at_the_same_time(page: Watched) -> None:
    graph = picture()
    for n in ("3", "4"):
        graph[n] = {"class_type": "AsyncSleep", "inputs": {"image": ["1", 0], "seconds": 3.0, "seed": int(n)}}
        graph[n]["_meta"] = {"title": f"Sleeper {n}"}
        graph[f"1{n}"] = {"class_type": "SaveImage", "inputs": {"images": [n, 0], "filename_prefix": n}}
    await page.drop_graph("both.json", graph)
    await expect(page.running.locator(".node strong")).to_have_text(["Sleeper 3", "Sleeper 4"])


async def test_no_motion_for_those_who_want_none(home: House, open_page: OpenPage) -> None:
    page = await open_page(reduced_motion="reduce")
    await page.open()
    await home.submit(steps(400), "still")
    badge = page.running.locator(".badge")
    assert await badge.evaluate("(badge) => getComputedStyle(badge).animationName") == "none"
    assert await page.running.locator(".bar").first.evaluate("(e) => getComputedStyle(e).transitionDuration") == "0s"
    moving = await open_page()
    await moving.open()
    assert await moving.running.locator(".badge").evaluate("(e) => getComputedStyle(e).animationName") == "pulse"
