"""What a real ComfyUI sent, decoded."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from managers.comfyui import protocol
from managers.comfyui.protocol import Executing, Message, PreviewFrame, TextFrame, Unknown
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


def test_a_message_of_a_custom_node_is_kept_as_it_came() -> None:
    message = protocol.decode_text('{"type":"crystools.monitor","data":{"cpu":3}}')
    assert message is not None
    assert (message.type, message.body, bytes(message.raw)) == ("crystools.monitor", Unknown(), b'{"cpu":3}')
