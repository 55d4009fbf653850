"""The live description: one operation for each template, as they come and go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import jsonschema  # type: ignore[import-untyped]
import msgspec
from openapi_spec_validator import validate

from management_api.app import create_app
from management_api.settings import load
from tests.queue_kit import Comfy, House, environment, house
from tests.templates.test_registry import BOX, save, tile


async def described(service: House) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=service.url) as nobody:  # it is open
        reply = await nobody.get("/docs/json")
    found: dict[str, Any] = reply.json()
    return found


def templates(document: dict[str, Any]) -> list[str]:
    return sorted(
        path.removeprefix("/v1/generate/")
        for path in document["paths"]
        if path.startswith("/v1/generate/") and "{" not in path
    )


async def test_each_template_has_its_operation_at_once(service: House) -> None:
    assert templates(await described(service)) == BOX
    await save(service, "tile", tile(maximum=99))
    document = await described(service)
    assert templates(document) == sorted([*BOX, "tile"])
    operation = document["paths"]["/v1/generate/tile"]["post"]
    assert operation["operationId"] == "generate_tile"
    assert operation["description"].startswith("A tile: tile.")
    content = operation["requestBody"]["content"]["application/json"]
    assert content["schema"]["properties"]["width"]["maximum"] == 99
    jsonschema.Draft202012Validator(content["schema"]).validate(content["example"])
    assert [one["name"] for one in operation["parameters"] if one["in"] == "path"] == []
    yaml = await service.client.get("/docs/yaml")
    assert msgspec.yaml.decode(yaml.content) == document

    await save(service, "tile", tile(maximum=50))
    document = await described(service)
    changed = document["paths"]["/v1/generate/tile"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert changed["properties"]["width"]["maximum"] == 50
    await service.client.delete("/v1/templates/tile")
    assert templates(await described(service)) == BOX


async def test_it_stays_a_valid_description(service: House) -> None:
    odd = tile("x: 'y' # \"z\" 1e-5\n\n- é", minimum=1e1, default=16)
    odd["inputs"]["strength"] = {"node": "1", "input": "batch_size", "minimum": 1, "description": "é: #1\n"}
    await save(service, "odd", odd)
    document = await described(service)
    validate(document)
    names = [operation["operationId"] for item in document["paths"].values() for operation in item.values()]
    assert len(names) == len(set(names))
    assert msgspec.yaml.decode((await service.client.get("/docs/yaml")).content) == document


async def test_the_ranges_are_those_of_comfyui_once_it_is_there(tmp_path: Path, simulator: Comfy) -> None:
    app = create_app(load(environment(tmp_path, simulator), None))
    async with house(app) as service:
        await service.connected()
        await service.client.get("/v1/templates")  # somebody has asked it by now
        body = (await described(service))["paths"]["/v1/generate/txt2img"]["post"]["requestBody"]
        properties = body["content"]["application/json"]["schema"]["properties"]
        assert properties["steps"]["minimum"] == 1
        assert "euler" in properties["sampler"]["enum"]
        assert body["required"] is True


async def test_it_does_not_tell_everybody_what_lies_on_the_machines(tmp_path: Path, simulator: Comfy) -> None:
    (simulator.directory / "input").mkdir(exist_ok=True)
    (simulator.directory / "input" / "private-lamp.png").write_bytes(b"x")
    app = create_app(load(environment(tmp_path, simulator), None))
    async with house(app) as service:
        await service.connected()
        await service.client.get("/v1/templates")
        for path in ("/docs/json", "/docs/yaml"):
            text = (await service.client.get(path)).text
            assert "euler" in text
            assert "private-lamp" not in text
            assert "simulated.safetensors" not in text
        told = (await service.client.get("/v1/templates/img2img/schema")).text
        assert "private-lamp" in told
        assert "simulated.safetensors" in told
