"""What the record makes of a verdict: the classes of failure, and what follows each (docs/reliability.md).

Must never ask ComfyUI where a prompt is: the verdict is in, and it is the only one.
"""

from __future__ import annotations

import structlog

from managers.comfyui.backend import Backend
from managers.comfyui.verdicts import Result, Verdict
from managers.errors import BackendUnavailable
from managers.events.types import Cost
from managers.workflows.model import Claimed, Outcome, Status
from managers.workflows.store import WorkflowStore

log = structlog.get_logger(__name__)


async def settle(
    store: WorkflowStore, backend: Backend, claimed: Claimed, verdict: Verdict, *, now: int, cost: Cost | None
) -> None:
    """Write it down, with what the attempt took; may be called again when the disk was full. `now` is epoch ms.

    Raises `StoreUnavailable`.
    """
    prompt_id = claimed.attempt.prompt_id
    remain = claimed.attempt.number < claimed.workflow.max_attempts
    match verdict.result:
        case Result.WITHDRAWN:
            await store.withdraw(prompt_id, now)
        case Result.GONE:
            await store.close_attempt(prompt_id, now)
        case Result.LOST:
            await store.lose(
                prompt_id,
                error=verdict.error or "lost",
                error_type=verdict.error_type or "lost",
                now=now,
                retry=remain or verdict.unseen,
                died=verdict.died,
                cost=cost,
            )
        case Result.FAILED if verdict.error_type == "oom" and remain and not await _oom_before(store, claimed):
            try:
                await backend.client.free()
            except BackendUnavailable as error:
                log.warning("could not free memory", backend=backend.name, reason=str(error))
            words = verdict.error or "out of memory"
            await store.lose(prompt_id, error=words, error_type="oom", now=now, retry=True, cost=cost)
        case _:
            await store.finish(prompt_id, outcome_of(verdict, now, cost))


async def _oom_before(store: WorkflowStore, claimed: Claimed) -> bool:
    """Memory was freed for it once already."""
    return claimed.attempt.number > 1 and any(
        attempt.error_type == "oom" for attempt in await store.attempts(claimed.workflow.id)
    )


def outcome_of(verdict: Verdict, now: int, cost: Cost | None = None) -> Outcome:
    """What the record keeps of a verdict; lost counts as failed, where nothing is made again. `now` is epoch ms."""
    return Outcome(
        status=Status.FAILED if verdict.result is Result.LOST else Status(verdict.result.value),
        start_time=verdict.start_time,
        completion_time=verdict.end_time or now,
        outputs=verdict.outputs,
        outputs_reused=verdict.outputs_reused,
        nodes=verdict.nodes,
        progress=verdict.progress,
        error=verdict.error,
        error_type=verdict.error_type,
        errors=verdict.errors,
        node_id=verdict.node_id,
        node_type=verdict.node_type,
        cost=cost,
    )
