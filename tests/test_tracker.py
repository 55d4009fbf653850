"""Recorded messages to progress in plain words."""

from typing import Any

import pytest
from msgspec.structs import replace

from managers.comfyui.graph import parse_graph
from managers.comfyui.object_info import NodeClass
from managers.comfyui.outputs import outputs_of
from managers.comfyui.protocol import (
    Body,
    Executing,
    ExecutionCached,
    ExecutionError,
    ExecutionInterrupted,
    ExecutionStart,
    ExecutionSuccess,
    Message,
    Progress,
)
from managers.comfyui.tracker import Tracker, describe
from managers.events.types import Event, NodeExecuted, NodeExecuting, NodeProgressed, Output, WorkflowProgress
from tests.recordings import cases, frames, prompts

OUTPUT_NODES = {"SaveImage", "PreviewImage", "ProbeText", "PreviewAny", "SaveLatent", "SaveAudio", "SaveVideo"}


def node_class(class_type: str) -> NodeClass:
    return NodeClass(name=class_type, output_node=class_type in OUTPUT_NODES)


def tracker_of(graph: dict[str, Any]) -> Tracker:
    return Tracker("w", describe(parse_graph(graph), node_class))


def replay(case: str) -> dict[str, tuple[Tracker, list[Event]]]:
    """Every prompt of a recording, followed to its end."""
    followed = {prompt_id: (tracker_of(graph), list[Event]()) for prompt_id, graph in prompts(case).items()}
    for now, frame in enumerate(frames(case)):
        prompt_id = getattr(frame.body, "prompt_id", None) if isinstance(frame, Message) else None
        if isinstance(frame, Message) and prompt_id in followed:
            tracker, events = followed[prompt_id]
            events += tracker.feed(frame.body, now)
    return followed


def only(case: str) -> tuple[Tracker, list[Event]]:
    [(tracker, events)] = replay(case).values()
    return tracker, events


def progress(events: list[Event]) -> list[WorkflowProgress]:
    return [event for event in events if isinstance(event, WorkflowProgress)]


@pytest.mark.parametrize("case", [case for case in cases() if prompts(case)])
def test_progress_never_goes_back_and_100_is_for_the_verdict(case: str) -> None:
    for _, events in replay(case).values():
        told = [event.progress for event in progress(events)]
        assert told == sorted(told)
        assert all(0 <= percent <= 99 for percent in told)
        assert all(event.nodes.cached <= event.nodes.done <= event.nodes.total for event in progress(events))


@pytest.mark.parametrize("case", [case for case in cases() if prompts(case)])
def test_progress_is_told_when_there_is_news_and_at_both_ends(case: str) -> None:
    trackers = {prompt_id: tracker_of(graph) for prompt_id, graph in prompts(case).items()}
    last: dict[str, WorkflowProgress] = {}
    for now, frame in enumerate(frames(case)):
        prompt_id = getattr(frame.body, "prompt_id", None) if isinstance(frame, Message) else None
        if not isinstance(frame, Message) or prompt_id not in trackers:
            continue
        told = progress(trackers[prompt_id].feed(frame.body, now))
        ends = isinstance(frame.body, ExecutionStart | ExecutionSuccess | ExecutionError | ExecutionInterrupted)
        assert len(told) <= 1
        if ends:
            assert told
        elif told and prompt_id in last:
            assert told[0] != replace(last[prompt_id], timestamp=now)
        # What is not told is what was told before.
        shown = told[0] if told else last[prompt_id]
        assert (shown.progress, shown.nodes) == (trackers[prompt_id].percent, trackers[prompt_id].counts())
        last[prompt_id] = shown


@pytest.mark.parametrize(
    "case", ["run_empty_save", "run_image_ops_batch", "run_slow_multi_node", "run_subgraph_expand"]
)
def test_all_nodes_are_done_at_the_end_of_a_success(case: str) -> None:
    tracker, events = only(case)
    assert tracker.evidence.verdict == "success"
    last = progress(events)[-1].nodes
    assert last.done == last.total > 0


def test_steps_and_previews_of_a_sampler() -> None:
    _, events = only("run_slow_preview_metadata")
    steps = [(event.step, event.steps) for event in progress(events) if event.current_node_id == "2" and event.step]
    assert steps[0] == (1, 8)
    assert steps[-1] == (8, 8)
    stepped = [event for event in events if isinstance(event, NodeProgressed)]
    assert [event.node_progress for event in stepped] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert stepped[3].node_percentage == 50
    assert "4/8 steps (50%)" in (stepped[3].message or "") or "4/8 (50%)" in (stepped[3].message or "")


def test_a_fully_cached_run_says_so() -> None:
    tracker, events = only("run_cached")
    executed = [event for event in events if isinstance(event, NodeExecuted)]
    assert {event.node_state for event in executed if event.output is None} == {"cached"}
    assert tracker.counts().cached == tracker.counts().total == 2
    assert not [event for event in events if isinstance(event, NodeExecuting)]


