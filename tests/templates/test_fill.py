"""What a schema admits makes a graph that passes; what it refuses is refused. And how refusals are worded."""

from __future__ import annotations

import json
import math
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from managers.comfyui.object_info import Catalog, read_object_info
from managers.comfyui.validation import validate
from managers.events.types import Finding
from managers.templates.check import check
from managers.templates.fill import Filled, fill
from managers.templates.model import Definition, Kind
from managers.templates.parameter import RANDOM, Parameter
from managers.templates.schema import example, schema
from tests.templates.kit import CATALOG, INSTALLED, boxed, definition, no_random, object_info, takes, version

BOXED = boxed()
ALL = {
    "seed": {"node": "1", "input": "seed"},
    "late_seed": {"node": "1", "input": "noise_seed", "type": "seed", "minimum": 7},
    "count": {"node": "1", "input": "count", "type": "integer", "minimum": -3},
    "strength": {"node": "1", "input": "strength"},
    "text": {"node": "1", "input": "text"},
    "flag": {"node": "1", "input": "flag"},
    "name": {"node": "2", "input": "filename_prefix"},
    "color": {"node": "1", "input": "color", "type": "color"},
    "picture": {"node": "3", "input": "image"},
    "mode": {"node": "1", "input": "mode", "enum": ["b", "a"]},
    "number": {"node": "1", "input": "number"},
}
CUSTOM: Definition = definition(
    {
        "1": {
            "class_type": "Everything",
            "inputs": {
                "seed": 5, "noise_seed": 9, "count": 1, "strength": 0.5, "text": "", "flag": True, "color": 255,
                "mode": "a", "number": 2,
            },
        },
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
        "3": {"class_type": "LoadImage", "inputs": {"image": "lamp.png"}},
    },
    **ALL,
)  # fmt: skip
EVERYTHING = {
    "input": {
        "required": {
            "seed": ["INT", {"min": 0, "max": 2**64 - 1}],
            "noise_seed": ["INT", {"min": 0, "max": 2**64 - 1}],
            "count": ["INT", {"max": 10}],
            "strength": ["FLOAT", {"min": -0.5, "max": 1.5}],
            "text": ["STRING", {"multiline": True}],
            "flag": ["BOOLEAN", {}],
            "color": ["INT", {"min": 0, "max": 16777215}],
            "mode": [["a", "b", "c"], {}],
            "number": [[1, 2, 3], {}],
        }
    },
    "output": ["IMAGE"],
}
CUSTOM_CATALOG = Catalog("local", read_object_info({**object_info(), "Everything": EVERYTHING}))
CASES = [(name, one, CATALOG) for name, one in BOXED.items()] + [("everything", CUSTOM, CUSTOM_CATALOG)]

# Right ones, nearly right ones and wrong ones, for any kind of parameter.
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 20),
    st.integers(),
    st.sampled_from([2**64 - 1, 2**64, -(2**63), -1, 1.0, 7, 2047, 2048, 2049, 16, 15.5, 150, 1e308, -0.5, 1.5]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=12),
    st.sampled_from(
        ["#3366cc", "#3366CC\n", "#33",
         "lamp.png", "lamp.png\n", "a/lamp.png", "a/../b.png", "/a.png", "x.png [output]",
         "a\\b.png", "sd15.safetensors", "euler", "normal", "red", "a", "b", "c", "canny.safetensors", "4x.pth", "",
         "%year%/x", "..", ".x", "a//b", "C:/x"]
    ),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
)  # fmt: skip


def right(parameter: Parameter) -> st.SearchStrategy[Any]:
    """Values that it takes."""
    if parameter.options:
        return st.sampled_from(list(parameter.options))
    low, high = parameter.minimum, parameter.maximum
    match parameter.kind:
        case Kind.INTEGER | Kind.SEED:
            return st.integers(int(low or 0), int(high or 0))
        case Kind.NUMBER:
            return st.floats(low, high) | st.integers(math.ceil(low or 0), math.floor(high or 0))
        case Kind.BOOLEAN:
            return st.booleans()
        case Kind.COLOR:
            return st.from_regex(r"#[0-9a-fA-F]{6}", fullmatch=True)
        case Kind.FILE:
            return st.sampled_from(["lamp.png", "a/lamp.png", "x.png [output]", "%year%/x"])
    return st.text()


def requests(known: dict[str, Parameter]) -> st.SearchStrategy[dict[str, Any]]:
    """Right ones; and right ones with something else, or nothing, in one or two places."""
    names = list(known)
    needed = {name: right(one) for name, one in known.items() if one.required}
    good = st.fixed_dictionaries(needed, optional={n: right(one) for n, one in known.items() if n not in needed})
    keys = st.one_of(st.sampled_from([*names, *names, "widht"]), st.text(max_size=4))
    changed = st.builds(lambda one, two: one | two, good, st.dictionaries(keys, VALUES, min_size=1, max_size=2))
    dropped = st.builds(lambda one, gone: {n: v for n, v in one.items() if n != gone}, good, st.sampled_from(names))
    return st.one_of(good, changed, changed, dropped)


