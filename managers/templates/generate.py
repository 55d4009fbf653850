"""From parameters to a workflow in the queue, by the way that every workflow goes.

Must never store what cannot run: here a mistake is told at once, because who asks is waiting for a picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from managers.errors import Conflict, InvalidWorkflow
from managers.events.types import Finding, Output
from managers.templates.model import Version
from managers.templates.registry import Templates
from managers.workflows.manager import Submission, WorkflowManager
from managers.workflows.model import IdempotencyKey, MadeFrom, Status, Submitted, Workflow

_encode = msgspec.json.Encoder().encode
_object = msgspec.json.Decoder(dict[str, Any])


class Generated(Struct, frozen=True):
    """A workflow in the queue, and what it was made from; a replayed one with the parameters of the first time."""

    submitted: Submitted
    made_from: MadeFrom

    @property
    def seed(self) -> int | None:
        """The seed that was taken."""
        found = _object.decode(self.made_from.parameters).get("seed")
        return found if type(found) is int else None


async def generate(
    templates: Templates,
    workflows: WorkflowManager,
    reference: str,
    given: Mapping[str, Any],
    submission: Submission,
    key: IdempotencyKey | None = None,
) -> Generated:
    """Fill the template and hand it in; `submission` says all but the graph.

    Raises `NotFound`, `InvalidWorkflow` (nothing is stored), and what `WorkflowManager.submit` does.
    """
    if key is not None and (replayed := await workflows.store.first_reply(key)) is not None:
        return await _again(workflows, replayed)
    version = await templates.find(reference)
    filled = await templates.fill(version, given, submission.gpu)
    made_from = MadeFrom(version.name, version.number, _encode(filled.parameters))
    submission = replace(submission, graph=_encode(filled.graph), made_from=made_from, unfit=filled.unfit)
    verdict = await workflows.dry_run(submission)
    if not verdict.valid:
        errors = [_of_parameter(finding, version) for finding in verdict.errors if finding.severity == "error"]
        raise InvalidWorkflow(f"{version.reference}: {'; '.join(one.message for one in errors[:5])}", errors)
    submitted = await workflows.submit(submission, key=key)
    return await _again(workflows, submitted) if submitted.replayed else Generated(submitted, made_from)


def picture_of(workflow: Workflow, wanted: Sequence[str]) -> int:
    """The number of its first picture, of the nodes that are `wanted` where there are any.

    Raises `InvalidWorkflow` when it failed or gave none, `Conflict` when it was cancelled.
    """
    if workflow.status is Status.FAILED:
        raise InvalidWorkflow(f"Workflow {workflow.id} failed: {workflow.error}", workflow.errors)
    if workflow.status is not Status.COMPLETED:
        raise Conflict(f"Workflow {workflow.id} is {workflow.status}", workflow.status)
    found = [n for n, output in enumerate(workflow.outputs) if _is_picture(output)]
    first = next((n for n in found if not wanted or workflow.outputs[n].node_id in wanted), None)
    if first is None:
        raise InvalidWorkflow(f"Workflow {workflow.id} has completed, and gave no picture")
    return first


def _is_picture(output: Output) -> bool:
    return output.kind == "image" and output.filename is not None


async def _again(workflows: WorkflowManager, submitted: Submitted) -> Generated:
    made_from = await workflows.store.made_from(submitted.workflow.id)
    if made_from is None:
        raise Conflict("This Idempotency-Key is that of a workflow without a template", submitted.status)
    return Generated(submitted, made_from)


def _of_parameter(finding: Finding, version: Version) -> Finding:
    """About the parameter that fills this input, where there is one."""
    for name, given in version.definition.inputs.items():
        if any(place.node == finding.node_id and place.input == finding.input for place in given.places):
            return replace(finding, pointer=f"/{name}", message=f"{name}: {finding.message}")
    return replace(finding, pointer="")
