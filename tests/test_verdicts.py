"""Every recorded workflow ends in the right verdict, with the right outputs, on the simulator.

With COMFYUI_CONFORMANCE_URL set, on the real ComfyUI there (and then those too whose nodes the simulator has not);
COMFYUI_CONFORMANCE_OUTPUT names its output folder, where it is on this machine.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec import Struct
from PIL import Image

from tests.queue_kit import PATH, Comfy, Graph, House, Queue, Site, View, comfy, workflow

REAL = os.environ.get("COMFYUI_CONFORMANCE_URL")
REAL_OUTPUT = os.environ.get("COMFYUI_CONFORMANCE_OUTPUT")


class Case(Struct, frozen=True):
    """`outputs`: (kind, type, node) of each. `ours`: failed before ComfyUI is asked.

    `codes`: of the findings; `strict`: of those that strict handling tells, where ComfyUI words it otherwise.
    """

    status: str
    outputs: tuple[tuple[str, str | None, str], ...] = ()
    error_type: str | None = None
    codes: tuple[str, ...] = ()
    strict: tuple[str, ...] = ()
    ours: bool = False
    attempts: int = 1
    needs: str = ""
    slow: bool = False


def image(node: str, folder: str = "output") -> tuple[str, str, str]:
    return ("image", folder, node)


def text(node: str) -> tuple[str, None, str]:
    return ("text", None, node)


def refused(*codes: str) -> Case:
    """Accepted with a warning; ComfyUI's answer at its turn is the verdict."""
    return Case("failed", error_type="validation", codes=codes)


def hopeless(*codes: str) -> Case:
    """No ComfyUI could run it: we fail it at once."""
    return Case("failed", error_type="validation", codes=codes, ours=True, attempts=0)


CASES = {
    "empty_save": Case("completed", (image("2"),)),
    "image_ops_batch": Case("completed", (image("8"), image("8"), image("8"))),
    "load_invert_save": Case("completed", (image("3"),)),
    "preview_temp": Case("completed", (image("2", "temp"),)),
    "preview_and_save": Case("completed", (image("3", "temp"), image("4"))),
    "text_outputs": Case("completed", (text("2"), text("3"))),
    "websocket_image": Case("completed"),  # its pictures exist only as frames of the socket
    "subgraph_expand": Case("completed", (image("3"),)),
    "async_nodes": Case("completed", (image("5"),)),
    "slow_multi_node": Case("completed", (image("6", "temp"), image("7"))),
    "slow_steps_preview": Case("completed", (image("4"),)),
    "preview_flood": Case("completed", (image("3", "temp"),), slow=True),
    "deaf_sleep": Case("completed", (image("4"),), slow=True),
    "execution_blocked": Case("completed", (image("4", "temp"),), codes=("execution_blocked",)),
    "fail_value_error": Case("failed", (image("4", "temp"),), error_type="node"),
    "fail_oom_runtime": Case("failed", error_type="oom", attempts=2),
    "fail_oom_torch": Case("failed", error_type="oom", attempts=2),
    "invalid_no_outputs": hopeless("prompt_no_outputs"),
    "invalid_node_type": hopeless("missing_node_type"),
    "invalid_missing_class_type": hopeless("class_type_missing"),
    "invalid_cycle": hopeless("dependency_cycle"),
    "poison_unvalidated_node": hopeless("inputs_missing"),
    "invalid_bad_link": hopeless("link_to_missing_node"),
    "invalid_missing_required_input": refused("required_input_missing"),
    "invalid_out_of_range": refused("value_bigger_than_max"),
    "invalid_type_mismatch": refused("return_type_mismatch"),
    "invalid_value_not_in_list": refused("value_not_in_list"),
    "invalid_missing_input_file": Case("failed", error_type="validation", strict=("input_file_missing",),
                                       codes=("input_file_missing", "custom_validation_failed")),
    "partial_one_output_invalid": refused("required_input_missing"),
    "animated_outputs": Case("completed", (("video", "output", "4"), ("video", "output", "5")),
                             needs="animated formats"),
    "audio_outputs": Case("completed", (("audio", "output", "2"), ("audio", "output", "3"), ("audio", "temp", "4")),
                          needs="audio nodes"),
    "latent_output": Case("completed", (("latent", "output", "2"),), needs="SaveLatent"),
    "video_outputs": Case("completed", (("video", "output", "4"), ("video", "output", "5")), needs="video nodes"),
    # It shows a file that nobody has made.
    "preview_3d": Case("completed", (("3d", "output", "1"),), codes=("output_missing",), needs="3D nodes"),
}  # fmt: skip
PARTIAL = "partial_one_output_invalid"
ELSEWHERE = {
    "long_sleep": "test_workflows and test_dispatch stop sleepers",
    "crash_hard_exit": "faults/test_comfyui_death",
}


def names() -> list[Any]:
    found = []
    for name, case in CASES.items():
        marks = [pytest.mark.slow] if case.slow else []
        if case.needs and not REAL:
            marks.append(pytest.mark.skip(reason=f"the simulator has no {case.needs.removeprefix('no ')}"))
        found.append(pytest.param(name, marks=marks, id=name))
    return found


