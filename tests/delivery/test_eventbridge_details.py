"""What EventBridge is told, as values: names, limits, and whom a detail is about."""

from __future__ import annotations

import json
from typing import Any

import pytest

from managers.delivery.eventbridge import SCHEDULE, queue_id_of
from managers.delivery.eventbridge_details import (
    MOST_BYTES,
    MOST_ENTRIES,
    Entry,
    Whose,
    calls,
    entry_of,
    fitted,
    is_told,
)
from managers.events.log import StoredFrame

WHOSE = Whose(prompt_id="p-1", client_id="c-1", queue_id="q-7")
NOW = 1_764_000_000_123


def _detail(event: dict[str, Any], naming: Any = "camel") -> tuple[str, dict[str, Any]]:
    entry = entry_of({"timestamp": NOW, "workflowId": "w-1", **event}, WHOSE, naming)
    detail: dict[str, Any] = json.loads(entry.detail)
    return entry.detail_type, detail


def test_a_detail_has_whom_it_is_about_then_its_own_fields() -> None:
    event = {"type": "workflow:completed", "seq": 12, "duration": 1.5, "outputs": [], "outputsReused": False}
    assert _detail(event) == (
        "Job Completed",
        {
            "promptId": "p-1",
            "workflowId": "w-1",
            "queueId": "q-7",
            "clientId": "c-1",
            "timestamp": "2025-11-24T16:00:00.123Z",
            "duration": 1.5,
            "outputs": [],
            "outputsReused": False,
        },
    )


def test_without_a_queue_id_it_is_the_workflow_id() -> None:
    entry = entry_of({"type": "workflow:cancelled", "timestamp": NOW, "workflowId": "w-1"}, Whose(), "camel")
    assert json.loads(entry.detail)["queueId"] == "w-1"


def test_snake_names_go_all_the_way_down_but_not_into_what_is_not_ours() -> None:
    output = {"nodeId": "9", "contentType": "image/png", "extra": {"frameRate": 8}}
    _, detail = _detail({"type": "images:generated", "nodeId": "9", "outputs": [output]}, "snake")
    assert detail == {
        "prompt_id": "p-1",
        "workflow_id": "w-1",
        "queue_id": "q-7",
        "client_id": "c-1",
        "timestamp": "2025-11-24T16:00:00.123Z",
        "node_id": "9",
        "outputs": [{"node_id": "9", "content_type": "image/png", "extra": {"frameRate": 8}}],
    }
    kind, detail = _detail({"type": "node:executed", "nodeId": "9", "output": {"camelCase": 1}}, "snake")
    assert (kind, detail["output"]) == ("Node Executed", {"camelCase": 1})


def test_what_is_too_large_goes_field_by_field_the_largest_first() -> None:
    detail = {"promptId": "p", "small": 1, "big": "x" * 200_000, "bigger": "ü" * 150_000, "errors": ["y"]}
    entry = fitted("Job Failed", detail, NOW)
    told = json.loads(entry.detail)
    assert told == {"promptId": "p", "small": 1, "big": "x" * 200_000, "errors": ["y"], "truncated": ["bigger"]}
    assert entry.size == 14 + len("comfyui.monitor") + len("Job Failed") + len(entry.detail.encode()) <= MOST_BYTES
    both = fitted("Job Failed", {"promptId": "p", "a": "x" * 300_000, "b": "x" * 290_000}, NOW)
    assert json.loads(both.detail) == {"promptId": "p", "truncated": ["a", "b"]}


def test_calls_keep_both_limits_and_the_order() -> None:
    small = [Entry("a", str(n), NOW, 100) for n in range(23)]
    assert [len(call) for call in calls(small)] == [MOST_ENTRIES, MOST_ENTRIES, 3]
    assert [entry for call in calls(small) for entry in call] == small
    sizes = [MOST_BYTES, 1, MOST_BYTES // 2, MOST_BYTES // 2, 5]
    large = [Entry("a", str(n), NOW, size) for n, size in enumerate(sizes)]
    assert [[entry.size for entry in call] for call in calls(large)] == [
        [MOST_BYTES],
        [1, MOST_BYTES // 2],
        [MOST_BYTES // 2, 5],
    ]
    assert list(calls([])) == []


def test_job_failed_is_the_end_and_nothing_else() -> None:
    def told(kind: str, data: dict[str, Any]) -> bool:
        return is_told(StoredFrame(1, kind, "w", json.dumps(data).encode()))

    assert told("workflow:error", {"willRetry": False})
    assert not told("workflow:error", {"willRetry": True})
    assert told("upload:completed", {})
    assert not told("workflow:queued", {})
    assert not told("backend:connected", {})


@pytest.mark.parametrize(
    ("extra_data", "queue_id"),
    [
        (b'{"queue_id":"abc","api_key":"s"}', "abc"),
        (b'{"queue_id":17}', "17"),
        (b'{"queue_id":true}', None),
        (b'{"queue_id":{"api_key":"s"}}', None),
        (b'{"queue_id":""}', None),
        (b"{}", None),
        (b"[]", None),
        (None, None),
    ],
)
def test_of_extra_data_only_a_plain_queue_id_is_read(extra_data: bytes | None, queue_id: str | None) -> None:
    assert queue_id_of(extra_data) == queue_id


def test_a_bus_that_is_away_is_waited_for_three_days() -> None:
    assert SCHEDULE[0] == 1
    assert 2.9 * 86400 < sum(SCHEDULE) < 3.1 * 86400
