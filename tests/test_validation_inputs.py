"""Each input of a node, as ComfyUI 0.3.64 takes it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from managers.comfyui.object_info import Catalog, read_object_info
from managers.comfyui.validation import validate
from tests.graphs import (
    CATALOG,
    EMPTY_IMAGE,
    INFO,
    LOAD_IMAGE,
    WORKFLOWS,
    info_of,
    save,
    the_one,
)


def check(spec: list[Any], value: object) -> list[str]:
    graph = {
        "p": {"class_type": "Probe", "inputs": {"x": value}},
        "1": EMPTY_IMAGE,
        "2": LOAD_IMAGE,
        "3": {"class_type": "PrimitiveString", "inputs": {"value": "a"}},
        "4": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
    }
    return [finding.code for finding in validate(graph, [Catalog("local", info_of(x=spec))]).findings]


COUNT = ["INT", {"min": 1, "max": 10, "forceInput": True}]
CHOICE = [["red", "green", 3], {}]
V3_CHOICE = ["COMBO", {"options": ["red", "green"]}]
UPLOAD = [["probe-input.png"], {"image_upload": True}]


@pytest.mark.parametrize(
    ("spec", "value", "code"),
    [
        (COUNT, 5, None),
        (COUNT, "5", None),
        (COUNT, 5.9, None),
        (COUNT, True, None),
        (COUNT, {"__value__": 5}, None),
        (COUNT, "5.0", "invalid_input_type"),
        (COUNT, "five", "invalid_input_type"),
        (COUNT, None, "invalid_input_type"),
        (COUNT, {}, "invalid_input_type"),
        (COUNT, float("inf"), "invalid_input_type"),
        (COUNT, "9" * 5000, "invalid_input_type"),
        (COUNT, 0, "value_smaller_than_min"),
        (COUNT, "11", "value_bigger_than_max"),
        (COUNT, 10**400, "value_bigger_than_max"),
        (COUNT, [5], "bad_linked_input"),
        (COUNT, [1, 0], "bad_linked_input"),
        (["FLOAT", {"min": 0.5}], "0.75", None),
        (["FLOAT", {"min": 0.5}], 10**400, "invalid_input_type"),
        (["FLOAT", {"min": 0.5}], 0, "value_smaller_than_min"),
        (["STRING", {}], 5, None),
        (["STRING", {}], None, None),
        (["BOOLEAN", {}], "anything", None),
        (["INT,FLOAT", {"max": 3}], 2, None),
        (["INT,FLOAT", {"max": 3}], 4, "value_bigger_than_max"),
        (CHOICE, "red", None),
        (CHOICE, 3, None),
        (CHOICE, "blue", "value_not_in_list"),
        (CHOICE, {"a": 1}, "value_not_in_list"),
        (V3_CHOICE, "green", None),
        (V3_CHOICE, "blue", "value_not_in_list"),
        (V3_CHOICE, ["red"], "bad_linked_input"),
        (["COMBO", {"options": ["red", "green"], "multiselect": True}], {"__value__": ["red", "green"]}, None),
        (["COMBO", {"options": ["red"], "multiselect": True}], ["red", "blue"], "value_not_in_list"),
        (["COMBO", {"remote": {"route": "/x"}}], "whatever", None),
        (["COMBO", {"options": ["a"], "remote": {"route": "/x"}}], "whatever", None),
        (UPLOAD, "probe-input.png", None),
        (UPLOAD, "jobs/0001/probe-input.png", None),
        (UPLOAD, "x_00001_.png [output]", None),
        (UPLOAD, "other.png", "input_file_missing"),
        (UPLOAD, None, "invalid_input_type"),
        (["IMAGE"], ["1", 0], None),
        (["IMAGE"], ["1", -1], None),
        (["IMAGE"], ["1", False], None),
        (["IMAGE"], ["1", 1], "slot_out_of_range"),
        (["IMAGE"], ["1", -2], "slot_out_of_range"),
        (["IMAGE"], ["1", 0.0], "slot_out_of_range"),
        (["IMAGE"], ["2", 1], "return_type_mismatch"),
        (["IMAGE"], "a.png", "link_expected"),
        (["IMAGE"], None, "link_expected"),
        (["*"], ["1", 0], None),
        (["IMAGE,MASK"], ["2", 1], None),
        (["LATENT, MASK"], ["2", 1], None),
        (["LATENT"], ["2", 1], "return_type_mismatch"),
        (CHOICE, ["3", 0], "return_type_mismatch"),
        (["COMFY_MATCHTYPE_V3", {}], ["1", 0], None),
        (["CUSTOM_WIDGET", {}], {"any": "thing"}, None),
    ],
)
def test_inputs_as_comfyui_takes_them(spec: list[Any], value: object, code: str | None) -> None:
    assert check(spec, value) == ([code] if code else [])


def test_list_outputs_fit_list_inputs() -> None:
    info = {**INFO, **read_object_info({"Pick": {"input": {}, "output": [["a", "b"]], "output_node": False}})}
    graph = {
        "1": {"class_type": "Pick", "inputs": {}},
        "2": {"class_type": "Probe", "inputs": {"x": ["1", 0]}},
    }
    probe = read_object_info({"Probe": {"input": {"required": {"x": V3_CHOICE}}, "output_node": True}})
    assert validate(graph, [Catalog("local", {**info, **probe})]).findings == ()


def test_missing_inputs_and_what_was_meant() -> None:
    declared = {
        "input": {
            "required": {"steps": COUNT, "grow": ["COMFY_AUTOGROW_V3", {}]},
            "optional": {"mask": ["MASK"]},
            "hidden": {"unique_id": "UNIQUE_ID"},
        },
        "output_node": True,
    }
    catalog = Catalog("local", read_object_info({"Probe": declared}))
    finding = the_one(validate({"1": {"class_type": "Probe", "inputs": {"step": 3, "mask": None}}}, [catalog]))
    assert (finding.code, finding.input, finding.pointer) == (
        "required_input_missing",
        "steps",
        "/workflow/1/inputs/steps",
    )
    assert finding.allowed == {"min": 1, "max": 10}
    assert "'step'" in finding.message


def test_list_values_come_with_what_is_allowed_and_what_is_near() -> None:
    graph = json.loads(json.dumps(WORKFLOWS["invalid_value_not_in_list"]))
    graph["1"]["inputs"]["ckpt_name"] = "sdxl_base_1.0.safetensors"
    finding = the_one(validate(graph, [CATALOG]))
    assert finding.suggestions[0] == "sdxl-base-1.0.safetensors"
    assert finding.allowed == ["sd15.safetensors", "sdxl-base-1.0.safetensors"]
    assert "sdxl-base-1.0.safetensors" in finding.message


@pytest.mark.parametrize(
    ("written", "meant"),
    [("KSamplr", "KSampler"), ("KSAMPLER", "KSampler"), ("Load Checkpoint", "CheckpointLoaderSimple")],
)
def test_the_nearest_class(written: str, meant: str) -> None:
    graph = {"1": EMPTY_IMAGE, "2": save(["1", 0]), "3": {"class_type": written, "inputs": {}}}
    finding = the_one(validate(graph, [CATALOG]))
    # ComfyUI refuses the whole prompt for it, though nothing needs the node.
    assert (finding.code, finding.severity) == ("missing_node_type", "error")
    assert finding.suggestions[0] == meant
    assert finding.pointer == "/workflow/3/class_type"