def wrong(found: Filled | list[Finding]) -> list[Finding]:
    assert isinstance(found, list), found
    return found


@pytest.mark.parametrize(("name", "one", "catalog"), CASES, ids=[case[0] for case in CASES])
def test_the_schema_admits_what_is_taken_and_nothing_else(name: str, one: Definition, catalog: Catalog) -> None:
    known = takes(one, catalog)
    told = schema(version(one, name), known)
    jsonschema.Draft202012Validator.check_schema(told)
    judge = jsonschema.Draft202012Validator(told)
    assert judge.is_valid(example(known.values()))
    seen = {True: 0, False: 0}

    @settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @given(requests(known))
    def holds(request: dict[str, Any]) -> None:
        found = fill(version(one), known, request, no_random)
        admitted = judge.is_valid(request)
        assert admitted == isinstance(found, Filled), (request, found)
        seen[admitted] += 1
        if isinstance(found, Filled):
            graph = msgspec.json.decode(msgspec.json.encode(found.graph))
            assert validate(graph, [catalog]).findings == ()
        else:
            assert all(finding.pointer for finding in found)

    holds()
    assert min(seen.values()) > 10, seen


EDGES: list[Any] = [
    *(
        None,
        True,
        False,
        [],
        {},
        "",
        "x",
        "#3366cc",
        "#3366CC\n",
        "#3366c",
        "x\n#3366cc",
        "a" * 100_000,
        "a" * 100_001,
    ),
    *(
        "lamp.png",
        "lamp.png\n",
        "lamp2.png",
        "a/lamp.png",
        "a/lamp.png\n",
        "a/../b.png",
        "../b.png",
        "/a.png",
        "a//b.png",
    ),
    *("x.png [output]", "x.png [output]\n", "a\\b.png", "a/.b", "C:/x", "euler", "Euler", "red", "a", "c"),
    *(-1, 0, 1, 2, 1.0, 1.5, 7, 7.0, 6, 2**53, 2**53 + 2, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 1e308),
]


@pytest.mark.parametrize(("name", "one", "catalog"), CASES, ids=[case[0] for case in CASES])
def test_at_the_edges_the_schema_admits_what_is_taken(name: str, one: Definition, catalog: Catalog) -> None:
    known = takes(one, catalog)
    judge = jsonschema.Draft202012Validator(schema(version(one, name), known))
    good = example(known.values())
    for parameter in known.values():
        low, high = parameter.minimum or 0, parameter.maximum or 0
        near = [low - 1, low, low + 1, high - 1, high, high + 1, low - 0.5, high + 0.5]
        for value in [*EDGES, *near, *(parameter.options or ())]:
            request = good | {parameter.name: value}
            found = fill(version(one), known, request, no_random)
            assert judge.is_valid(request) == isinstance(found, Filled), (request, found)
            if isinstance(found, Filled):
                graph = msgspec.json.decode(msgspec.json.encode(found.graph))
                assert validate(graph, [catalog]).findings == ()


@pytest.mark.parametrize("name", sorted(BOXED))
def test_the_box_is_sound(name: str) -> None:
    one = BOXED[name]
    graph = json.loads(bytes(one.graph))
    assert check(one, graph, [CATALOG]) == []
    assert one.description
    assert one.outputs
    assert all(given.description or name in ("sampler", "scheduler", "seed") for name, given in one.inputs.items())


def test_the_box_is_what_was_promised() -> None:
    assert sorted(BOXED) == ["controlnet", "demo", "img2img", "inpaint", "txt2img", "txt2img-lora", "upscale"]


def test_a_seed_of_minus_one_is_drawn_and_told() -> None:
    known = takes(BOXED["txt2img"])
    asked: list[dict[str, Any]] = [{"prompt": "x"}, {"prompt": "x", "seed": RANDOM}]
    for request in asked:
        found = fill(version(BOXED["txt2img"]), known, request, no_random)
        assert isinstance(found, Filled)
        assert found.parameters["seed"] == found.graph["5"]["inputs"]["seed"] == 2**53 - 1
        assert found.seed == 2**53 - 1
    found = fill(version(BOXED["txt2img"]), known, {"prompt": "x", "seed": 7.0}, no_random)
    assert isinstance(found, Filled)
    assert found.graph["5"]["inputs"]["seed"] == 7
    assert isinstance(found.graph["5"]["inputs"]["seed"], int)


def test_one_parameter_goes_to_all_its_places_and_nothing_else_changes() -> None:
    one = BOXED["txt2img-lora"]
    before = version(one).nodes()
    found = fill(
        version(one), takes(one), {"prompt": "x", "lora": "ink.safetensors", "lora_strength": 0.25}, no_random
    )
    assert isinstance(found, Filled)
    lora = found.graph["8"]["inputs"]
    assert (lora["strength_model"], lora["strength_clip"]) == (0.25, 0.25)
    named = {(place.node, place.input) for given in one.inputs.values() for place in given.places}
    for node_id, node in before.items():
        for name, value in node["inputs"].items():
            assert (node_id, name) in named or found.graph[node_id]["inputs"][name] == value
    assert version(one).nodes() == before


