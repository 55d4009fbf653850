"""A workflow as clients see it (CONTRACT 4): the record, with what is live about it now.

Must never decide anything: it only joins.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from msgspec import UNSET, Raw, Struct, UnsetType

from managers.comfyui.tracker import GraphNode
from managers.events.types import Cost, ErrorType, Finding, NodeCounts, Output, WorkflowProgress
from managers.workflows.course import NodeState, NodeTime
from managers.workflows.eta import Eta
from managers.workflows.model import Attempt, Status, Workflow, added, known


class AttemptView(Struct, frozen=True, kw_only=True, rename="camel"):
    """One attempt of a workflow, for `?include=attempts`."""

    attempt: int
    backend: str
    prompt_id: str
    state: str
    created_at: int
    start_time: int | None
    end_time: int | None
    error: str | None
    error_type: ErrorType | None
    died: bool


class NodeTimeView(Struct, frozen=True, kw_only=True, rename="camel"):
    """A node that the run needs, for `?include=nodes`. `seconds` of a running one are those so far.

    `pending`: it has not run. `stopped`: the run ended in the middle of it. A time that nobody saw is null.
    """

    node_id: str
    node_name: str
    node_type: str
    state: NodeState
    start_time: int | None
    seconds: float | None


class WorkflowView(Struct, frozen=True, kw_only=True, rename="camel"):
    """The reply to GET /v1/comfyui/workflow/{id}, and an entry of lists and snapshots."""

    workflow_id: str
    status: Status
    progress: int
    current_node: str | None
    start_time: int | None
    completion_time: int | None
    outputs: tuple[Output, ...]
    error: str | None
    priority: str
    gpu: str
    backend: str | None
    created_at: int
    queue_position: int | None
    attempt: int
    errors: tuple[Finding, ...]
    error_type: ErrorType | None
    nodes: NodeCounts
    current_node_id: str | None
    current_node_type: str | None
    step: int | None
    steps: int | None
    message: str | None
    eta_seconds: float | None
    eta_p90_seconds: float | None
    outputs_reused: bool
    metadata: dict[str, Any] | None
    prompt_id: str | None
    max_attempts: int
    timeout_seconds: float
    retry_of: str | None
    submitted_by: str | None
    cost: Cost | None
    template: str | UnsetType = UNSET
    template_version: int | UnsetType = UNSET
    parameters: Raw | UnsetType = UNSET
    workflow: Raw | UnsetType = UNSET
    attempts: tuple[AttemptView, ...] | UnsetType = UNSET
    node_times: tuple[NodeTimeView, ...] | UnsetType = UNSET


def view(
    workflow: Workflow,
    position: int | None,
    live: WorkflowProgress | None,
    so_far: Cost | None = None,
    eta: Eta | None = None,
) -> WorkflowView:
    """Join the record with its place in the queue, its estimate and, while it runs, its progress and cost so far."""
    cost = workflow.cost
    if workflow.status is Status.RUNNING:
        cost = added(cost, so_far)
    else:
        live = None
    return WorkflowView(
        workflow_id=workflow.id,
        status=workflow.status,
        progress=live.progress if live else workflow.progress,
        current_node=live.current_node if live else None,
        start_time=workflow.start_time,
        completion_time=workflow.completion_time,
        outputs=workflow.outputs,
        error=workflow.error,
        priority=workflow.priority,
        gpu=workflow.gpu,
        backend=workflow.backend,
        created_at=workflow.created_at,
        queue_position=position,
        attempt=workflow.attempt,
        errors=workflow.errors,
        error_type=workflow.error_type,
        nodes=live.nodes if live else workflow.nodes,
        current_node_id=live.current_node_id if live else None,
        current_node_type=live.current_node_type if live else None,
        step=live.step if live else None,
        steps=live.steps if live else None,
        message=live.message if live else None,
        eta_seconds=eta.seconds if eta else None,
        eta_p90_seconds=eta.p90 if eta else None,
        outputs_reused=workflow.outputs_reused,
        metadata=workflow.metadata,
        prompt_id=workflow.prompt_id,
        max_attempts=workflow.max_attempts,
        timeout_seconds=workflow.timeout_seconds,
        retry_of=workflow.retry_of,
        submitted_by=workflow.submitted_by,
        cost=known(cost),
        template=workflow.template or UNSET,
        template_version=workflow.template_version or UNSET,
    )


def attempt_view(attempt: Attempt) -> AttemptView:
    """An attempt as clients see it."""
    return AttemptView(
        attempt=attempt.number,
        backend=attempt.backend,
        prompt_id=attempt.prompt_id,
        state=attempt.state,
        created_at=attempt.created_at,
        start_time=attempt.start_time,
        end_time=attempt.end_time,
        error=attempt.error,
        error_type=attempt.error_type,
        died=attempt.died,
    )


def node_time_views(nodes: Mapping[str, GraphNode], times: Iterable[NodeTime]) -> tuple[NodeTimeView, ...]:
    """The nodes of a run with their times, in the order in which they were taken up; what did not run comes last."""
    seen = {time.node_id: time for time in times}
    order = [node_id for node_id in seen if node_id in nodes] + [node_id for node_id in nodes if node_id not in seen]
    return tuple(
        NodeTimeView(
            node_id=node_id,
            node_name=nodes[node_id].name,
            node_type=nodes[node_id].class_type,
            state=time.state,
            start_time=time.start_time,
            seconds=time.seconds,
        )
        for node_id in order
        if (time := seen.get(node_id) or NodeTime(node_id, "pending"))
    )
