"""metadata.json: how a run made what lies beside it. Pure.

Must never hold what came in `extra_data`: keys of others may be in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Raw, Struct

from managers.delivery import s3_names
from managers.delivery.s3_uploader import Report
from managers.events.types import Cost, Output
from managers.workflows.course import NodeTime
from managers.workflows.model import Workflow


class Parameters(Struct, frozen=True, kw_only=True, rename="camel"):
    """What a node was told: its inputs that are no links."""

    class_type: str
    title: str | None
    inputs: dict[str, Any]


class Described(Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """An output as metadata.json tells of it. Text is here only; what has an `error` is nowhere."""

    n: int
    kind: str
    node_id: str
    name: str | None = None
    key: str | None = None
    filename: str | None = None
    subfolder: str | None = None
    type: str | None = None
    content_type: str | None = None
    size: int | None = None
    sha256: str | None = None
    uploaded_at: int | None = None
    text: str | None = None
    error: str | None = None


class NodeRun(Struct, frozen=True, kw_only=True, rename="camel"):
    """When a node ran, and for how many seconds; None where nobody saw it."""

    node_id: str
    state: str
    start_time: int | None
    seconds: float | None


class Metadata(Struct, frozen=True, kw_only=True, rename="camel"):
    """metadata.json. Times are epoch ms."""

    workflow_id: str
    prompt_id: str | None
    backend: str | None
    gpu: str
    priority: str
    attempt: int
    created_at: int
    start_time: int | None
    completion_time: int | None
    metadata: dict[str, Any] | None
    submitted_by: str | None
    outputs_reused: bool
    cost: Cost | None
    outputs: tuple[Described, ...]
    node_times: tuple[NodeRun, ...]
    parameters: dict[str, Parameters]
    workflow: Raw


def metadata(
    workflow: Workflow,
    graph: bytes,
    node_times: Sequence[NodeTime],
    outputs: Sequence[Output],
    report: Report,
) -> bytes:
    """The file; `graph` is JSON text. With a large graph this takes a while: call it in a thread."""
    names = s3_names.names(outputs)
    found = Metadata(
        workflow_id=workflow.id,
        prompt_id=workflow.prompt_id,
        backend=workflow.backend,
        gpu=workflow.gpu,
        priority=workflow.priority.value,
        attempt=workflow.attempt,
        created_at=workflow.created_at,
        start_time=workflow.start_time,
        completion_time=workflow.completion_time,
        metadata=workflow.metadata,
        submitted_by=workflow.submitted_by,
        outputs_reused=workflow.outputs_reused,
        cost=workflow.cost,
        outputs=tuple(_described(n, output, names.get(n), report) for n, output in enumerate(outputs)),
        node_times=tuple(
            NodeRun(node_id=one.node_id, state=one.state, start_time=one.start_time, seconds=one.seconds)
            for one in node_times
        ),
        parameters=_parameters(msgspec.json.decode(graph)),
        workflow=Raw(graph),
    )
    return msgspec.json.format(msgspec.json.encode(found), indent=2)


def _described(n: int, output: Output, name: str | None, report: Report) -> Described:
    upload = report.uploads.get(n)
    return Described(
        n=n,
        kind=output.kind,
        node_id=output.node_id,
        name=name,
        key=upload.key if upload else None,
        filename=output.filename,
        subfolder=output.subfolder,
        type=output.type,
        content_type=output.content_type,
        size=upload.size if upload else output.size,
        sha256=upload.sha256 if upload else None,
        uploaded_at=upload.uploaded_at if upload else None,
        text=output.text,
        error=report.lost.get(n),
    )


def _parameters(graph: dict[str, Any]) -> dict[str, Parameters]:
    """Links are lists of two, a node's id and a number (PROTOCOL §2)."""
    return {
        node_id: Parameters(
            class_type=str(node.get("class_type")),
            title=(node.get("_meta") or {}).get("title"),
            inputs={name: value for name, value in node.get("inputs", {}).items() if not isinstance(value, list)},
        )
        for node_id, node in graph.items()
        if isinstance(node, dict)
    }