def test_all_that_is_wrong_is_told_with_the_nearest_names() -> None:
    known = takes(BOXED["txt2img"])
    found = wrong(
        fill(version(BOXED["txt2img"]), known, {"promt": "x", "steps": 0, "width": 4096, "cfg": "7"}, no_random)
    )
    told = {finding.pointer: finding for finding in found}
    assert set(told) == {"/promt", "/prompt", "/steps", "/width", "/cfg"}
    assert told["/promt"].suggestions == ("prompt",)
    assert told["/prompt"].code == "required"
    assert "says ComfyUI's KSampler.steps (1 to 150)" in told["/steps"].message
    assert (told["/steps"].node_id, told["/steps"].class_type) == ("5", "KSampler")
    assert "says the template (64 to 2048)" in told["/width"].message
    assert told["/width"].allowed == {"min": 64, "max": 2048}
    assert told["/cfg"].code == "invalid_type"


def test_what_is_installed_is_told_for_each_backend() -> None:
    other = {**INSTALLED, ("CheckpointLoaderSimple", "ckpt_name"): ["flux.safetensors"]}
    two = (CATALOG, Catalog("attic", read_object_info(object_info(other))))
    known = takes(BOXED["txt2img"], *two)
    one = version(BOXED["txt2img"])
    (finding,) = wrong(fill(one, known, {"prompt": "x", "checkpoint": "sd51.safetensors"}, no_random))
    assert finding.allowed == {
        "local": ["sd15.safetensors", "sdxl-base-1.0.safetensors"],
        "attic": ["flux.safetensors"],
    }
    assert finding.suggestions[0] == "sd15.safetensors"
    assert "attic: 'flux.safetensors'" in finding.message
    assert isinstance(fill(one, known, {"prompt": "x", "checkpoint": "flux.safetensors"}, no_random), Filled)


def test_a_backend_without_the_chosen_model_does_not_get_it() -> None:
    checkpoints, loras = ("CheckpointLoaderSimple", "ckpt_name"), ("LoraLoader", "lora_name")
    here = Catalog("here", read_object_info(object_info({**INSTALLED, checkpoints: ["a"], loras: ["x", "z"]})))
    attic = Catalog("attic", read_object_info(object_info({**INSTALLED, checkpoints: ["b"], loras: ["y", "z"]})))
    known = takes(BOXED["txt2img-lora"], here, attic)
    one = version(BOXED["txt2img-lora"])

    def ask(checkpoint: str, lora: str) -> Filled | list[Finding]:
        return fill(one, known, {"prompt": "p", "checkpoint": checkpoint, "lora": lora}, no_random)

    for checkpoint, lora, unfit in (("a", "x", ("attic",)), ("b", "z", ("here",)), ("b", "y", ("here",))):
        found = ask(checkpoint, lora)
        assert isinstance(found, Filled)
        assert found.unfit == unfit
    (finding,) = wrong(ask("a", "y"))
    assert finding.code == "nowhere_together"
    assert "here has not 'y' (lora); attic has not 'a' (checkpoint)" in finding.message


def test_a_silent_backend_is_not_quoted() -> None:
    known = takes(BOXED["txt2img"], CATALOG, Catalog("away"))
    one = version(BOXED["txt2img"])
    assert isinstance(fill(one, known, {"prompt": "x", "checkpoint": "new.safetensors"}, no_random), Filled)
    assert "enum" not in schema(one, known)["properties"]["checkpoint"]
    assert wrong(fill(one, known, {"prompt": "x", "steps": 0}, no_random)), "ranges are the same everywhere"


def test_a_default_that_is_not_installed_has_to_be_chosen() -> None:
    graph = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "gone.safetensors"}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 2], "filename_prefix": "x"}},
    }
    one = definition(graph, checkpoint={"node": "1", "input": "ckpt_name"})
    known = takes(one)
    assert schema(version(one), known)["required"] == ["checkpoint"]
    (finding,) = wrong(fill(version(one), known, {}, no_random))
    assert "its default 'gone.safetensors' cannot be used here" in finding.message
    assert "sd15.safetensors" in finding.message


def test_where_nothing_is_installed_it_is_said() -> None:
    known = takes(BOXED["upscale"], Catalog("local", read_object_info(object_info({}))))
    found = wrong(fill(version(BOXED["upscale"]), known, {"image": "lamp.png", "model": "4x.pth"}, no_random))
    assert {finding.pointer: finding.message for finding in found} == {
        "/image": "image is 'lamp.png', and ComfyUI's folder is empty",
        "/model": "model is '4x.pth', and nothing of the kind is installed",
    }
