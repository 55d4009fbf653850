"""What can be saved, and what cannot: the finding names the field, the node and the nearest names."""

from __future__ import annotations

import json
from typing import Any

import pytest

from managers.templates.check import check
from managers.templates.model import is_alias, is_name, split_reference
from tests.templates.kit import CATALOG, definition

GRAPH = {
    "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 512, "batch_size": 1}},
    "12": {"class_type": "SaveImage", "inputs": {"images": ["4", 0], "filename_prefix": "x"}},
}


def found(graph: Any = GRAPH, **inputs: Any) -> dict[str, Any]:
    one = definition(graph, **inputs)
    return {finding.pointer: finding for finding in check(one, json.loads(bytes(one.graph)), [CATALOG])}


@pytest.mark.parametrize(
    ("given", "pointer", "code", "words"),
    [
        ({"node": "5", "input": "width"}, "/inputs/p/node", "unknown_node", "EmptyLatentImage (4)"),
        ({"node": "4", "input": "widht"}, "/inputs/p/input", "unknown_input", "perhaps 'width'"),
        ({"node": "12", "input": "images"}, "/inputs/p/input", "input_is_linked", "linked to node 4"),
        ({"node": "4", "input": "width", "type": "string"}, "/inputs/p/type", "type_mismatch", "takes INT"),
        ({"node": "4", "input": "width", "default": 8}, "/inputs/p/default", "value_smaller_than_min", "least is 16"),
        ({"node": "4", "input": "width", "minimum": 20000}, "/inputs/p", "empty_range", "nothing lies between"),
        ({"node": "4", "input": "width", "minimum": 16.5}, "/inputs/p/minimum", "invalid_value", "whole number"),
        (
            {"node": "4", "input": "width", "enum": [64, "x"]},
            "/inputs/p/enum/1",
            "invalid_type",
            "not a whole number",
        ),
        (
            {"node": "4", "input": "width", "also": [{"node": "4", "input": "hight"}]},
            "/inputs/p/also/0/input",
            "unknown_input",
            "perhaps 'height'",
        ),
    ],
)
def test_a_mistake_is_shown_where_it_is(given: dict[str, Any], pointer: str, code: str, words: str) -> None:
    told = found(p=given)
    assert list(told) == [pointer]
    assert told[pointer].code == code
    assert words in told[pointer].message
    assert told[pointer].node_id


@pytest.mark.parametrize(
    ("graph", "code", "pointer"),
    [
        ({"nodes": [], "links": []}, "workflow_format_ui", "/graph"),
        ({}, "workflow_empty", "/graph"),
        ({"1": {"class_type": "EmptyImage"}}, "inputs_missing", "/graph/1/inputs"),
    ],
)
def test_what_is_no_graph_is_told(graph: Any, code: str, pointer: str) -> None:
    assert [(one.code, at) for at, one in found(graph).items()] == [(code, pointer)]


def test_what_may_come_is_no_mistake() -> None:
    graph = {"1": {"class_type": "NotInstalledYet", "inputs": {"model": "gone.safetensors"}}}
    assert found(graph, p={"node": "1", "input": "model"}) == {}
    assert found(graph, p={"node": "1", "input": "model", "default": "other.safetensors"}) == {}


def test_names() -> None:
    assert [is_name(name) for name in ("txt2img", "a-b", "propose", "A", "", "a_b", "-a", "a\n", "x" * 65)] == [
        *(True, True, False, False, False, False, False, False, False)
    ]
    assert [is_alias(name) for name in ("prod", "1", "p-1", "")] == [True, False, True, False]
    assert split_reference("a@prod") == ("a", "prod")
    assert split_reference("a") == ("a", None)
    assert split_reference("@") == ("@", None)
