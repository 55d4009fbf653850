"""From parameters to a picture, over HTTP, with a real ComfyUI process behind the service."""

from __future__ import annotations

import asyncio
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from management_api.app import create_app
from management_api.settings import load
from tests.queue_kit import PATH, Comfy, House, comfy, environment, house, sleeper
from tests.templates.test_registry import problem, save, tile

GENERATE = "/v1/generate"
PICTURE = {"Accept": "image/png"}


def pixel(body: bytes) -> tuple[Any, tuple[int, int]]:
    with Image.open(BytesIO(body)) as image:
        return image.convert("RGB").getpixel((0, 0)), image.size


async def test_a_picture_for_one_curl(service: House) -> None:
    reply = await service.client.post(f"{GENERATE}/demo?wait=20", headers=PICTURE)
    assert (reply.status_code, reply.headers["content-type"]) == (200, "image/png")
    assert pixel(reply.content) == ((0x33, 0x66, 0xCC), (512, 512))
    made = await service.get(reply.headers["x-workflow-id"])
    assert (made["status"], made["template"], made["templateVersion"]) == ("completed", "demo", 1)
    seconds = (made["completionTime"] - made["startTime"]) / 1000
    assert float(reply.headers["x-generation-seconds"]) == pytest.approx(seconds)
    assert reply.headers["location"] == f"{PATH}/{made['workflowId']}"
    assert "x-seed" not in reply.headers, "it has none"


async def test_the_parameters_do_what_they_say(service: House) -> None:
    body = {"color": "#a0B0c0", "width": 48, "height": 32}
    for headers in (PICTURE, {"Accept": "image/*"}, {"Accept": "image/webp, image/png;q=0.8"}):
        reply = await service.client.post(GENERATE, json=body, headers=headers)
        assert reply.status_code == 200, "a picture is waited for, said or not, and demo is the default here"
        assert pixel(reply.content) == ((0xA0, 0xB0, 0xC0), (48, 32))


async def test_without_waiting_it_is_a_workflow_like_any_other(service: House) -> None:
    query = {"priority": "high", "gpu": "local", "timeoutSeconds": "60", "metadata": '{"shop": "é"}'}
    reply = await service.client.post(f"{GENERATE}/demo", json={"width": 40}, params=query)
    accepted = reply.json()
    assert reply.status_code == 202, accepted
    assert accepted == {
        "workflowId": accepted["workflowId"],
        "status": "queued",
        "queuePosition": 0,
        "createdAt": accepted["createdAt"],
        "template": "demo",
        "templateVersion": 1,
        "parameters": {"color": "#3366cc", "width": 40, "height": 512},
    }
    assert reply.headers["location"] == f"{PATH}/{accepted['workflowId']}"
    ended = await service.ended(accepted["workflowId"])
    assert ended["status"] == "completed"
    assert (ended["priority"], ended["timeoutSeconds"], ended["metadata"]) == ("high", 60, {"shop": "é"})
    graph = (await service.get(accepted["workflowId"], include="workflow"))["workflow"]
    assert graph["1"]["inputs"] == {"width": 40, "height": 512, "batch_size": 1, "color": 0x3366CC}


async def test_waiting_gives_the_whole_workflow_with_its_parameters(service: House) -> None:
    ways: list[dict[str, Any]] = [{"params": {"wait": "20"}}, {"headers": {"Prefer": "wait=20"}}]
    for way in ways:
        reply = await service.client.post(f"{GENERATE}/txt2img", json={"prompt": "x", "steps": 2, "seed": -1}, **way)
        assert reply.status_code == 200, reply.text
        ended = reply.json()
        assert (ended["status"], len(ended["outputs"])) == ("completed", 1)
        assert ended["parameters"]["checkpoint"] == "simulated.safetensors", "the first that is installed"
        seed = ended["parameters"]["seed"]
        assert 0 <= seed < 2**53
        assert reply.headers["x-seed"] == str(seed)
        graph = (await service.get(ended["workflowId"], include="workflow"))["workflow"]
        assert graph["5"]["inputs"]["seed"] == seed
        assert graph["2"]["inputs"]["text"] == "x"


async def test_who_waits_in_vain_gets_the_place_in_the_queue(service: House) -> None:
    await service.switch("pause")
    for headers in (PICTURE, {}):
        reply = await service.client.post(f"{GENERATE}/demo?wait=0", headers=headers)
        assert reply.status_code == 202
        assert reply.json()["status"] == "queued"


