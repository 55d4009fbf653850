"""What a real ComfyUI sent, decoded."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from managers.comfyui import protocol
from managers.comfyui.outputs import outputs_of
from managers.comfyui.protocol import (
    Executed,
    Executing,
    ExecutionCached,
    Message,
    NodeState,
    PreviewFrame,
    ProgressState,
    TextFrame,
    Unknown,
)
from tests.recordings import cases, frames, histories


@pytest.mark.parametrize("case", cases())
def test_every_recorded_frame_is_known(case: str) -> None:
    for frame in frames(case):
        if isinstance(frame, Message):
            assert not isinstance(frame.body, Unknown), frame.type


def test_preview_with_metadata_names_its_node() -> None:
    previews = [frame for frame in frames("run_slow_preview_metadata") if isinstance(frame, PreviewFrame)]
    assert len(previews) == 8
    assert {(frame.node_id, frame.mime) for frame in previews} == {("2", "image/jpeg")}
    assert all(frame.image.startswith(b"\xff\xd8") for frame in previews)


def test_legacy_preview_names_nothing() -> None:
    previews = [frame for frame in frames("run_slow_preview_legacy") if isinstance(frame, PreviewFrame)]
    assert previews
    assert all(frame.prompt_id is None and frame.image.startswith(b"\xff\xd8") for frame in previews)


def test_text_frame() -> None:
    texts = [frame for frame in frames("run_text_outputs") if isinstance(frame, TextFrame)]
    assert texts
    assert all(frame.node_id and frame.text for frame in texts)


def test_the_greeting_after_a_reconnect_has_no_prompt_id() -> None:
    greetings = [
        frame.body
        for frame in frames("ws_reconnect_mid_run")
        if isinstance(frame, Message) and isinstance(frame.body, Executing) and frame.body.prompt_id is None
    ]
    assert greetings
    assert all(greeting.node is not None for greeting in greetings)


@pytest.mark.parametrize(
    ("case", "verdicts"),
    [
        ("run_empty_save", {"success"}),
        ("run_execution_blocked", {"success"}),
        ("run_fail_value_error", {"error"}),
        ("run_fail_oom_torch", {"error"}),
        ("interrupt_by_prompt_id", {"interrupted"}),
    ],
)
def test_the_verdict_is_in_the_last_message(case: str, verdicts: set[str]) -> None:
    ends = [
        protocol.end_of(msgspec.json.decode(msgspec.json.encode(entry), type=protocol.HistoryEntry, strict=False))
        for entry in histories(case).values()
    ]
    assert {end.verdict for end in ends} == verdicts
    assert all(end.start_time and end.end_time and end.start_time <= end.end_time for end in ends)


def test_an_interrupt_is_no_error_whatever_status_str_says() -> None:
    entry = next(iter(histories("interrupt_by_prompt_id").values()))
    assert entry["status"]["status_str"] == "error"


@given(st.binary(max_size=64))
def test_no_binary_frame_raises(frame: bytes) -> None:
    protocol.decode_binary(frame)


@given(
    st.text(max_size=200) | st.sampled_from(['{"type":"progress","data":{"value":"x"}}', '{"type":"a","data":[]}'])
)
def test_no_text_frame_raises(frame: str) -> None:
    protocol.decode_text(frame)


def json_values(characters: st.SearchStrategy[str]) -> st.SearchStrategy[object]:
    """Whatever Python's json can write, NaN and Infinity too."""
    return st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(characters, max_size=5),
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text(characters, max_size=5), inner, max_size=4)
        ),
        max_leaves=12,
    )