def test_each_node_begins_and_ends_once() -> None:
    _, events = only("run_slow_multi_node")
    begun = [event.node_id for event in events if isinstance(event, NodeExecuting)]
    assert len(begun) == len(set(begun))
    ended = [event.node_id for event in events if isinstance(event, NodeExecuted) and event.node_state == "finished"]
    assert sorted(set(ended)) == sorted(set(begun))


def test_expanded_nodes_are_shown_as_the_node_they_stand_for() -> None:
    _, events = only("run_subgraph_expand")
    inner = [event for event in events if isinstance(event, NodeExecuting) and "." in event.node_id]
    assert inner
    assert {event.display_node_id for event in inner} == {"2"}
    assert {event.current_node_id for event in progress(events)} <= {None, "1", "2", "3"}


def test_a_blocked_branch_is_no_failure() -> None:
    tracker, _ = only("run_execution_blocked")
    assert tracker.evidence.verdict == "success"
    assert [error.exception_message.strip() for error in tracker.evidence.blocked] == [
        "Execution Blocked: blocked on purpose"
    ]


def test_a_failure_is_evidence_with_its_node() -> None:
    tracker, _ = only("run_fail_value_error")
    assert tracker.evidence.verdict == "error"
    assert tracker.evidence.error is not None
    assert (tracker.evidence.error.node_id, tracker.evidence.error.exception_type) == ("2", "ValueError")


def test_two_nodes_at_once() -> None:
    _, events = only("run_async_nodes")
    order = [
        (type(event).__name__, event.node_id)
        for event in events
        if isinstance(event, NodeExecuting | NodeExecuted) and event.node_id in ("2", "3")
    ]
    assert [name for name, _ in order] == ["NodeExecuting", "NodeExecuting", "NodeExecuted", "NodeExecuted"]


def test_servers_without_progress_state() -> None:
    tracker = tracker_of(
        {
            "1": {"class_type": "KSampler", "inputs": {}},
            "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0]}},
        }
    )
    told: list[Event] = []
    messages: list[Body] = [
        ExecutionStart("p", 5),
        ExecutionCached("p", []),
        Executing("1", "1", "p"),
        Progress(1, 2, "p", "1"),
        Progress(2, 2, "p", "1"),
        Executing("2", "2", "p"),
    ]
    for body in messages:
        told += tracker.feed(body, 7)
    assert [event.node_id for event in told if isinstance(event, NodeExecuted)] == ["1"]
    assert [event.node_progress for event in told if isinstance(event, NodeProgressed)] == [1, 2]
    assert tracker.counts().done == 1
    assert tracker.evidence.started == 5


def test_an_out_of_place_success_is_only_evidence() -> None:
    tracker = tracker_of({"1": {"class_type": "SaveImage", "inputs": {}}})
    tracker.feed(ExecutionSuccess("p", 9), 9)
    tracker.feed(ExecutionError("p", "1", "SaveImage", "boom", "ValueError", 10), 10)
    assert (tracker.evidence.verdict, tracker.evidence.ended) == ("error", 10)


@pytest.mark.parametrize(
    ("case", "kinds"),
    [
        ("run_empty_save", ["image"]),
        ("run_video_outputs", ["video", "video"]),
        ("run_animated_outputs", ["video", "video"]),
        ("run_audio_outputs", ["audio", "audio", "audio"]),
        ("run_latent_output", ["latent"]),
        ("run_preview_3d", ["3d"]),
    ],
)
def test_outputs_of_every_kind(case: str, kinds: list[str]) -> None:
    tracker, _ = only(case)
    found = [output for outputs in tracker.evidence.outputs.values() for output in outputs]
    assert sorted(output.kind for output in found) == sorted(kinds)
    assert all(output.filename and output.content_type for output in found)


def test_texts_are_outputs() -> None:
    tracker, _ = only("run_text_outputs")
    found = [output for outputs in tracker.evidence.outputs.values() for output in outputs]
    assert found
    assert all(output.kind == "text" and output.text for output in found)


def test_other_data_is_no_output_and_a_foreign_path_is_dropped() -> None:
    output = {
        "gifs": [
            {"filename": "a.mp4", "subfolder": "x", "type": "output", "format": "video/h264-mp4", "fullpath": "/y"}
        ],
        "a_images": [{"filename": "c.png", "subfolder": "", "type": "temp"}],
        "scores": [1, 2],
        "note": ["plain"],
    }
    assert list(outputs_of("9", output)) == [
        Output(
            kind="video",
            node_id="9",
            filename="a.mp4",
            subfolder="x",
            type="output",
            content_type="video/mp4",
            extra={"format": "video/h264-mp4"},
        ),
        Output(kind="image", node_id="9", filename="c.png", subfolder="", type="temp", content_type="image/png"),
    ]
