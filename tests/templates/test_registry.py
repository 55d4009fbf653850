"""Saving, versions, aliases, files, restarts: over HTTP, with a real ComfyUI process behind it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from management_api.app import create_app
from management_api.settings import load
from tests.program import run
from tests.queue_kit import Comfy, House, Site, comfy, environment, house
from tests.serving import Log

PATH = "/v1/templates"
BOX = ["controlnet", "demo", "img2img", "inpaint", "txt2img", "txt2img-lora", "upscale"]


def tile(prefix: str = "tile", **width: Any) -> dict[str, Any]:
    return {
        "graph": {
            "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 255}},
            "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": prefix}},
        },
        "inputs": {
            "color": {"node": "1", "input": "color", "type": "color"},
            "width": {"node": "1", "input": "width", **width},
        },
        "outputs": ["2"],
        "description": f"A tile: {prefix}.",
    }


async def save(service: House, name: str, body: Any) -> dict[str, Any]:
    reply = await service.client.put(f"{PATH}/{name}", json=body)
    assert reply.status_code == 201, reply.text
    found: dict[str, Any] = reply.json()
    assert reply.headers["location"] == f"{PATH}/{name}?version={found['version']}"
    return found


async def get(service: House, path: str) -> dict[str, Any]:
    reply = await service.client.get(PATH + path)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def problem(reply: httpx.Response, status: int) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/problem+json"
    found: dict[str, Any] = reply.json()
    return found


async def test_every_save_is_a_new_version_and_stays_as_it_was(service: House) -> None:
    first = await save(service, "tile", tile())
    assert (first["version"], first["source"], first["savedBy"]) == (1, "api", "admin")
    assert (await save(service, "tile", tile()))["version"] == 2, "also when nothing has changed"
    await save(service, "tile", tile("other", maximum=128))
    assert (await get(service, "/tile"))["version"] == 3
    assert (await get(service, "/tile"))["description"] == "A tile: other."
    for way in ("/tile?version=1", "/tile@1"):
        old = await get(service, way)
        assert (old["version"], old["description"]) == (1, "A tile: tile.")
        assert old["graph"] == tile()["graph"]
        assert old["inputs"] == tile()["inputs"]
        assert old["outputs"] == ["2"]
    versions = (await get(service, "/tile/versions"))["versions"]
    assert [one["version"] for one in versions] == [3, 2, 1]
    assert (await get(service, "/tile/schema"))["properties"]["width"]["maximum"] == 128
    assert (await get(service, "/tile@2/schema"))["properties"]["width"]["maximum"] == 16384, "says ComfyUI"


async def test_saves_at_the_same_time_all_get_a_number_of_their_own(service: House) -> None:
    saved = await asyncio.gather(*(save(service, "tile", tile(f"p{n}")) for n in range(8)))
    assert sorted(one["version"] for one in saved) == list(range(1, 9))
    for one in saved:
        assert (await get(service, f"/tile@{one['version']}"))["description"] == one["description"]


async def test_aliases_are_moved_and_survive_new_versions(service: House) -> None:
    await save(service, "tile", tile("one"))
    await save(service, "tile", tile("two"))
    reply = await service.client.put(f"{PATH}/tile/aliases/prod", json={"version": 1})
    assert (reply.status_code, reply.json()) == (200, {"name": "tile", "aliases": {"prod": 1}})
    await save(service, "tile", tile("three"))
    assert (await get(service, "/tile@prod"))["description"] == "A tile: one."
    await service.client.put(f"{PATH}/tile/aliases/prod", json={"version": 3})
    assert (await get(service, "/tile@prod"))["version"] == 3
    (listed,) = [one for one in (await get(service, ""))["templates"] if one["name"] == "tile"]
    assert listed["aliases"] == {"prod": 3}
    assert (listed["version"], listed["versions"]) == (3, 3)
    assert problem(await service.client.put(f"{PATH}/tile/aliases/prod", json={"version": 9}), 404)
    assert problem(await service.client.put(f"{PATH}/tile/aliases/9", json={"version": 1}), 400)
    unknown = problem(await service.client.get(f"{PATH}/tile@staging"), 404)
    assert "it has prod (3)" in unknown["detail"]


async def test_deleted_is_gone_and_its_numbers_never_come_again(service: House, site: Site) -> None:
    await save(service, "tile", tile())
    ran = await service.client.post("/v1/generate/tile?wait=20", json={})
    assert ran.status_code == 200, ran.text
    assert (await service.client.delete(f"{PATH}/tile")).status_code == 204
    for path in ("tile", "tile@1", "tile/versions", "tile/schema"):
        assert problem(await service.client.get(f"{PATH}/{path}"), 404)
    assert problem(await service.client.delete(f"{PATH}/tile"), 404)
    assert problem(await service.client.post("/v1/generate/tile", json={}), 404)
    kept = await service.get(ran.json()["workflowId"])
    assert (kept["template"], kept["templateVersion"]) == ("tile", 1)
    assert (await save(service, "tile", tile()))["version"] == 2
    assert (await service.client.delete(f"{PATH}/demo")).status_code == 204, "of the box too"


async def test_a_mistake_is_told_and_nothing_is_saved(service: House) -> None:
    wrong = tile()
    wrong["inputs"]["width"]["node"] = "7"
    found = problem(await service.client.put(f"{PATH}/tile", json=wrong), 422)
    assert [(one["pointer"], one["code"]) for one in found["errors"]] == [("/inputs/width/node", "unknown_node")]
    assert "EmptyImage (1), SaveImage (2)" in found["detail"]
    editor: dict[str, Any] = {"graph": {"nodes": [], "links": []}}
    found = problem(await service.client.put(f"{PATH}/tile", json=editor), 400)
    assert found["errors"][0]["code"] == "workflow_format_ui"
    bodies: list[dict[str, Any]] = [
        {},
        {"graph": []},
        tile(type="picture"),
        {"graph": {}, "inputs": {"a b": {"node": "1", "input": "x"}}},
    ]
    for body in bodies:
        assert (await service.client.put(f"{PATH}/tile", json=body)).status_code in (400, 422)
    for name in ("Tile", "a_b", "x" * 65):
        assert problem(await service.client.put(f"{PATH}/{name}", json=tile()), 400)
    near = problem(await service.client.get(f"{PATH}/txt2image"), 404)
    assert "perhaps txt2img" in near["detail"]
    assert [one["name"] for one in (await get(service, ""))["templates"]] == BOX


async def test_classes_that_are_gone_are_told_at_the_list_and_at_use(service: House) -> None:
    listed = {one["name"]: one["missing"] for one in (await get(service, ""))["templates"]}
    assert listed["txt2img"] == listed["demo"] == []
    assert listed["upscale"] == ["ImageUpscaleWithModel", "UpscaleModelLoader"], "the simulator has not"
    assert (await get(service, "/upscale"))["missing"] == listed["upscale"]
    found = problem(await service.client.post("/v1/generate/upscale", json={"image": "x.png"}), 422)
    assert [one["classType"] for one in found["errors"]] == listed["upscale"]
    assert (await service.list())["workflows"] == []


async def test_all_of_it_is_there_after_a_restart(site: Site, simulator: Comfy, tmp_path: Path) -> None:
    app = create_app(load(environment(tmp_path, simulator), None))
    async with house(app) as before:
        await before.connected()
        await save(before, "tile", tile("one"))
        await save(before, "tile", tile("two"))
        await before.client.put(f"{PATH}/tile/aliases/prod", json={"version": 1})
        await before.client.delete(f"{PATH}/upscale")
        await save(before, "demo", tile("mine"))
        told = await get(before, "")
    async with house(app) as after:
        await after.connected()
        assert await get(after, "") == told
        assert (await get(after, "/tile@prod"))["description"] == "A tile: one."
        assert (await get(after, "/demo"))["source"] == "api", "the box takes nothing back"
        assert [one["version"] for one in (await get(after, "/demo/versions"))["versions"]] == [2, 1]
        assert "upscale" not in [one["name"] for one in (await get(after, ""))["templates"]]


async def test_files_are_read_at_the_start(simulator: Comfy, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "data" / "templates", tmp_path / "more"
    ours.mkdir(parents=True)
    theirs.mkdir()
    (ours / "wall.json").write_text(json.dumps(tile("wall")))
    (ours / "both.json").write_text(json.dumps(tile("ours")))
    (theirs / "both.json").write_text(json.dumps(tile("theirs")))
    (ours / "cut.json").write_text('{"graph": {"1": ')
    (ours / "Big Name.json").write_text(json.dumps(tile()))
    (theirs / "wrong.json").write_text(json.dumps(tile() | {"outputs": ["9"]}))
    (theirs / "notes.txt").write_text("no template")
    log = Log()
    app = create_app(
        load(environment(tmp_path, simulator, MANAGEMENT_API_TEMPLATES=str(theirs)), None), logs=log.logs
    )
    async with house(app) as service:
        told = await get(service, "")
        assert [one["name"] for one in told["templates"]] == sorted([*BOX, "both", "wall"])
        assert (await get(service, "/both"))["description"] == "A tile: theirs."
        assert (await get(service, "/wall"))["source"] == "file"
        assert [one["file"] for one in told["broken"]] == ["Big Name.json", "cut.json", "wrong.json"]
    lines = [line for line in log.lines() if line["event"] == "this file is no template"]
    assert [Path(line["file"]).name for line in lines] == ["Big Name.json", "cut.json", "wrong.json"]
    assert "There is no node '9' in the graph" in lines[2]["reason"]

    async with house(app) as service:  # nothing has changed: no new version
        assert (await get(service, "/wall"))["version"] == 1
        await save(service, "wall", tile("by hand"))
    async with house(app) as service:  # the file is what it was, so what was saved since stays
        assert (await get(service, "/wall"))["description"] == "A tile: by hand."
    (ours / "wall.json").write_text(json.dumps(tile("new file")))
    async with house(app) as service:
        wall = await get(service, "/wall")
        assert (wall["version"], wall["description"], wall["source"]) == (3, "A tile: new file.", "file")


def test_the_doctor_tells(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "templates"
    folder.mkdir(parents=True)
    (folder / "cut.json").write_text('{"graph": {"1": ')
    with comfy(tmp_path / "comfyui", "--without", "EmptyImage") as without:
        told = run(tmp_path, "doctor", COMFYUI_URL=without.url).out
    assert f"! template file {folder / 'cut.json'}: " in told
    assert "! template demo: no ComfyUI has the node class EmptyImage\n" in told
    assert "! template txt2img:" not in told


@pytest.mark.parametrize(("scope", "allowed"), [("read", "GET"), ("submit", "POST"), ("admin", "PUT")])
async def test_reading_is_for_readers_and_saving_for_admins(
    scope: str, allowed: str, simulator: Comfy, tmp_path: Path
) -> None:
    keys = {"MANAGEMENT_API_KEYS_FILE": str(tmp_path / "keys.toml")}
    made = run(tmp_path, "keys", "add", "tester", "--scope", scope, **keys)
    assert made.status == 0, made.err
    headers = {"X-API-Key": made.out.strip()}
    app = create_app(load(environment(tmp_path, simulator, **keys), None))
    async with house(app) as service:
        answers = {
            "GET": (await service.client.get(PATH, headers=headers)).status_code,
            "PUT": (await service.client.put(f"{PATH}/tile", json=tile(), headers=headers)).status_code,
            "POST": (await service.client.post("/v1/generate/demo", json={}, headers=headers)).status_code,
        }
        propose = await service.client.post(f"{PATH}/propose", json={"graph": tile()["graph"]}, headers=headers)
    granted = {method for method, status in answers.items() if status != 403}
    assert granted == ({"GET", "PUT", "POST"} if allowed == "PUT" else {allowed})
    assert (propose.status_code == 200) == (allowed != "POST")
