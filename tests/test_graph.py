"""The shape of a workflow: nodes, circles, outputs, and what is needed for them."""

from __future__ import annotations

from typing import Any

import pytest

from managers.comfyui.graph import REFUSED, ancestors, check_structure, find_cycles, parse_graph
from managers.comfyui.validation import Validation, validate
from tests.graphs import (
    AWAY,
    CATALOG,
    EMPTY_IMAGE,
    LOAD_IMAGE,
    codes,
    save,
    the_one,
)

# --- Shape


@pytest.mark.parametrize(
    ("value", "code", "pointer"),
    [
        (None, "workflow_not_an_object", "/workflow"),
        ([], "workflow_not_an_object", "/workflow"),
        ("graph", "workflow_not_an_object", "/workflow"),
        ({}, "workflow_empty", "/workflow"),
        ({"nodes": [], "links": [], "version": 0.4}, "workflow_format_ui", "/workflow"),
        ({"prompt": {"1": EMPTY_IMAGE}, "client_id": "x"}, "workflow_wrapped", "/workflow"),
        ({"1": EMPTY_IMAGE, "2": "x"}, "node_not_an_object", "/workflow/2"),
        ({"a/b~c": {"inputs": {}}}, "class_type_missing", "/workflow/a~1b~0c/class_type"),
        ({"1": {"class_type": 7, "inputs": {}}}, "class_type_missing", "/workflow/1/class_type"),
        ({"1": {"class_type": "SaveImage"}}, "inputs_missing", "/workflow/1/inputs"),
        ({"1": {"class_type": "SaveImage", "inputs": []}}, "inputs_missing", "/workflow/1/inputs"),
    ],
)
def test_broken_structure_is_an_error_whatever_backends_there_are(value: object, code: str, pointer: str) -> None:
    for catalogs in ([CATALOG], [AWAY], []):
        verdict = validate(value, catalogs)
        finding = the_one(verdict)
        assert (finding.code, finding.pointer, finding.severity) == (code, pointer, "error")
        assert verdict.fatal
        assert verdict.eligible == ()


def test_a_request_that_is_no_workflow_is_told_from_a_workflow_that_cannot_run() -> None:
    refused: list[object] = [None, {"nodes": [], "links": []}, {"prompt": {}}]
    for value in refused:
        assert check_structure(value)[0].code in REFUSED
    assert check_structure({"1": {}})[0].code not in REFUSED
    assert "Export (API)" in check_structure({"nodes": [], "links": []})[0].message


def test_a_node_named_prompt_is_a_node() -> None:
    assert check_structure({"prompt": EMPTY_IMAGE, "2": save(["prompt", 0])}) == []
    assert check_structure({"prompt": {"inputs": {}}})[0].code == "class_type_missing"


def test_limits() -> None:
    graph = {str(n): EMPTY_IMAGE for n in range(11)}
    assert check_structure(graph, max_nodes=11) == []
    assert check_structure(graph, max_nodes=10)[0].code == "workflow_too_large"
    nested: Any = {}
    for _ in range(5):
        nested = [nested]
    # workflow, node, inputs, five lists, the object within
    deep = {"1": {"class_type": "X", "inputs": {"x": nested}}}
    assert check_structure(deep, max_depth=9) == []
    assert check_structure(deep, max_depth=8)[0].code == "workflow_too_deep"


def test_extra_keys_and_extra_inputs_are_fine() -> None:
    graph = {
        "1": EMPTY_IMAGE | {"_meta": {"title": " My image "}, "is_changed": [1], "color": "#fff"},
        "2": save(["1", 0]) | {"_meta": 5},
    }
    graph["2"]["inputs"] |= {"speak_and_recognation": {"__value__": [False, True]}, "new": {"a": [1]}}
    assert validate(graph, [CATALOG]).findings == ()
    assert parse_graph(graph)["1"].title == "My image"


# --- Circles, outputs, reach


def test_a_circle_is_named_along_the_data() -> None:
    graph = {
        "a": {"class_type": "ImageInvert", "inputs": {"image": ["c", 0]}},
        "b": {"class_type": "ImageInvert", "inputs": {"image": ["a", 0]}},
        "c": {"class_type": "ImageInvert", "inputs": {"image": ["b", 0]}},
        "out": save(["c", 0]),
    }
    finding = the_one(validate(graph, [CATALOG]))
    assert finding.severity == "error"
    assert finding.message.endswith("ImageInvert (b) → ImageInvert (c) → ImageInvert (a) → ImageInvert (b).")
    (cycle,) = find_cycles(parse_graph(graph))
    for source, target in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
        assert graph[target]["inputs"]["image"] == [source, 0]


@pytest.mark.parametrize("link", [["2", 0], {"__value__": ["2", 0]}])
def test_a_circle_through_an_input_that_comfyui_does_not_check_is_found(link: object) -> None:
    graph = {"1": EMPTY_IMAGE, "2": save(["1", 0])}
    graph["2"]["inputs"]["extra"] = link
    assert codes(validate(graph, [CATALOG])) == {"dependency_cycle": "error"}


def test_a_circle_that_no_output_needs_is_a_warning() -> None:
    graph = {
        "1": EMPTY_IMAGE,
        "2": save(["1", 0]),
        "3": {"class_type": "ImageInvert", "inputs": {"image": ["3", 0]}},
    }
    verdict = validate(graph, [CATALOG])
    assert codes(verdict) == {"dependency_cycle": "warning"}
    assert verdict.eligible == ("local",)


def test_two_circles_and_a_diamond() -> None:
    def invert(*sources: str) -> dict[str, Any]:
        return {"class_type": "X", "inputs": {f"i{n}": [source, 0] for n, source in enumerate(sources)}}

    diamond = {"1": invert(), "2": invert("1"), "3": invert("1"), "4": invert("2", "3")}
    assert find_cycles(parse_graph(diamond)) == []
    twice = diamond | {"1": invert("2"), "5": invert("5")}
    assert {frozenset(cycle) for cycle in find_cycles(parse_graph(twice))} == {frozenset("12"), frozenset("5")}
    assert ancestors(parse_graph(diamond), ["3"]) == {"1", "3"}


def test_a_single_load_image_has_no_output() -> None:
    finding = the_one(validate({"1": LOAD_IMAGE}, [CATALOG]))
    assert (finding.code, finding.severity) == ("prompt_no_outputs", "error")
    # With no backend to ask, nobody knows: it is taken, and ComfyUI will say.
    assert validate({"1": LOAD_IMAGE}, [AWAY]) == Validation(eligible=("away",))


def test_what_no_output_needs_is_a_warning_at_most() -> None:
    graph = {
        "1": EMPTY_IMAGE,
        "2": save(["1", 0]),
        "3": {"class_type": "LoadImage", "inputs": {"image": "../../x.png"}},
        "4": {"class_type": "ImageInvert", "inputs": {"image": ["77", 0]}},
    }
    verdict = validate(graph, [CATALOG])
    assert set(codes(verdict).values()) == {"warning"}
    assert set(codes(verdict)) == {"unsafe_file_name", "link_to_missing_node"}


@pytest.mark.parametrize("link", [["nope", 0], {"__value__": ["nope", 0]}])
def test_a_link_to_nowhere_that_would_kill_the_worker_is_an_error(link: object) -> None:
    graph = {"1": EMPTY_IMAGE, "2": save(["1", 0])}
    graph["2"]["inputs"]["extra"] = link
    finding = the_one(validate(graph, [CATALOG]))
    assert (finding.code, finding.severity) == ("link_to_missing_node", "error")
    assert finding.pointer == "/workflow/2/inputs/extra"
