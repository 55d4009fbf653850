"""Metrics from events alone: gaps, waits, and how many labels there can be."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families as parse_text

from managers.events.types import (
    BackendDisconnected,
    ComfyUIMessage,
    Event,
    NodeExecuted,
    NodeExecuting,
    QueueStatus,
    WorkflowCompleted,
    WorkflowStarted,
)
from metrics.nodes import MAX_TYPES, OTHER
from metrics.registry import exposition
from metrics.workflows import WorkflowMetrics
from tests.scraping import Sample, nodes, sample, values


def metrics_after(*events: Any) -> dict[Sample, float]:
    """What a fresh set of metrics says; outside any loop, so nothing in it can wait."""
    registry = CollectorRegistry()
    metrics = WorkflowMetrics(["local"])
    registry.register(metrics)
    for event in events:
        metrics.hear(event)
    return values(parse_text(asyncio.run(exposition(registry, ""))[0].decode()))


def message(kind: str, workflow_id: str, at: int, backend: str = "a") -> ComfyUIMessage:
    return ComfyUIMessage(
        type=f"comfyui:{kind}", timestamp=at, backend=backend, data=msgspec.Raw(b"{}"), workflow_id=workflow_id
    )


def started(workflow_id: str, created_at: int, at: int, backend: str = "a", attempt: int = 1) -> WorkflowStarted:
    return WorkflowStarted(
        timestamp=at,
        workflow_id=workflow_id,
        backend=backend,
        attempt=attempt,
        start_time=at,
        created_at=created_at,
        priority="normal",
        gpu="local",
    )


def gaps(*events: Any) -> tuple[float, float]:
    found = metrics_after(*events)
    prefix = "comfyui_dispatch_gap_seconds"
    return found[sample(f"{prefix}_count")], found[sample(f"{prefix}_sum")]


FIRST = (message("execution_start", "1", 1000), started("1", 0, 1001), message("execution_success", "1", 5000))
COMPLETED = WorkflowCompleted(timestamp=5050, workflow_id="1", duration=4, outputs=(), outputs_reused=False)


def test_a_gap_is_from_the_end_of_one_to_the_start_of_the_next() -> None:
    assert gaps(*FIRST) == (0, 0)
    assert gaps(*FIRST, COMPLETED, message("execution_start", "2", 5200), started("2", 0, 5300)) == (1, 0.2)


def test_a_gap_begins_with_the_submission_when_that_is_later() -> None:
    assert gaps(*FIRST, COMPLETED, message("execution_start", "2", 9000), started("2", 8970, 9001)) == (1, 0.03)


def test_the_end_of_the_first_may_be_stored_after_the_start_of_the_second() -> None:
    begun = (message("execution_start", "2", 5002), started("2", 0, 5003))
    assert gaps(*FIRST, *begun, COMPLETED) == (1, 0.002)


def test_a_blocked_branch_is_not_the_end() -> None:
    blocked = message("execution_error", "1", 2000)
    begun = (message("execution_start", "2", 5100), started("2", 0, 5101))
    assert gaps(FIRST[0], blocked, *FIRST[1:], *begun) == (1, 0.1)


@pytest.mark.parametrize(
    "between",
    [
        BackendDisconnected(timestamp=6000, backend="a"),
        QueueStatus(timestamp=6000, length=1, running=0, paused=True),
    ],
)
def test_away_or_paused_is_not_idle(between: Any) -> None:
    begun = (message("execution_start", "2", 9000), started("2", 0, 9001))
    assert gaps(*FIRST, between, *begun) == (0, 0)
    ended = message("execution_interrupted", "2", 9500)
    assert gaps(*FIRST, between, *begun, ended, message("execution_start", "3", 9600), started("3", 0, 9601)) == (
        1,
        0.1,
    )


def test_short_runs_may_be_told_when_others_have_begun() -> None:
    told_late = (
        message("execution_success", "1", 5000),
        message("execution_start", "2", 5001),
        message("execution_success", "2", 5003),
        message("execution_start", "3", 5005),
        started("2", 0, 5006),
        started("3", 0, 5006),
    )
    count, seconds = gaps(message("execution_start", "1", 1000), *told_late)
    assert (count, round(seconds, 6)) == (2, 0.003)


def test_backends_have_gaps_of_their_own() -> None:
    begun = (message("execution_start", "2", 9000, "b"), started("2", 0, 9001, "b"))
    assert gaps(*FIRST, *begun) == (0, 0)


def test_a_later_attempt_has_no_gap() -> None:
    begun = (message("execution_start", "2", 9000), started("2", 0, 9001, attempt=2))
    assert gaps(*FIRST, *begun) == (0, 0)


# ---- bounded


def test_the_wait_is_never_negative_nor_longer_than_known() -> None:
    ahead = msgspec.structs.replace(started("1", 1000, 3000), start_time=99_000)
    behind = msgspec.structs.replace(started("2", 1000, 3000), start_time=500)
    found = metrics_after(ahead, behind)
    assert found[sample("comfyui_workflow_queue_seconds_count", priority="normal")] == 2
    assert found[sample("comfyui_workflow_queue_seconds_sum", priority="normal")] == 2.0


def node(kind: type[NodeExecuting | NodeExecuted], n: int, at: int, workflow_id: str = "w") -> Event:
    return kind(timestamp=at, workflow_id=workflow_id, node_id=str(n), display_node_id=str(n), node_type=f"Class{n}")


def test_node_types_are_bounded() -> None:
    events = [
        node(kind, n, at) for n in range(MAX_TYPES + 50) for kind, at in ((NodeExecuting, 0), (NodeExecuted, 250))
    ]
    found = {key: value for key, value in metrics_after(*events, *events[:2]).items() if "node_duration" in key[0]}
    counts = {dict(labels)["node_type"]: value for (name, labels), value in found.items() if name.endswith("_count")}
    assert counts == {f"Class{n}": 1 for n in range(MAX_TYPES)} | {"Class0": 2, OTHER: 50}
    assert found[sample("comfyui_node_duration_seconds_sum", node_type=OTHER)] == 12.5


def test_nodes_of_an_ended_attempt_are_forgotten() -> None:
    begun, done = node(NodeExecuting, 1, 0), node(NodeExecuted, 1, 500)
    ended = msgspec.structs.replace(COMPLETED, workflow_id="w")
    assert metrics_after(begun, done)[nodes("Class1")] == 1
    assert nodes("Class1") not in metrics_after(begun, ended, done)
    # Those that say something after their end do not pile up.
    late = [node(NodeExecuting, 1, 0, str(n)) for n in range(1000)]
    assert nodes("Class1") not in metrics_after(*late, node(NodeExecuted, 1, 500, "0"))
    assert metrics_after(*late, node(NodeExecuted, 1, 500, "999"))[nodes("Class1")] == 1