async def test_an_alias_and_a_version_are_taken_at_their_word(service: House) -> None:
    await save(service, "tile", tile("one"))
    await save(service, "tile", tile("two"))
    await service.client.put("/v1/templates/tile/aliases/prod", json={"version": 1})
    for reference, number in (("tile", 2), ("tile@prod", 1), ("tile@2", 2)):
        reply = await service.client.post(f"{GENERATE}/{reference}", json={"color": "#010203"})
        assert reply.status_code == 202, reply.text
        assert reply.json()["templateVersion"] == number


async def test_the_same_request_twice_is_one_workflow(service: House) -> None:
    async def ask(key: str = "k", color: str = "#010203", query: str = "", name: str = "txt2img") -> Any:
        body = {"prompt": color, "steps": 1} if name == "txt2img" else {"color": color}
        return await service.client.post(f"{GENERATE}/{name}{query}", json=body, headers={"Idempotency-Key": key})

    first, again = await ask(), await ask(query="?wait=20")
    assert again.headers["idempotency-replayed"] == "true"
    assert again.json()["workflowId"] == first.json()["workflowId"]
    assert again.json()["parameters"] == first.json()["parameters"], "the seed of the first time too"
    assert problem(await ask(color="#040506"), 422)
    assert problem(await ask(query="?priority=low"), 422)
    assert (await ask(name="demo")).json()["workflowId"] != first.json()["workflowId"], "another door"
    # It is answered whatever became of the template.
    await service.client.delete("/v1/templates/txt2img")
    assert (await ask()).json()["workflowId"] == first.json()["workflowId"]
    assert problem(await ask("other"), 404)


async def test_twenty_at_once_with_one_key(service: House) -> None:
    ask = [
        service.client.post(f"{GENERATE}/txt2img", json={"prompt": "x", "steps": 1}, headers={"Idempotency-Key": "k"})
        for _ in range(20)
    ]
    replies = [reply.json() for reply in await asyncio.gather(*ask)]
    assert len({reply["workflowId"] for reply in replies}) == 1
    assert len({reply["parameters"]["seed"] for reply in replies}) == 1


async def test_what_is_wrong_is_a_problem_and_nothing_is_stored(service: House) -> None:
    client = service.client
    found = problem(
        await client.post(f"{GENERATE}/demo", json={"colour": "#010203", "width": 0}, headers=PICTURE), 422
    )
    assert {one["pointer"]: one["code"] for one in found["errors"]} == {
        "/colour": "unknown_parameter",
        "/width": "value_smaller_than_min",
    }
    assert "perhaps color" in found["detail"]
    found = problem(
        await client.post(f"{GENERATE}/txt2img", json={"prompt": "x", "checkpoint": "a.safetensors"}), 422
    )
    assert found["errors"][0]["allowed"] == ["simulated.safetensors"]
    assert "perhaps txt2img" in problem(await client.post(f"{GENERATE}/txt2image"), 404)["detail"]
    for body in (b"[]", b"{", b'"x"', b"3", b"\xff"):
        assert problem(await client.post(f"{GENERATE}/demo", content=body), 400)
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert problem(await client.post(f"{GENERATE}/demo", content=b"a=b", headers=form), 415)
    for query in ("gpu=attic", "priority=urgent", "metadata=[]", "metadata={", "wait=x", "timeoutSeconds=0"):
        assert problem(await client.post(f"{GENERATE}/demo?{query}"), 400), query
    assert (await service.list())["workflows"] == []


async def test_a_graph_that_cannot_run_is_refused_about_its_parameter(service: House) -> None:
    graph = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 1}},
        "2": {"class_type": "SaveLatent", "inputs": {"samples": ["1", 0], "filename_prefix": "x"}},
        "3": {"class_type": "LoadLatent", "inputs": {"latent": "x.latent"}},
    }
    inputs = {"latent": {"node": "3", "input": "latent"}, "prefix": {"node": "2", "input": "filename_prefix"}}
    await save(service, "odd", {"graph": graph, "inputs": inputs})
    found = problem(await service.client.post(f"{GENERATE}/odd", json={"prefix": "../x"}), 422)
    assert {one.get("pointer") or one.get("classType") for one in found["errors"]} >= {"SaveLatent"}


async def test_a_failure_and_a_cancellation_are_no_pictures(service: House) -> None:
    inputs = {"fail": {"node": "3", "input": "fail"}, "steps": {"node": "3", "input": "steps"}}
    await save(service, "slow", {"graph": sleeper(steps=1, seconds=0.01, fail_at_step=1), "inputs": inputs})
    found = problem(await service.client.post(f"{GENERATE}/slow", json={"fail": "value_error"}, headers=PICTURE), 422)
    assert "failed: " in found["detail"]
    async with service.stream() as stream:
        await stream.settled()
        ask = asyncio.create_task(service.client.post(f"{GENERATE}/slow", json={"steps": 600}, headers=PICTURE))
        running = await stream.until("workflow:started")
        await service.cancel(running["workflowId"])
        assert problem(await ask, 409)["currentStatus"] == "cancelled"