@given(st.sampled_from(["executed", "progress", "progress_state", "odd"]), json_values(st.characters()))
def test_what_is_passed_on_is_json(name: str, data: object) -> None:
    message = protocol.decode_text(json.dumps({"type": name, "data": data}))
    assert message is not None
    msgspec.json.decode(message.raw)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"type":"executed","data":{"fullpath":' + "[" * 100_000])
def test_depth_is_no_danger(text: str) -> None:
    assert protocol.decode_text(text) is None
    deep = '{"type":"executed","data":{"output":' + "[" * 900 + "1e999" + "]" * 900 + "}}"
    found = protocol.decode_text(deep)
    assert found is None or isinstance(found.body, Unknown)


@given(json_values(st.characters(exclude_categories=["Cs"])))
def test_only_what_is_odd_is_changed(data: object) -> None:
    frame = json.dumps({"type": "odd", "data": data})
    message = protocol.decode_text(frame)
    assert message is not None
    if any(odd in frame for odd in ("NaN", "Infinity")):
        found = json.loads(frame, parse_constant=lambda _: None)["data"]
        assert json.loads(bytes(message.raw)) == found
    else:
        assert bytes(message.raw).decode() == json.dumps(data)


def test_half_a_character_is_replaced() -> None:
    message = protocol.decode_text(
        '{"type":"executing","data":{"node":"1\\ud800","prompt_id":"p","display_node":null}}'
    )
    assert message is not None
    assert message.body == Executing("1?", None, "p")
    assert bytes(message.raw) == b'{"node":"1?","prompt_id":"p","display_node":null}'


@pytest.mark.parametrize(
    ("frame", "body"),
    [
        ({"type": "executing", "data": {"node": 3, "prompt_id": 42}}, Executing("3", None, "42")),
        (
            {"type": "execution_cached", "data": {"nodes": [1, "2"], "prompt_id": "p"}},
            ExecutionCached("p", ["1", "2"]),
        ),
        (
            {
                "type": "progress_state",
                "data": {"prompt_id": "p", "nodes": {"1": {"node_id": 1, "parent_node_id": 2}}},
            },
            ProgressState("p", {"1": NodeState(node_id="1", parent_node_id="2")}),
        ),
        ({"type": "progress", "data": {"value": float("nan"), "max": 5, "prompt_id": "p"}}, Unknown("p")),
        ({"type": "progress", "data": {"value": "x", "max": 5, "prompt_id": 7}}, Unknown("7")),
        ({"type": "progress", "data": {"value": {}, "max": 5, "prompt_id": 7, "odd": 1e300 * 1e300}}, Unknown("7")),
        ({"type": "of.a.custom.node", "data": {"prompt_id": "p", "score": float("inf")}}, Unknown("p")),
    ],
)
def test_odd_bodies(frame: object, body: protocol.Body) -> None:
    """Ids as numbers are ids; what means nothing still says whose it is."""
    message = protocol.decode_text(json.dumps(frame))
    assert message is not None
    assert message.body == body


def test_an_odd_verdict_is_one() -> None:
    entry = {
        "outputs": {"9": ["no object"], "8": None},
        "status": {"messages": [["execution_interrupted", {"prompt_id": 3, "node_id": 5, "timestamp": 7}, "more"]]},
    }
    found = protocol.read_history(msgspec.Raw(json.dumps(entry).encode()))
    assert protocol.end_of(found) == protocol.End("interrupted", None, 7)
    assert list(outputs_of("9", found.outputs["9"])) == []


@pytest.mark.parametrize(
    "entry", [None, 5, "x", [], {"outputs": []}, {"status": "fine"}, {"status": {"messages": [1]}}]
)
def test_a_history_without_a_meaning_says_so(entry: object) -> None:
    found = protocol.read_history(msgspec.Raw(json.dumps(entry).encode()))
    assert found.unreadable
    assert protocol.end_of(found).verdict == "unreadable"


def test_paths_of_that_machine_are_left_out() -> None:
    """As VHS gives them with its videos; and nothing else is."""
    video = {"filename": "a.mp4", "subfolder": "", "type": "output", "fullpath": "/home/someone/comfyui/output/a.mp4"}
    more = {"gifs": [video], "nested": [{"deep": [{"fullpath": "C:\\x", "kept": 1.5}]}], "text": ["the fullpath"]}
    data = {"node": "9", "display_node": "9", "output": more, "prompt_id": "p"}
    left = {
        "gifs": [{"filename": "a.mp4", "subfolder": "", "type": "output"}],
        "nested": [{"deep": [{"kept": 1.5}]}],
        "text": ["the fullpath"],
    }
    message = protocol.decode_text(json.dumps({"type": "executed", "data": data}))
    assert message is not None
    assert message.body == Executed("p", "9", "9", left)
    assert json.loads(bytes(message.raw)) == data | {"output": left}
    entry = protocol.read_history(msgspec.Raw(json.dumps({"outputs": {"9": more}}).encode()))
    assert list(outputs_of("9", entry.outputs["9"])) == list(outputs_of("9", left))


def test_a_message_of_a_custom_node_is_kept_as_it_came() -> None:
    message = protocol.decode_text('{"type":"crystools.monitor","data":{"cpu":3}}')
    assert message is not None
    assert (message.type, message.body, bytes(message.raw)) == ("crystools.monitor", Unknown(), b'{"cpu":3}')