def test_no_recorded_workflow_is_forgotten() -> None:
    folder = Path(__file__).parent / "data" / "workflows"
    recorded = {path.stem for path in folder.glob("*.json") if not path.stem.startswith("_")}
    assert recorded == CASES.keys() | ELSEWHERE.keys()


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy | None]:
    if REAL:
        yield None
        return
    with comfy(tmp_path_factory.mktemp("comfyui")) as process:
        yield process


@pytest.fixture(scope="module")
def url(simulator: Comfy | None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where ComfyUI is, with the picture that load_invert_save reads."""
    where = REAL or (simulator.url if simulator else "")
    path = tmp_path_factory.mktemp("input") / "probe-input.png"
    Image.new("RGB", (64, 64), (10, 60, 160)).save(path)
    with httpx.Client(base_url=where, timeout=10, trust_env=False) as client:
        files = {"image": (path.name, path.read_bytes(), "image/png")}
        client.post("/upload/image", files=files, data={"overwrite": "true"}).raise_for_status()
    return where


@pytest.fixture(scope="module")
def site(url: str, simulator: Comfy | None, tmp_path_factory: pytest.TempPathFactory) -> Site:
    output = (REAL_OUTPUT or "") if REAL else str(simulator.outputs) if simulator else ""
    return Site(tmp_path_factory.mktemp("site"), COMFYUI_URL=url, COMFYUI_OUTPUTS=output)  # empty counts as unset


@pytest.fixture
async def queue(site: Site) -> AsyncIterator[House]:
    async with site.fresh() as service:
        await service.connected()
        yield service


async def run_uncached(queue: Queue, graph: Graph, name: str, url: str) -> View:
    """Run it with nothing in the cache: a real server may have it from an earlier session."""
    async with httpx.AsyncClient(base_url=url, timeout=10, trust_env=False) as client:
        (await client.post("/free", json={"unload_models": True, "free_memory": True})).raise_for_status()
    reply = await queue.post(graph, headers={"prefer": "wait=30"}, metadata={"case": name})
    assert reply.status_code in (200, 202), reply.text
    return await queue.ended(reply.json()["workflowId"])


@pytest.mark.parametrize("name", names())
async def test_verdict(queue: House, url: str, name: str) -> None:
    case, graph = CASES[name], workflow(name)
    view = await run_uncached(queue, graph, name, url)
    assert (view["status"], view["errorType"], view["attempt"]) == (case.status, case.error_type, case.attempts), view
    assert sorted((one["kind"], one.get("type"), one["nodeId"]) for one in view["outputs"]) == sorted(case.outputs)
    assert {finding["code"] for finding in view["errors"]} == set(case.codes), view["errors"]
    completed = case.status == "completed"
    assert (view["error"] is None) == completed
    assert (view["progress"] == 100) == completed
    assert view["completionTime"] is not None
    assert view["outputsReused"] is False
    if completed:
        assert view["nodes"]["done"] == view["nodes"]["total"] > 0
    if name == PARTIAL:
        pass  # taken in part, it may have begun before it could be withdrawn
    elif case.error_type == "validation":
        assert view["startTime"] is None
    else:
        assert view["startTime"] <= view["completionTime"]
    for output in view["outputs"]:
        await check(queue, output)
    # The tidy end: nothing of it is left in ComfyUI.
    async with httpx.AsyncClient(base_url=url, timeout=10, trust_env=False) as client:
        left = (await client.get("/queue")).json()
    assert view["promptId"] not in [item[1] for item in left["queue_running"] + left["queue_pending"]]


async def check(queue: Queue, output: dict[str, Any]) -> None:
    """The output is there, and is what it says."""
    if output["kind"] == "text":
        assert output["text"]
        return
    reply = await queue.client.get(output["url"])
    if output["kind"] == "3d":
        assert (reply.status_code, "size" in output) == (404, False)
        return
    assert reply.status_code == 200, (output, reply.text)
    assert len(reply.content) == output["size"] > 0
    assert reply.headers["content-type"].partition(";")[0] == output["contentType"]
    if output["contentType"] == "image/png":
        assert reply.content.startswith(b"\x89PNG")


@pytest.mark.parametrize("name", names())
async def test_what_strict_handling_says(queue: House, name: str) -> None:
    """Strict refuses exactly what does not get through lenient handling, and stores nothing."""
    case = CASES[name]
    reply = await queue.client.post(
        PATH, json={"workflow": workflow(name)}, params={"dryRun": "true"}, headers={"prefer": "handling=strict"}
    )
    assert reply.status_code == 200
    assert reply.json()["valid"] == (case.error_type != "validation")
    if case.error_type == "validation":
        strict = await queue.post(workflow(name), headers={"prefer": "handling=strict"})
        assert strict.status_code == 422, strict.text
        findings = strict.json()["errors"]
        assert {finding["code"] for finding in findings} == set(case.strict or case.codes)
        assert all(finding["pointer"].startswith("/workflow") for finding in findings)
    assert (await queue.list())["workflows"] == []
