"""Validation against what a real ComfyUI 0.3.64 answered: its /object_info, and the verdicts it was recorded with."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from managers.comfyui.graph import REFUSED, ancestors, check_structure, find_cycles, parse_graph
from managers.comfyui.object_info import Catalog, NodeClass, ObjectInfo, decode_object_info, read_object_info
from managers.comfyui.rejection import findings_from_rejection, scrub
from managers.comfyui.validation import MAX_FINDINGS, Validation, concerned_classes, validate
from managers.events.types import Finding

DATA = Path(__file__).parent / "data"
INFO = decode_object_info((DATA / "object_info.json").read_bytes())
CATALOG = Catalog("local", INFO)
AWAY = Catalog("away", None)
WORKFLOWS = {
    path.stem: json.loads(path.read_text())
    for path in sorted((DATA / "workflows").glob("*.json"))
    if not path.name.startswith("_")
}

EMPTY_IMAGE = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}}
LOAD_IMAGE = {"class_type": "LoadImage", "inputs": {"image": "probe-input.png"}}


def save(source: object, prefix: object = "x") -> dict[str, Any]:
    return {"class_type": "SaveImage", "inputs": {"images": source, "filename_prefix": prefix}}


def recorded_prompts() -> Iterator[tuple[str, Any, int, Any]]:
    """Every POST /prompt of the transcripts: case, prompt, status, answer."""
    for path in sorted((DATA / "transcripts").glob("*.jsonl")):
        asked: dict[int, Any] = {}
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            if entry.get("path") != "/prompt" or entry.get("method") != "POST":
                continue
            if entry["dir"] == "http-request":
                asked[entry["id"]] = entry.get("body")
            elif "status" in entry and isinstance(body := asked.get(entry["id"]), dict) and "prompt" in body:
                yield path.stem, body["prompt"], entry["status"], entry.get("body")


def codes(verdict: Validation) -> dict[str, str]:
    return {finding.code: finding.severity for finding in verdict.findings}


def the_one(verdict: Validation) -> Finding:
    assert len(verdict.findings) == 1, verdict.findings
    return verdict.findings[0]


# --- What was recorded


INVALID = {
    "invalid_bad_link": ("link_to_missing_node", "error"),
    "invalid_cycle": ("dependency_cycle", "error"),
    "invalid_missing_class_type": ("class_type_missing", "error"),
    "invalid_missing_input_file": ("input_file_missing", "warning"),
    "invalid_missing_required_input": ("required_input_missing", "warning"),
    "invalid_no_outputs": ("prompt_no_outputs", "error"),
    "invalid_node_type": ("missing_node_type", "error"),
    "invalid_out_of_range": ("value_bigger_than_max", "warning"),
    "invalid_type_mismatch": ("return_type_mismatch", "warning"),
    "invalid_value_not_in_list": ("value_not_in_list", "warning"),
    "partial_one_output_invalid": ("required_input_missing", "warning"),
    "poison_unvalidated_node": ("inputs_missing", "error"),
}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_recorded_workflows(name: str) -> None:
    verdict = validate(WORKFLOWS[name], [CATALOG])
    expected = INVALID.get(name)
    assert codes(verdict) == ({expected[0]: expected[1]} if expected else {})
    if expected is None:
        assert verdict.clean == verdict.eligible == ("local",)
        assert verdict.outputs


def test_every_recorded_prompt_gets_the_verdict_of_the_real_one_or_a_warning() -> None:
    # What ComfyUI took and we do not: files outside its folders (PROTOCOL §7), and the one that killed its worker.
    ours = {("run_load_annotated", "unsafe_file_name"), ("fail_prefix_traversal", "unsafe_file_name")}
    ours |= {("poison_dead_worker", "inputs_missing")}
    accepted, refused, differ = 0, 0, set()
    for case, prompt, status, answer in recorded_prompts():
        verdict = validate(prompt, [CATALOG])
        if status == 200 and not answer["node_errors"]:
            accepted += 1
            differ |= {(case, finding.code) for finding in verdict.findings if finding.severity == "error"}
        elif status == 400 and case != "run_load_annotated":  # there: a file missing in temp, which we cannot know
            refused += 1
            assert verdict.findings, (case, prompt, answer)
    assert differ == ours
    assert accepted > 100
    assert refused >= 10


def test_our_findings_say_what_comfyui_says() -> None:
    same = 0
    for case, prompt, _, answer in recorded_prompts():
        if not case.startswith(("reject_", "run_partial_one")) or not isinstance(answer, dict):
            continue
        theirs = [finding for finding in findings_from_rejection(answer) if finding.input is not None]
        if not theirs or theirs[0].code == "custom_validation_failed":
            continue  # of the file that is not there, we say so
        ours = validate(prompt, [CATALOG]).findings
        assert [(f.code, f.pointer, f.node_id, f.class_type, f.input) for f in ours] == [
            (f.code, f.pointer, f.node_id, f.class_type, f.input) for f in theirs
        ]
        same += 1
    assert same == 5


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


# --- Inputs


def info_of(**inputs: Any) -> ObjectInfo:
    """A catalogue with one output node `Probe` of these required inputs, beside the recorded classes."""
    probe = {"input": {"required": inputs}, "output": ["IMAGE"], "output_node": True}
    return {**INFO, **read_object_info({"Probe": probe})}


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
    [("KSamplr", "KSampler"), ("ksampler", "KSampler"), ("Load Checkpoint", "CheckpointLoaderSimple")],
)
def test_the_nearest_class(written: str, meant: str) -> None:
    graph = {"1": EMPTY_IMAGE, "2": save(["1", 0]), "3": {"class_type": written, "inputs": {}}}
    finding = the_one(validate(graph, [CATALOG]))
    # ComfyUI refuses the whole prompt for it, though nothing needs the node.
    assert (finding.code, finding.severity) == ("missing_node_type", "error")
    assert finding.suggestions[0] == meant
    assert finding.pointer == "/workflow/3/class_type"


# --- Several backends


def without(*names: str) -> dict[str, NodeClass]:
    return {name: found for name, found in INFO.items() if name not in names}


def test_a_class_that_one_backend_has_is_not_missing() -> None:
    graph = WORKFLOWS["slow_steps_preview"]
    small = Catalog("small", without("SleepSteps"))
    assert validate(graph, [small, CATALOG]) == validate(graph, [CATALOG])
    assert validate(graph, [small, CATALOG]).eligible == ("local",)
    assert codes(validate(graph, [small])) == {"missing_node_type": "error"}
    # One that is away may have it.
    verdict = validate(graph, [small, AWAY])
    assert (verdict.findings, verdict.eligible, verdict.clean) == ((), ("away",), ())


def test_classes_spread_over_backends_are_left_to_comfyui() -> None:
    graph = WORKFLOWS["slow_steps_preview"]
    verdict = validate(graph, [Catalog("a", without("SleepSteps")), Catalog("b", without("ImageScale"))])
    assert codes(verdict) == {"missing_node_type": "warning"}
    assert verdict.eligible == ("a", "b")
    assert verdict.clean == ()


def test_the_findings_are_those_of_the_best_backend() -> None:
    graph = WORKFLOWS["invalid_out_of_range"]
    wide = read_object_info({"EmptyImage": {"input": {"required": {}}, "output": ["IMAGE"]}})
    verdict = validate(graph, [CATALOG, Catalog("wide", {**INFO, **wide})])
    assert (verdict.findings, verdict.eligible, verdict.clean) == ((), ("local", "wide"), ("wide",))


def test_with_every_backend_away_only_what_no_comfyui_could_run_is_an_error() -> None:
    for name, graph in WORKFLOWS.items():
        found = set(codes(validate(graph, [AWAY])).values())
        fatal = {"inputs_missing", "class_type_missing", "dependency_cycle", "link_to_missing_node"}
        assert found == ({"error"} if INVALID.get(name, ("", ""))[0] in fatal else set()), name


def test_classes_to_ask_about_again() -> None:
    graph = WORKFLOWS["invalid_out_of_range"] | {"9": {"class_type": "Nope", "inputs": {}}}
    findings = validate(graph, [CATALOG]).findings
    assert concerned_classes(findings) == {"EmptyImage", "Nope"}
    assert concerned_classes(findings, only_missing=True) == {"Nope"}
    assert concerned_classes(validate({"1": LOAD_IMAGE}, [CATALOG]).findings) == frozenset()


# --- File names


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("probe-input.png", True),
        ("jobs/0001/a b.png", True),
        ("x.png [output]", True),
        ("..x.png", True),
        ("a..b/c", True),
        ("../x.png", False),
        ("a/../../x.png", False),
        ("a/..", False),
        ("..", False),
        ("foo/..X[output]", False),  # ComfyUI cuts the letter before the bracket as well
        ("/etc/hostname", False),
        ("/etc/hostname [input]", False),
        ("C:/x.png", False),
        ("c:x.png", False),
        ("\\\\server\\x.png", False),
        ("a\\..\\b.png", False),
        ("a\0b", False),
    ],
)
def test_names_that_loaders_may_be_given(name: str, safe: bool) -> None:
    for value in (name, {"__value__": name}):
        for catalogs in ([CATALOG], [AWAY]):
            graph = {"1": {"class_type": "LoadImage", "inputs": {"image": value}}, "2": save(["1", 0])}
            verdict = validate(graph, catalogs)
            assert ("unsafe_file_name" not in codes(verdict)) is safe
            assert verdict.fatal is not safe


def test_every_file_input_is_looked_at() -> None:
    def fatal(class_type: str, **inputs: Any) -> bool:
        graph = {"1": {"class_type": class_type, "inputs": inputs}, "2": save(["1", 0])}
        return "unsafe_file_name" in codes(validate(graph, [CATALOG]))

    for class_type, name in {
        "LoadImageMask": "image",
        "LoadImageOutput": "image",
        "LoadAudio": "audio",
        "LoadVideo": "file",
        "LoadLatent": "latent",
        "Load3D": "model_file",
        "RecordAudio": "audio",
    }.items():
        assert fatal(class_type, **{name: "/etc/passwd"}), class_type
    assert fatal("Load3D", image={"image": "a.png", "mask": ["b.png", "../c.png"]})
    # A model's name is held against ComfyUI's own list, and a path of the machine may be what a custom node wants.
    assert not fatal("LoraLoader", lora_name="style\\ink.safetensors")
    assert not fatal("VHS_LoadVideoPath", video="/data/in.mp4")
    assert not fatal("PrimitiveString", value="../x")
    # What the class itself says to be an uploaded file.
    info = info_of(picture=[["win\\x.png"], {"image_upload": True}])
    for name, code in (("win\\y.png", "unsafe_file_name"), ("win\\x.png", None)):
        graph = {"1": {"class_type": "Probe", "inputs": {"picture": name}}}
        assert ("unsafe_file_name" in codes(validate(graph, [Catalog("local", info)]))) is (code is not None)


@pytest.mark.parametrize(
    ("prefix", "safe"),
    [
        ("probe/x", True),
        ("job-1/%year%-%month%-%day%/img_%width%x%height%", True),
        ("a/../b", True),
        ("win\\dir\\img", True),
        ("...", True),
        (5, True),
        ("../../escape/x", False),
        ("a/../../x", False),
        ("a\\..\\..\\x", False),
        ("/abs/x", False),
        ("\\abs", False),
        ("C:\\x", False),
        ("x\0", False),
    ],
)
def test_prefixes_that_files_may_be_saved_under(prefix: object, safe: bool) -> None:
    verdict = validate({"1": EMPTY_IMAGE, "2": save(["1", 0], prefix)}, [CATALOG])
    assert codes(verdict) == ({} if safe else {"unsafe_file_name": "error"})


# --- /object_info


def test_object_info_that_describes_itself_oddly() -> None:
    odd = {
        "NoInput": {"output": "IMAGE"},
        "ListInput": {"input": [], "output": [None, ["a"]], "display_name": 5},
        "Specs": {"input": {"required": {"a": None, "b": [], "c": "INT", "d": [["x", ["y"], {}]], "e": [5]}}},
        "NotAnObject": 7,
    }
    info = read_object_info(odd)
    assert set(info) == {"NoInput", "ListInput", "Specs"}
    assert info["ListInput"].outputs == ("*", "COMBO")
    graph = {name: {"class_type": name, "inputs": {"d": ["q"]}} for name in info}
    assert not validate(graph, [Catalog("odd", {**info, **INFO})]).eligible  # no output node; and nothing raised
    with pytest.raises(msgspec.DecodeError):
        decode_object_info(b"<html>")
    with pytest.raises(msgspec.ValidationError):
        decode_object_info(b"[1]")


def test_equal_lists_are_kept_once() -> None:
    loader = {"input": {"required": {"name": [["a", "b"], {}]}}}
    info = read_object_info({"A": loader, "B": json.loads(json.dumps(loader))})
    assert info["A"].inputs["name"].options is info["B"].inputs["name"].options


# --- ComfyUI's own answer


def test_a_recorded_refusal_keeps_what_was_allowed() -> None:
    answers = {
        case: answer for case, _, status, answer in recorded_prompts() if case.startswith("reject_") and status == 400
    }
    (finding,) = findings_from_rejection(answers["reject_out_of_range"])
    assert finding == Finding(
        code="value_bigger_than_max",
        message="EmptyImage (1): Value 999999 bigger than max of 16384: width",
        pointer="/workflow/1/inputs/width",
        node_id="1",
        class_type="EmptyImage",
        input="width",
        allowed={"min": 1, "max": 16384},
    )
    (finding,) = findings_from_rejection(answers["reject_node_type"])
    assert (finding.code, finding.node_id, finding.class_type) == ("missing_node_type", "2", "NoSuchNodeClass")
    (finding,) = findings_from_rejection(answers["reject_missing_class_type"])
    assert (finding.code, finding.pointer) == ("class_type_missing", "/workflow/1")
    (finding,) = findings_from_rejection(answers["reject_cycle"])
    assert "circle" in finding.message
    (finding,) = findings_from_rejection(answers["reject_bad_link"])
    assert "/comfyui" not in repr(finding)


def test_a_newer_refusal_names_the_node() -> None:
    extra = {"node_id": "4", "class_type": "Fancy", "node_title": "My node"}
    body = {"error": {"type": "missing_node_type", "message": "Node 'Fancy' not found.", "extra_info": extra}}
    (finding,) = findings_from_rejection(body)
    assert (finding.code, finding.node_id, finding.class_type) == ("missing_node_type", "4", "Fancy")


@pytest.mark.parametrize(
    "body", [None, "500 Internal Server Error", {}, {"error": "nope"}, {"node_errors": {"1": {}}}]
)
def test_an_answer_of_another_kind_is_one_finding(body: object) -> None:
    (finding,) = findings_from_rejection(body)
    assert finding.code == "rejected"
    assert finding.message


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("No such file: '/home/eve/ComfyUI/input/a b.png'", "No such file: '…/a b.png'"),
        ("cannot open /srv/models/x.safetensors, sorry", "cannot open …/x.safetensors, sorry"),
        ("output_dir: /comfyui-data/output\ncommonpath: /\n", "output_dir: …\ncommonpath: /"),
        ("in C:\\Users\\Eve Smith\\ComfyUI\\main.py line 3", "in …/main.py line 3"),
        ("at D:/ai/custom_nodes", "at …"),
        ("see file:///home/eve/x.json or \\\\nas\\share\\y.png", "see …/x.json or …/y.png"),
        ("~/ComfyUI/extra.yaml", "…/extra.yaml"),
        ("/root/.cache", "…"),
        ("module /srv/custom_nodes/pack.MyError", "module …/pack.MyError"),
        ("mat1 and mat2 (1/2 and 3 / 4), image/png, and/or", "mat1 and mat2 (1/2 and 3 / 4), image/png, and/or"),
        ("get it at https://example.org/models/x.ckpt", "get it at https://example.org/models/x.ckpt"),
        (
            'Traceback (most recent call last):\n  File "/a/b.py", line 1, in f\n    raise X\nValueError: bad\n',
            "ValueError: bad",
        ),
        ('oops\n  File "/comfyui/execution.py", line 496, in execute\n    ...\n', "oops"),
    ],
)
def test_scrub(text: str, shown: str) -> None:
    assert scrub(text) == shown


def test_what_comfyui_said_of_the_recorded_failures_leaves_no_path() -> None:
    seen = 0
    for path in (DATA / "transcripts").glob("*.jsonl"):
        for line in path.read_text().splitlines():
            message = json.loads(line).get("message", {})
            if isinstance(message, dict) and message.get("type") == "execution_error":
                data = message["data"]
                for text in (data["exception_message"], data["exception_type"], "".join(data["traceback"])):
                    assert "/comfyui" not in scrub(text)
                    assert "/abs" not in scrub(text)
                seen += 1
    assert seen >= 5


# --- Any input


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)
IDS = st.sampled_from(["1", "2", "3", "4", "x/~y"])
LINKS = st.tuples(IDS, st.sampled_from([0, 1, -1, 7, 0.5, True])).map(list)
NAMES = sorted({name for found in INFO.values() for name in found.inputs})
VALUES = LINKS | JSON | st.fixed_dictionaries({"__value__": LINKS | JSON})
NODES = st.fixed_dictionaries(
    {
        "class_type": st.sampled_from([*INFO, "Nope"]),
        "inputs": st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), VALUES, max_size=5),
    },
    optional={"_meta": JSON},
)
GRAPHS = st.dictionaries(IDS, NODES, min_size=1, max_size=5)
CATALOGS = st.lists(
    st.sampled_from([CATALOG, AWAY, Catalog("small", without("SaveImage", "EmptyImage")), Catalog("empty", {})]),
    unique_by=lambda catalog: catalog.name,
)


def is_encodable(findings: tuple[Finding, ...]) -> bool:
    return len(msgspec.json.encode(findings)) > 0


@given(st.one_of(JSON, st.dictionaries(IDS, JSON | NODES)), CATALOGS)
def test_never_raises(value: Any, catalogs: list[Catalog]) -> None:
    verdict = validate(value, catalogs)
    assert is_encodable(verdict.findings)
    assert len(verdict.findings) <= MAX_FINDINGS


@given(GRAPHS, CATALOGS)
def test_verdicts_hold_together(graph: dict[str, Any], catalogs: list[Catalog]) -> None:
    verdict = validate(graph, catalogs)
    assert is_encodable(verdict.findings)
    assert bool(verdict.eligible) is (bool(catalogs) and not verdict.fatal)
    assert set(verdict.clean) <= set(verdict.eligible)
    assert set(verdict.outputs) <= set(graph)
    severities = [finding.severity for finding in verdict.findings]
    assert severities == sorted(severities)
    for finding in verdict.findings:
        assert finding.node_id is None or finding.node_id in graph
    # One more backend, away: it never makes a verdict worse.
    if verdict.eligible and "away" not in {catalog.name for catalog in catalogs}:
        assert not validate(graph, [*catalogs, AWAY]).fatal


@given(JSON)
def test_any_answer_of_a_backend_is_understood(body: Any) -> None:
    for answer in (body, {"error": body, "node_errors": {"1": body}}, {"node_errors": {"1": {"errors": [body]}}}):
        assert findings_from_rejection(answer)


PART = st.text(st.characters(categories=["Ll", "Nd"], include_characters="-_"), min_size=1, max_size=12)


@given(
    st.lists(PART, min_size=1, max_size=5),
    PART,
    st.sampled_from(["{}", "at {} now", "'{}'", '"{}":', "({})", "x={}"]),
)
def test_no_folder_survives_scrub(folders: list[str], name: str, frame: str) -> None:
    secret = "zq".join(("", *folders, ""))
    for root, separator in (("/", "/"), ("C:\\", "\\"), ("\\\\", "\\")):
        path = root + separator.join([secret, *folders, f"{name}.png"])
        cleaned = scrub(frame.format(path))
        assert secret not in cleaned
        assert f"…/{name}.png" in cleaned


@given(st.text())
def test_scrub_takes_any_text(text: str) -> None:
    assert isinstance(scrub(text), str)


# --- Cost


def fan(count: int) -> dict[str, Any]:
    graph: dict[str, Any] = {"0": EMPTY_IMAGE}
    for n in range(1, count - 1):
        inputs = {"image1": [str(n - 1), 0], "image2": [str(n // 2), 0], "blend_factor": 0.5, "blend_mode": "normal"}
        graph[str(n)] = {"class_type": "ImageBlend", "inputs": inputs}
    graph["out"] = save([str(count - 2), 0])
    return graph


def fastest(graph: object, catalog: Catalog, runs: int = 10) -> float:
    def once() -> float:
        begin = time.thread_time()  # what it costs, whatever else the machine does
        validate(graph, [catalog])
        return time.thread_time() - begin

    return min(once() for _ in range(runs))


def test_500_nodes_take_less_than_10_ms() -> None:
    graph = fan(500)
    assert validate(graph, [CATALOG]).findings == ()
    assert fastest(graph, CATALOG, runs=20) < 0.010


def test_cost_grows_with_the_graph_and_not_faster() -> None:
    small, large = fastest(fan(500), CATALOG), fastest(fan(5000), CATALOG, runs=3)
    assert large < 30 * small


def test_a_chain_of_10000_nodes_is_no_trouble() -> None:
    graph: dict[str, Any] = {"0": EMPTY_IMAGE}
    for n in range(1, 9999):
        graph[str(n)] = {"class_type": "ImageInvert", "inputs": {"image": [str(n - 1), 0]}}
    graph["out"] = save(["9998", 0])
    assert validate(graph, [CATALOG]).findings == ()
    graph["0"] = {"class_type": "ImageInvert", "inputs": {"image": ["9998", 0]}}
    finding = the_one(validate(graph, [CATALOG]))
    assert finding.code == "dependency_cycle"
    assert len(finding.message) < 500


def test_names_among_ten_thousand_are_sought_within_reason() -> None:
    names = [f"models/variant-{n:05d}-sd.safetensors" for n in range(10_000)]
    info = info_of(x=[names, {}])
    graph = {str(n): {"class_type": "Probe", "inputs": {"x": f"variant-{n}-sd"}} for n in range(500)}
    catalog = Catalog("local", info)
    assert len(validate(graph, [catalog]).findings) == MAX_FINDINGS
    assert fastest(graph, catalog, runs=3) < 0.5
