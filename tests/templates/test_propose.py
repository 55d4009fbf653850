"""What is proposed for graphs that people have, and that it can be saved and used as it is."""

from __future__ import annotations

import json
from typing import Any

import pytest

from managers.comfyui.graph import parse_graph
from managers.comfyui.validation import validate
from managers.templates.propose import propose
from tests.graphs import CATALOG as RECORDED
from tests.queue_kit import House
from tests.recordings import DATA
from tests.templates.kit import CATALOG, boxed
from tests.templates.test_registry import problem, save

BOXED = boxed()
PROPOSE = "/v1/templates/propose"
RUNS = [
    *("animated_outputs", "async_nodes", "empty_save", "image_ops_batch", "preview_and_save", "preview_temp"),
    *("slow_multi_node", "slow_steps_preview", "subgraph_expand", "text_outputs"),
]


def graph_of(name: str) -> Any:
    return json.loads((DATA / "workflows" / f"{name}.json").read_text())


def names(graph: Any) -> dict[str, tuple[str, str]]:
    proposed = propose(parse_graph(graph), [CATALOG])
    return {name: (given.node, given.input) for name, given in proposed.items()}


@pytest.mark.parametrize("name", sorted(BOXED))
def test_of_the_box_it_finds_what_the_box_has(name: str) -> None:
    """The same places under the same names, but for those that are ours alone."""
    one = BOXED[name]
    found = names(json.loads(bytes(one.graph)))
    ours = {name: (given.node, given.input) for name, given in one.inputs.items()}
    apart = {"start", "end", "mask_channel", "strength", "model"}
    assert {name: place for name, place in ours.items() if name not in apart}.items() <= found.items()
    assert {place for name, place in ours.items() if name in ("strength", "model")} <= set(found.values())


def test_the_links_say_which_text_is_the_negative_one() -> None:
    graph = json.loads(bytes(BOXED["controlnet"].graph))
    graph["2"]["_meta"], graph["3"]["_meta"] = {"title": "Text"}, {"title": "Text"}
    assert names(graph)["prompt"] == ("2", "text")
    assert names(graph)["negative_prompt"] == ("3", "text"), "through the node that has both"


def test_titles_become_descriptions_and_names() -> None:
    graph = json.loads(bytes(BOXED["txt2img"].graph))
    graph["2"]["_meta"] = {"title": "Scenery"}
    graph["9"] = {
        "class_type": "CLIPTextEncode",
        "inputs": {"text": "in oil", "clip": ["1", 1]},
        "_meta": {"title": "Style of it!"},
    }
    graph["8"] = {
        "class_type": "KSampler",
        "inputs": {**graph["5"]["inputs"], "positive": ["9", 0], "seed": 0, "steps": 5},
        "_meta": {"title": "Second pass"},
    }
    proposed = propose(parse_graph(graph), [CATALOG])
    assert proposed["prompt"].description == "Scenery: What to draw."
    assert (proposed["prompt_style_of_it"].node, proposed["prompt_style_of_it"].description) == (
        "9",
        "Style of it!: What to draw.",
    )
    assert proposed["steps_second_pass"].node == "8"
    assert [place.node for place in proposed["seed"].also] == ["8"], "equal ones are one parameter"
    assert list(proposed)[:3] == ["prompt", "prompt_style_of_it", "negative_prompt"]


@pytest.mark.parametrize("name", RUNS)
async def test_what_is_proposed_can_be_saved_and_used(name: str, service: House) -> None:
    graph = graph_of(name)
    reply = await service.client.post(PROPOSE, json={"graph": graph})
    assert reply.status_code == 200, reply.text
    inputs = reply.json()["inputs"]
    missing = [one for one in validate(graph, [RECORDED]).findings if one.severity == "error"]
    assert not missing
    await save(service, "proposed", {"graph": graph, "inputs": inputs})
    made = await service.client.post("/v1/generate/proposed", json={})
    if (needed := (await service.client.get("/v1/templates/proposed")).json()["missing"]) or made.status_code == 422:
        assert needed
        assert {one["classType"] for one in problem(made, 422)["errors"]} == set(needed)
        return
    assert made.status_code == 202, made.text
    assert set(made.json()["parameters"]) == set(inputs)
    filled = (await service.get(made.json()["workflowId"], include="workflow"))["workflow"]
    same = {
        node_id: {key: value for key, value in node["inputs"].items() if key not in ("seed", "noise_seed")}
        for node_id, node in filled.items()
    }
    assert same == {
        node_id: {key: value for key, value in node["inputs"].items() if key not in ("seed", "noise_seed")}
        for node_id, node in graph.items()
    }, "the defaults are what the graph has, but for seeds"
    if name.startswith("slow"):
        await service.cancel(made.json()["workflowId"])


async def test_what_is_no_graph_has_no_proposal(service: House) -> None:
    found = problem(await service.client.post(PROPOSE, json={"graph": {"nodes": [], "links": []}}), 400)
    assert found["errors"][0]["code"] == "workflow_format_ui"
    assert problem(await service.client.post(PROPOSE, json={"graph": {"1": {}}}), 422)
    assert problem(await service.client.post(PROPOSE, json={}), 400)
    assert problem(await service.client.put(PROPOSE, json={"graph": {}}), 405), "no template is called so"