async def test_the_picture_is_that_of_the_named_outputs(service: House) -> None:
    graph = tile()["graph"] | {
        "3": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0xFF0000}},
        "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "red"}},
    }
    for outputs, color in ((["4"], (255, 0, 0)), (["2"], (0, 0, 255))):
        await save(service, "two", {"graph": graph, "outputs": outputs})
        reply = await service.client.post(f"{GENERATE}/two", headers=PICTURE)
        assert pixel(reply.content)[0] == color


async def test_numbers_for_each_version(service: House) -> None:
    inputs = {"fail": {"node": "3", "input": "fail"}, "seed": {"node": "3", "input": "seed"}}
    for _ in range(2):
        body = {"graph": sleeper(steps=2, seconds=0.02, fail_at_step=1), "inputs": inputs}
        await save(service, "slow", body)
    for reference, fail in (("slow@1", "none"), ("slow@1", "value_error"), ("slow@2", "none"), ("slow@2", "none")):
        reply = await service.client.post(f"{GENERATE}/{reference}?wait=20", json={"fail": fail})
        assert reply.status_code == 200, reply.text
    told = {
        one["version"]: one["statistics"]
        for one in (await service.client.get("/v1/templates/slow/versions")).json()["versions"]
    }
    assert {number: (one["runs"], one["failures"]) for number, one in told.items()} == {1: (2, 1), 2: (2, 0)}
    assert all(0.03 < one["p50Seconds"] <= one["p95Seconds"] < 5 for one in told.values())


async def test_a_retry_keeps_what_it_was_made_from(service: House) -> None:
    inputs = {"fail": {"node": "3", "input": "fail"}}
    await save(service, "slow", {"graph": sleeper(steps=1, seconds=0.01, fail_at_step=1), "inputs": inputs})
    failed = await service.client.post(f"{GENERATE}/slow?wait=20", json={"fail": "value_error"})
    again = await service.client.post(f"{PATH}/{failed.json()['workflowId']}/retry")
    ended = await service.ended(again.json()["workflowId"])
    assert (ended["template"], ended["templateVersion"]) == ("slow", 1)


async def test_a_model_that_has_just_come_is_taken(tmp_path: Path) -> None:
    with comfy(tmp_path / "comfyui") as process:
        app = create_app(load(environment(tmp_path, process), None))
        async with house(app) as service:
            await service.connected()
            body = {"prompt": "x", "steps": 1, "checkpoint": "fresh.safetensors"}
            found = problem(await service.client.post(f"{GENERATE}/txt2img", json=body), 422)
            assert found["errors"][0]["allowed"] == ["simulated.safetensors"]
            folder = process.directory / "models" / "checkpoints"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "fresh.safetensors").write_bytes(b"x")
            reply = await service.client.post(f"{GENERATE}/txt2img?wait=20", json=body)
            assert (reply.status_code, reply.json()["status"]) == (200, "completed"), reply.text


async def test_work_goes_to_the_backend_that_has_the_model(tmp_path: Path) -> None:
    with comfy(tmp_path / "one") as one, comfy(tmp_path / "two") as two:
        for process, name in ((one, "one.safetensors"), (two, "two.safetensors")):
            folder = process.directory / "models" / "checkpoints"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"x")
        backends = f"one={one.url},two={two.url}"
        app = create_app(load(environment(tmp_path, COMFYUI_BACKENDS=backends), None))
        async with house(app) as service:
            await service.connected("one", "two")
            for wanted in ("two", "one", "two", "two"):
                body = {"prompt": "x", "steps": 1, "checkpoint": f"{wanted}.safetensors"}
                reply = await service.client.post(f"{GENERATE}/txt2img?wait=20", json=body)
                assert (reply.json()["status"], reply.json()["backend"]) == ("completed", wanted), reply.text
            found = problem(await service.client.post(f"{GENERATE}/txt2img?gpu=one", json=body), 422)
            assert found["errors"][0]["allowed"] == ["one.safetensors"]


async def test_work_is_taken_while_comfyui_is_away(tmp_path: Path, simulator: Comfy) -> None:
    app = create_app(load(environment(tmp_path), None))
    async with house(app) as service:
        reply = await service.client.post(f"{GENERATE}/demo", json={"color": "#010203"})
        assert reply.status_code == 202
        assert problem(await service.client.post(f"{GENERATE}/demo", json={"width": 4096}), 422)
    async with house(create_app(load(environment(tmp_path, simulator), None))) as later:
        ended = await later.ended(reply.json()["workflowId"])
        assert ended["status"] == "completed"
        assert json.dumps(ended["template"]) == '"demo"'
