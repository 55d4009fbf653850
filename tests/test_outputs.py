"""Outputs of runs as clients fetch them: from the folder on this machine, and through a backend's /view."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving import Service, StartService
from tests.simulator_process import simulator

SUBMIT = "/v1/comfyui/workflow"


def picture(color: int, prefix: str = "bound/img") -> dict[str, Any]:
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": color}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": prefix}},
        "3": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
        "4": {"class_type": "ProbeText", "inputs": {"text": f"colour {color}"}},
    }


@pytest.fixture(params=["local", "remote"])
async def running(request: pytest.FixtureRequest, tmp_path: Path, start_service: StartService) -> Any:
    """The service before a simulator whose folder it shares, or does not."""
    with simulator(tmp_path / "sim") as (url, _):
        folder = tmp_path / "sim" / "output" if request.param == "local" else tmp_path / "elsewhere"
        yield await start_service(COMFYUI_URL=url, COMFYUI_OUTPUTS=str(folder))


async def run(client: httpx.AsyncClient, graph: dict[str, Any]) -> dict[str, Any]:
    reply = await client.post(SUBMIT, json={"workflow": graph}, headers={"Prefer": "wait=20"})
    assert reply.status_code == 200, reply.text
    workflow: dict[str, Any] = reply.json()
    assert workflow["status"] == "completed", workflow
    return workflow


def of_kind(workflow: dict[str, Any], kind: str, folder: str | None = None) -> dict[str, Any]:
    [found] = [one for one in workflow["outputs"] if one["kind"] == kind and one.get("type") == folder]
    return dict(found)


async def test_every_output_of_a_run_can_be_fetched(running: Service) -> None:
    workflow = await run(running.client, picture(0x102030))
    for folder in ("output", "temp"):
        output = of_kind(workflow, "image", folder)
        reply = await running.client.get(output["url"])
        assert (reply.status_code, reply.headers["content-type"]) == (200, "image/png")
        assert reply.content.startswith(b"\x89PNG")
        assert len(reply.content) == output["size"]
        assert reply.headers["etag"].strip('"') == output["etag"]
    text = of_kind(workflow, "text")
    assert text["text"] == "colour 1056816"
    n = workflow["outputs"].index(text)
    assert (await running.client.get(f"{SUBMIT}/{workflow['workflowId']}/outputs/{n}")).text == "colour 1056816"


async def test_ranges_conditions_and_head(running: Service) -> None:
    output = of_kind(await run(running.client, picture(0x112233)), "image", "output")
    whole = (await running.client.get(output["url"])).content
    part = await running.client.get(output["url"], headers={"Range": "bytes=4-11"})
    assert (part.status_code, part.content) == (206, whole[4:12])
    assert part.headers["content-range"] == f"bytes 4-11/{len(whole)}"
    outside = await running.client.get(output["url"], headers={"Range": f"bytes={len(whole)}-"})
    assert (outside.status_code, outside.headers["content-range"]) == (416, f"bytes */{len(whole)}")
    known = await running.client.get(output["url"], headers={"If-None-Match": f'"{output["etag"]}"'})
    assert (known.status_code, known.content) == (304, b"")
    head = await running.client.head(output["url"])
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(len(whole)))


async def test_other_bytes_under_the_same_name_are_gone(running: Service, tmp_path: Path) -> None:
    output = of_kind(await run(running.client, picture(0x445566)), "image", "output")
    place = tmp_path / "sim" / "output" / output["subfolder"] / output["filename"]
    place.write_bytes(place.read_bytes() + b"x")
    reply = await running.client.get(output["url"])
    assert (reply.status_code, reply.headers["content-type"]) == (410, "application/problem+json")
    place.unlink()
    assert (await running.client.get(output["url"])).status_code == 404


async def test_what_is_not_an_output_is_not_found(running: Service) -> None:
    workflow = await run(running.client, picture(0x778899))
    base = f"{SUBMIT}/{workflow['workflowId']}/outputs"
    for path in (f"{base}/99", f"{base}/-1", f"{base}/x", f"{SUBMIT}/{'0' * 36}/outputs/0", f"{SUBMIT}/x/outputs/0"):
        assert (await running.client.get(path)).status_code == 404, path


async def test_by_backend_and_folder(running: Service) -> None:
    output = of_kind(await run(running.client, picture(0x99AABB)), "image", "temp")
    path = "/v1/comfyui/output/" + "/".join(filter(None, (output["subfolder"], output["filename"])))
    reply = await running.client.get(path, params={"backend": "local", "type": "temp"})
    assert (reply.status_code, len(reply.content)) == (200, output["size"])
    unknown = await running.client.get(path, params={"backend": "nobody"})
    assert (unknown.status_code, "local" in unknown.json()["message"]) == (400, True)
    assert (await running.client.get(path, params={"type": "secret"})).status_code == 400
    for bad in ("%2e%2e/%2e%2e/etc/passwd", "..%2f..%2fetc%2fpasswd", "%2fetc%2fpasswd", "x%00.png"):
        reply = await running.client.get(f"/v1/comfyui/output/{bad}", params={"backend": "local", "type": "temp"})
        assert reply.status_code == 404, bad


async def test_a_page_of_somebody_is_never_shown_as_ours(running: Service, tmp_path: Path) -> None:
    folder = tmp_path / "sim" / "output"
    folder.mkdir(exist_ok=True)
    (folder / "x.html").write_text("<script>alert(1)</script>")
    reply = await running.client.get("/v1/comfyui/output/x.html", params={"backend": "local"})
    assert reply.status_code == 200
    assert reply.headers["content-disposition"].startswith("attachment")
    assert reply.headers["content-type"] == "application/octet-stream"
    assert reply.headers["x-content-type-options"] == "nosniff"


async def test_the_listing_knows_whose_file_it_is(tmp_path: Path, start_service: StartService) -> None:
    with simulator(tmp_path / "sim") as (url, _):
        outputs = tmp_path / "sim" / "output"
        service = await start_service(COMFYUI_URL=url, COMFYUI_OUTPUTS=str(outputs))
        workflow = await run(service.client, picture(0xABCDEF))
        (outputs / "stray.png").write_bytes(b"\x89PNG")
        os.utime(outputs / "stray.png", (1, 1))
        listed = (await service.client.get("/v1/comfyui/outputs")).json()["outputs"]
        assert [(one["subfolder"], one["workflowId"]) for one in listed] == [
            ("bound", workflow["workflowId"]),
            ("", "unknown"),
        ]
        mine = await service.client.get("/v1/comfyui/outputs", params={"workflowId": workflow["workflowId"]})
        assert [one["nodeId"] for one in mine.json()["outputs"]] == ["2"]
        assert (await service.client.get(listed[0]["url"])).content.startswith(b"\x89PNG")
