"""Between rows of the embedded store and the values of the model.

Must never run a statement.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET

from managers.errors import InvalidRequest
from managers.events.log import StoredFrame
from managers.events.types import Cost, Finding, NodeCounts, Output
from managers.workflows.model import Attempt, AttemptState, Claimed, NewWorkflow, Priority, Status, Workflow
from managers.workflows.sqlite_statements import ATTEMPT_WIDTH, WORKFLOW_WIDTH

Row = Sequence[Any]

_STATUS = {status.value: status for status in Status}
_PRIORITY = {priority.value: priority for priority in Priority}
_encoder = msgspec.json.Encoder()
_findings = msgspec.json.Decoder(tuple[Finding, ...])
_names = msgspec.json.Decoder(tuple[str, ...])
_outputs = msgspec.json.Decoder(tuple[Output, ...])

_WORTH_PACKING = 4096  # bytes: a page of the file. Below it there is little to save, and a commit would wait for it


def pack(text: bytes) -> bytes:
    """JSON text as it is stored: level 1 makes a graph 5 to 10 times smaller at some 100 MB/s."""
    return zlib.compress(text, 1) if len(text) > _WORTH_PACKING else text


def unpack(stored: bytes) -> bytes:
    """A zlib stream begins with `x`, which no JSON text does."""
    return zlib.decompress(stored) if stored[:1] == b"x" else stored


def unpack_graph(row: Row) -> tuple[bytes, bytes | None]:
    """The graph and extra_data."""
    return unpack(row[0]), None if row[1] is None else unpack(row[1])


def workflow_of(row: Row) -> Workflow:
    """A record, from the columns every query for workflows begins with."""
    (
        id_, number, status, priority, gpu, rank, created_at, max_attempts, timeout_seconds, attempt,
        backend, prompt_id, start_time, completion_time, progress, total, done, cached,
        error, error_type, errors, outputs_reused, metadata, retry_of, submitted_by, unfit,
        charged, gpu_seconds, vram_peak, energy, webhook_url, template, template_version, outputs,
    ) = row[:WORKFLOW_WIDTH]  # fmt: skip
    return Workflow(
        id=id_,
        number=number,
        status=_STATUS[status],
        priority=_PRIORITY[priority],
        gpu=gpu,
        rank=rank,
        created_at=created_at,
        max_attempts=max_attempts,
        timeout_seconds=timeout_seconds,
        attempt=attempt,
        backend=backend,
        prompt_id=prompt_id,
        start_time=start_time,
        completion_time=completion_time,
        progress=progress,
        nodes=NodeCounts(total=total, done=done, cached=cached),
        error=error,
        error_type=error_type,
        errors=findings_of(errors),
        outputs=_outputs.decode(f"[{outputs}]") if outputs else (),
        outputs_reused=bool(outputs_reused),
        metadata=msgspec.json.decode(metadata) if metadata else None,
        retry_of=retry_of,
        submitted_by=submitted_by,
        unfit=names_of(unfit),
        cost=cost_of(gpu_seconds, vram_peak, energy) if charged else None,
        webhook_url=webhook_url,
        template=template,
        template_version=template_version,
    )


def cost_of(gpu_seconds: float | None, vram_peak: int | None, energy: float | None) -> Cost:
    """NULL is what nobody knows."""
    return Cost(
        gpu_seconds=UNSET if gpu_seconds is None else gpu_seconds,
        vram_peak_bytes=UNSET if vram_peak is None else vram_peak,
        energy_joules=UNSET if energy is None else energy,
    )


def cost_row(cost: Cost | None) -> tuple[float | None, int | None, float | None]:
    """What `cost_of` reads."""
    if cost is None:
        return None, None, None
    return (
        None if cost.gpu_seconds is UNSET else cost.gpu_seconds,
        None if cost.vram_peak_bytes is UNSET else cost.vram_peak_bytes,
        None if cost.energy_joules is UNSET else cost.energy_joules,
    )


def findings_of(stored: str | None) -> tuple[Finding, ...]:
    """A JSON list of findings; most often there is none."""
    return _findings.decode(stored) if stored else ()


def findings_text(findings: tuple[Finding, ...]) -> str | None:
    """What `findings_of` reads."""
    return _json(findings)


def names_of(stored: str | None) -> tuple[str, ...]:
    """A JSON list of names; most often there is none."""
    return _names.decode(stored) if stored else ()


def new_record(new: NewWorkflow, number: int) -> Workflow:
    """What a new workflow is once it is stored: queued, or failed at once."""
    return Workflow(
        id=new.id,
        number=number,
        status=Status.QUEUED if new.failure is None else Status.FAILED,
        priority=new.priority,
        gpu=new.gpu,
        rank=new.rank,
        created_at=new.created_at,
        max_attempts=new.max_attempts,
        timeout_seconds=new.timeout_seconds,
        completion_time=None if new.failure is None else new.created_at,
        nodes=NodeCounts(total=new.node_total),
        error=new.failure,
        error_type=None if new.failure is None else "validation",
        errors=new.errors,
        metadata=new.metadata,
        retry_of=new.retry_of,
        submitted_by=new.submitted_by,
        unfit=new.unfit,
        webhook_url=new.webhook_url,
        template=None if new.made_from is None else new.made_from.template,
        template_version=None if new.made_from is None else new.made_from.version,
    )


def inserted(workflow: Workflow) -> Row:
    """The parameters of one row of INSERT_WORKFLOWS."""
    return (
        workflow.number,
        workflow.id,
        workflow.status.value,
        workflow.priority.value,
        workflow.gpu,
        workflow.rank,
        workflow.created_at,
        workflow.max_attempts,
        workflow.timeout_seconds,
        workflow.completion_time,
        workflow.nodes.total,
        workflow.error,
        workflow.error_type,
        _json(workflow.errors),
        None if workflow.metadata is None else _json(workflow.metadata),
        workflow.retry_of,
        workflow.submitted_by,
        _json(workflow.unfit),
        workflow.webhook_url,
        workflow.template,
        workflow.template_version,
    )


def updated(before: Workflow, after: Workflow) -> Row:
    """The parameters of UPDATE_WORKFLOW."""
    return (
        after.status.value,
        after.priority.value,
        after.rank,
        after.attempt,
        after.backend,
        after.prompt_id,
        after.start_time,
        after.completion_time,
        after.progress,
        after.nodes.total,
        after.nodes.done,
        after.nodes.cached,
        after.error,
        after.error_type,
        _json(after.errors),
        after.outputs_reused,
        after.cost is not None,
        *cost_row(after.cost),
        before.number,
        before.status.value,
        before.attempt,
    )


def output_row(workflow: Workflow, n: int, output: Output) -> Row:
    """The parameters of one row of INSERT_OUTPUTS."""
    return (
        workflow.number,
        n,
        workflow.backend,
        output.node_id,
        output.kind,
        output.type,
        None if output.filename is None else output_path(output.subfolder, output.filename),
        output.size,
        _encoder.encode(output).decode(),
    )


def output_path(subfolder: str | None, filename: str) -> str:
    """`subfolder/filename`, with forward slashes on every system."""
    folder = (subfolder or "").replace("\\", "/").strip("/")
    return f"{folder}/{filename}" if folder else filename


def attempt_of(row: Row) -> Attempt:
    """An attempt, from the columns every query for attempts begins with."""
    (
        prompt_id, workflow_id, number, backend, state, created_at, start_time, end_time, error, error_type, died,
    ) = row[:ATTEMPT_WIDTH]  # fmt: skip
    return Attempt(
        prompt_id=prompt_id,
        workflow_id=workflow_id,
        number=number,
        backend=backend,
        state=AttemptState(state),
        created_at=created_at,
        start_time=start_time,
        end_time=end_time,
        error=error,
        error_type=error_type,
        died=bool(died),
    )


def claimed_of(row: Row) -> Claimed:
    """An attempt with its workflow and what ComfyUI is to run."""
    workflow = workflow_of(row[ATTEMPT_WIDTH:])
    return Claimed(workflow, attempt_of(row), *unpack_graph(row[ATTEMPT_WIDTH + WORKFLOW_WIDTH :]))


def frame_of(row: Row) -> StoredFrame:
    """An event as clients get it."""
    return StoredFrame(*row)


def _json(value: Any) -> str | None:
    return _encoder.encode(value).decode() if value or isinstance(value, dict) else None


def write_cursor(number: int) -> str:
    """Where a list goes on; opaque to clients."""
    return base64.urlsafe_b64encode(f"n{number}".encode()).decode().rstrip("=")


def read_cursor(cursor: str) -> int:
    """Raises `InvalidRequest` for what `write_cursor` never wrote."""
    try:
        text = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode("ascii")
        number = int(text[1:])
    except (ValueError, binascii.Error):
        number, text = 0, ""
    if not 0 < number < 2**63 or write_cursor(number) != cursor:
        message = "The cursor is none that this service gave"
        raise InvalidRequest(message, [Finding(code="invalid_query", message=message, input="cursor")])
    return number
